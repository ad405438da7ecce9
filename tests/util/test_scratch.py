"""Folders for temporary files: who deletes them, and when."""

import os
import select
import signal
import tempfile
import time
from pathlib import Path

import pytest

from d2ft_fl.errors import RunError
from d2ft_fl.util import lifeline, scratch
from d2ft_fl.util.scratch import Scratch


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    """No other process's folders are looked at."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("MEMORY", "SHORT"):
        monkeypatch.setattr(scratch, name, tmp_path)


def test_a_folder_is_private_and_deleted_by_nobody_else(tmp_path):
    own = Scratch.make(scratch.new_path(scratch.RUN))
    assert own.path.stat().st_mode & 0o077 == 0
    scratch.prune()
    assert list(tmp_path.iterdir()) == [own.path]
    own.delete()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_deleted_and_a_fork_of_it_holds_nothing(tmp_path):
    """The fork lives on, as a fork server may."""
    told, tell = os.pipe()
    if not (child := os.fork()):
        Scratch.make(scratch.new_path(scratch.EXCHANGE))
        if not (grandchild := os.fork()):
            time.sleep(60)
            os._exit(0)
        os.write(tell, str(grandchild).encode())
        time.sleep(60)
        os._exit(0)
    grandchild = int(os.read(told, 20))
    try:
        scratch.prune()
        assert len(list(tmp_path.iterdir())) == 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        scratch.prune()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_one_that_was_never_finished_goes_after_a_while(tmp_path):
    unfinished = tmp_path / f"{scratch.UNFINISHED}x"
    unfinished.mkdir()
    scratch.prune()
    assert unfinished.exists()
    os.utime(unfinished, (0, 0))
    scratch.prune()
    assert not unfinished.exists()


def test_what_others_have_named_stays(tmp_path):
    for name in ("d2ft-runs", "d2ft-", "results"):
        tmp_path.joinpath(name).mkdir()
    tmp_path.joinpath(f"{scratch.RUN}notes.txt").touch()
    scratch.prune()
    assert len(list(tmp_path.iterdir())) == 4


def test_temporary_files_go_elsewhere_for_a_while(tmp_path):
    before = os.environ.get("TMPDIR")
    inner = tmp_path / "inner"
    inner.mkdir()
    with scratch.instead(inner):
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(inner)
        assert scratch.root() == tmp_path  # where new folders of ours go all the same
    assert tempfile.gettempdir() == str(tmp_path)
    assert os.environ.get("TMPDIR") == before


def test_a_folder_for_sockets_has_a_short_name_or_is_refused(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    room = len(os.fsencode(tmp_path)) + 30
    assert scratch.short_path(scratch.FLOWER, room).parent == tmp_path
    monkeypatch.setattr(scratch, "SHORT", Path("/nowhere"))
    with pytest.raises(RunError, match=r"^TMPDIR = .*xxx' is too long for sockets, .* 11 bytes"):
        scratch.short_path(scratch.FLOWER, 30)


def test_a_lifeline_ends_when_its_owner_does_though_a_fork_lives():
    reader, writer = lifeline.new()
    if not (child := os.fork()):
        time.sleep(60)
        os._exit(0)
    try:
        lifeline.close(writer)
        assert select.select([reader], [], [], 5.0)[0]
        assert os.read(reader, 1) == b""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
    reader, writer = lifeline.new()
    lifeline.cut(writer)
    assert os.read(reader, 1) == lifeline.CALMLY
    os.close(reader)
