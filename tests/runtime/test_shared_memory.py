"""The folder that processes of one machine share."""

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from d2ft_fl.runtime import shared_memory
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.util import scratch
from d2ft_fl.wire import blob as wire


def test_a_model_goes_down_and_replies_come_up_through_files_that_are_used_again():
    own = SharedMemory.create()
    try:
        assert own.folder.stat().st_mode & 0o077 == 0
        weights = {"a": torch.randn(5, 3), "b": torch.tensor([-0.0])}
        first = own.publish(1, weights)
        read = shared_memory.read_model(first)
        second = own.publish(2, weights)
        assert not first.exists()
        assert torch.equal(read["a"], weights["a"])  # what was mapped stays
        for client, size in ((4, 3), (7, 5000), (4, 10)):  # longer, shorter than the one before
            path = own.reply_path(2, client)
            shared_memory.put(path, {"x": torch.full((size,), float(client))}, {"n": client}, 0.0)
            found = [(c, *wire.decode(blob), len(blob)) for c, blob in own.arrived(2)]
            (reply,) = [(c, t["x"].tolist(), m) for c, t, m, _ in found]
            assert reply == (client, [client] * size, {"n": client})
            assert found[0][3] == len(wire.encode(found[0][1], {"n": client}))
        assert len(list(own.folder.iterdir())) == 2  # the model, and one file for all replies
        assert second.exists()
    finally:
        own.close()
    assert not own.folder.exists()


def test_a_late_reply_is_of_no_round():
    own = SharedMemory.create()
    try:
        shared_memory.put(own.reply_path(1, 0), {}, {}, 0.0)
        assert list(own.arrived(2)) == []
        assert list(own.arrived(1)) == []
    finally:
        own.close()


def test_a_worker_waits_while_many_replies_wait(monkeypatch):
    monkeypatch.setattr(shared_memory, "WAITING", 2)
    own = SharedMemory.create()
    try:
        for client in range(2):
            shared_memory.put(own.reply_path(1, client), {}, {}, time.monotonic() + 60)
        started = time.monotonic()
        shared_memory.put(own.reply_path(1, 2), {}, {}, started + 0.3)
        assert time.monotonic() - started >= 0.3
        assert len(list(own.arrived(1))) == 3
    finally:
        own.close()


def test_what_a_killed_process_left_is_deleted():
    ended = subprocess.Popen(["true"])
    ended.wait()
    root = SharedMemory.create()
    orphan = root.folder.parent / f"{scratch.EXCHANGE}{ended.pid}-x"
    orphan.mkdir()
    own = Path(root.folder)
    scratch.prune()
    assert not orphan.exists()
    assert own.exists()
    assert str(os.getpid()) in own.name
    root.close()


def test_a_reply_that_there_is_no_room_for_is_an_error_and_no_crash(monkeypatch):
    own = SharedMemory.create()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    try:
        with pytest.raises(OSError, match="No space left"):
            shared_memory.put(own.reply_path(1, 0), {"x": torch.zeros(3)}, {}, 0.0)
        assert not list(own.folder.iterdir())
    finally:
        own.close()
