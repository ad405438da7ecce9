"""Caches: what is deleted of a folder, and what never is."""

import os

import pytest

from d2ft_fl.util import cache
from d2ft_fl.wire.parameter_cache import ParameterCache

NAME = r"[0-9a-f]{2}/[0-9a-f]{4}\.bin"
OLD, NEW = 31 * 86_400, 29 * 86_400
DAY = 86_400


@pytest.mark.parametrize(
    "name, age, stays",
    [
        ("ab/0123.bin", OLD, False),
        ("ab/0123.bin", NEW, True),
        ("ab/0123.bin.a_8zk3q1.part", 2 * DAY, False),
        ("ab/0123.bin.a_8zk3q1.part", DAY / 2, True),
        ("ab/thesis.bin", OLD, True),
        ("ab/0123.bin.bak", OLD, True),
        ("holiday/0123.bin", OLD, True),
        ("0123.bin", OLD, True),
        ("ab/cd/0123.bin", OLD, True),
    ],
)
def test_only_old_files_of_our_own_naming_are_deleted(tmp_path, name, age, stays):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    cache.prune(tmp_path, NAME)
    assert path.exists() is stays


def test_what_is_no_file_stays(tmp_path):
    folder, link = tmp_path / "ab" / "0123.bin", tmp_path / "ab" / "4567.bin"
    folder.mkdir(parents=True)
    target = tmp_path / "own"
    target.touch()
    link.symlink_to(target)
    for path in (folder, target):
        os.utime(path, (0, 0))
    cache.prune(tmp_path, NAME)
    assert folder.is_dir()
    assert link.exists()


def test_a_folder_that_somebody_names_for_weights_keeps_all_that_is_in_it(tmp_path, monkeypatch):
    """Though it has the names of ours: the cache is a folder in there."""
    own = tmp_path / "ab" / f"{'0' * 16}.safetensors"
    own.parent.mkdir()
    own.touch()
    os.utime(own, (0, 0))
    monkeypatch.setenv("D2FT_WEIGHTS", str(tmp_path))
    store = ParameterCache.default()
    group = store._path("0" * 16)
    group.parent.mkdir(parents=True)
    group.touch()
    os.utime(group, (0, 0))
    store.prune()
    assert own.exists()
    assert not group.exists()


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "ab" / "0123.bin"

    def fail():
        with cache.filling(path) as part:
            part.write_bytes(b"half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert list(path.parent.iterdir()) == []
    with cache.filling(path) as part:
        part.write_bytes(b"whole")
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]
