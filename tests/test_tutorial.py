"""Every command of docs/tutorial.md, in order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2ft_fl.config.sources import collect
from d2ft_fl.rounds.checks import checked_options
from d2ft_fl.sweep.reading import read_sweep
from d2ft_fl.sweep.trials import expand

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\S+)(?: (\S+))?\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for kind, what, text in BLOCKS
    if kind == "sh" and what != "setup"
    for line in text.replace("\\\n", "").splitlines()
]


def save_files(folder):
    """The files that the tutorial has its reader save."""
    for kind, name, text in BLOCKS:
        if kind != "sh":
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def run(command, folder):
    """One line, as in a shell with the environment activated."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_DATA_HOME": str(folder / "data"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture
def own_mine():
    """Other tests have a package of that name too."""

    def taken():
        names = [name for name in sys.modules if name.split(".")[0] == "mine"]
        return {name: sys.modules.pop(name) for name in names}

    others = taken()
    yield
    taken()
    sys.modules.update(others)


@pytest.mark.usefixtures("own_mine")
def test_what_it_configures_can_run(tmp_path, monkeypatch):
    """Quickly: options, files and commands exist. All of it is run by the slow test."""
    save_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    trials = expand(read_sweep(Path("compare.toml")))
    assert {t.refused for t in trials} == {""}
    assert len(trials) == 6
    for command in COMMANDS:
        assert command.startswith(("d2ft run", "d2ft plan", "d2ft strategies", "d2ft sweep"))
        pairs = re.findall(r"--set (\S+)", command)
        checked_options(collect([], pairs))


@pytest.mark.slow
def test_every_command_works(tmp_path):
    save_files(tmp_path)
    for command in COMMANDS:
        ended = run(command, tmp_path)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    assert tmp_path.joinpath("compared", "report.html").stat().st_size > 1_000_000
    assert tmp_path.joinpath("plan.html").exists()
    assert tmp_path.joinpath("mine.html").exists()
