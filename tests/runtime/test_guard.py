"""Guards: what was started ends with who started it, however that ends."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from d2ft_fl.cli.run import _see_to_leftovers
from d2ft_fl.runtime import guard
from d2ft_fl.util import scratch
from d2ft_fl.util.scratch import Scratch

ROOT = Path(__file__).parents[2]
# A command, its child, its child's child, and so on, each in a session of its own; the first child
# ends soon. One, by its number, has nothing of their environment, and all ignore SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
depth, hidden = map(int, sys.argv[1:])
if depth:
    own = {"PATH": os.environ["PATH"]} if depth - 1 == hidden else dict(os.environ)
    subprocess.Popen([sys.executable, sys.argv[0], str(depth - 1), str(hidden)], env=own,
                     start_new_session=True)
if depth == 2:
    time.sleep(0.5)
    os._exit(0)  # its child is an orphan
open(os.path.join(os.path.dirname(sys.argv[0]), f"{depth}-{os.getpid()}"), "w").close()
time.sleep(120)
"""
OWNER = """
import os, sys, time
from pathlib import Path
from d2ft_fl.runtime import guard
from d2ft_fl.util import scratch
from d2ft_fl.util.scratch import Scratch
family = Path(sys.argv[1])
with guard.temporary_files():
    own = Scratch.make(scratch.new_path(scratch.FLOWER))
    environment = {**os.environ, guard.HOME: str(own.path), "PYTHONPATH": sys.argv[2]}
    command = [sys.executable, str(family / "family.py"), "3", sys.argv[4]]
    guarded = guard.start(own, command, family / "log", environment)
    exchange = Scratch.make(scratch.new_path(scratch.EXCHANGE))
    Path(os.environ["TMPDIR"], "of a library").touch()
    while len(list(family.glob("[013]-*"))) < 3:
        time.sleep(0.02)
    if sys.argv[3] == "calmly":
        guarded.end()
        exchange.delete()
    else:
        print("started", flush=True)
        time.sleep(120)
"""


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def members(family):
    """The command's processes, which have written their numbers."""
    numbers = sorted(int(path.name.split("-")[1]) for path in family.glob("[013]-*"))
    return [psutil.Process(number) for number in numbers if lives(number)]


def lives(number):
    """Whether a process runs; init may take a while to ask one that has ended how it did."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def owner(tmp_path):
    """Starts a process that owns a family; yields (start, folder of temporary files)."""
    family, temporary = tmp_path / "family", Path(tempfile.mkdtemp(prefix="g-"))
    family.mkdir()
    family.joinpath("family.py").write_text(FAMILY)

    def start(how, hidden=1):  # an orphan, which a guard alone can know of
        return subprocess.Popen(
            [sys.executable, "-c", OWNER, str(family), str(ROOT), how, str(hidden)],
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    yield start, family, temporary
    for process in members(family):
        process.kill()
    for path in temporary.iterdir():
        scratch.delete(path)
    temporary.rmdir()


def test_a_killed_process_leaves_no_process_and_no_folder(owner):
    start, family, temporary = owner
    process = start("killed")
    process.stdout.readline()
    found = members(family)
    assert len(found) == 3
    assert len(list(temporary.iterdir())) == 3
    process.kill()
    process.wait()
    until(lambda: not any(lives(p.pid) for p in found))
    until(lambda: not list(temporary.iterdir()))


def test_a_process_that_ends_what_it_started_leaves_nothing_either(owner):
    start, family, temporary = owner
    process = start("calmly")
    assert process.wait(60) == 0
    assert len(list(family.glob("[013]-*"))) == 3
    assert members(family) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("resumed", [True, False])
def test_what_lives_on_though_guards_were_killed_is_named_or_ended(
    owner, resumed, monkeypatch, capsys
):
    """Ended where it is of the run that is resumed, and its owner is gone; else named."""
    start, family, temporary = owner
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    process = start("killed", hidden=0)
    process.stdout.readline()
    (home,) = temporary.glob(f"{scratch.FLOWER}*")
    home.joinpath(guard.OPTIONS).write_text(f'run-folder = "{family}"\n')
    mine = lambda: [left for left in guard.left_behind() if left.home == home]  # noqa: E731
    assert mine() == []  # its owner lives
    for killed in psutil.Process(process.pid).children():  # the guards: no other is a child
        killed.kill()
    process.kill()
    process.wait()
    until(lambda: mine() and len(mine()[0].processes) == 3)
    named = sorted(p.pid for p in mine()[0].processes)
    assert [p.pid for p in members(family)] == named
    _see_to_leftovers(str(family) if resumed else str(temporary))
    said = capsys.readouterr().err
    if resumed:
        assert f"ended what was left of this run: processes {' '.join(map(str, named))}" in said
        assert not home.exists()
        until(lambda: not any(lives(n) for n in named))
    else:
        numbers = " ".join(map(str, named))
        assert f"processes of a run in {str(family)!r} live on" in said
        assert f"end them with: kill {numbers}" in said
        assert home.exists()
        assert all(lives(n) for n in named)


def test_a_guard_says_how_its_command_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = Scratch.make(scratch.new_path(scratch.FLOWER))
    environment = {**os.environ, guard.HOME: str(own.path), "PYTHONPATH": str(ROOT)}
    said = json.dumps("printed")
    command = [sys.executable, "-c", f"print({said}); raise SystemExit(7)"]
    guarded = guard.start(own, command, tmp_path / "log", environment)
    assert guarded.process.wait(30) == 7
    assert tmp_path.joinpath("log").read_text() == "printed\n"
    guarded.end()
    assert not own.path.exists()
