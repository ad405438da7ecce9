"""The folder that processes of one machine share."""

import os
import subprocess
import time
from pathlib import Path

import torch

from d2ft_fl import exchange, wire
from d2ft_fl.exchange import Exchange


def test_a_model_goes_down_and_replies_come_up_through_files_that_are_used_again():
    own = Exchange.create()
    try:
        assert own.folder.stat().st_mode & 0o077 == 0
        weights = {"a": torch.randn(5, 3), "b": torch.tensor([-0.0])}
        first = own.publish(1, weights)
        read = exchange.read_model(first)
        second = own.publish(2, weights)
        assert not first.exists()
        assert torch.equal(read["a"], weights["a"])  # what was mapped stays
        for client in (4, 7, 4):
            path = own.reply_path(2, client)
            exchange.put(path, {"x": torch.full((3,), float(client))}, {"n": client}, 0.0)
            found = [(c, *wire.decode(p)) for c, p in own.arrived(2)]
            assert [(c, t["x"].tolist(), m) for c, t, m in found] == [
                (client, [client] * 3, {"n": client})
            ]
        assert len(list(own.folder.iterdir())) == 2  # the model, and one file for all replies
        assert second.exists()
    finally:
        own.close()
    assert not own.folder.exists()


def test_a_late_reply_is_of_no_round():
    own = Exchange.create()
    try:
        exchange.put(own.reply_path(1, 0), {}, {}, 0.0)
        assert list(own.arrived(2)) == []
        assert list(own.arrived(1)) == []
    finally:
        own.close()


def test_a_worker_waits_while_many_replies_wait(monkeypatch):
    monkeypatch.setattr(exchange, "WAITING", 2)
    own = Exchange.create()
    try:
        for client in range(2):
            exchange.put(own.reply_path(1, client), {}, {}, time.monotonic() + 60)
        started = time.monotonic()
        exchange.put(own.reply_path(1, 2), {}, {}, started + 0.3)
        assert time.monotonic() - started >= 0.3
        assert len(list(own.arrived(1))) == 3
    finally:
        own.close()


def test_what_a_killed_process_left_is_deleted():
    ended = subprocess.Popen(["true"])
    ended.wait()
    root = Exchange.create()
    orphan = root.folder.parent / f"{exchange.PREFIX}{ended.pid}-x"
    orphan.mkdir()
    own = Path(root.folder)
    exchange.prune()
    assert not orphan.exists()
    assert own.exists()
    assert str(os.getpid()) in own.name
    root.close()
