"""Child processes: their faults cost one client, the rest of a round goes on."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.runtime.fork_server import SHARED, ForkServer
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.runtime.worker_pool import Job, WorkerPool
from d2ft_fl.server.dispatch import ClientFailure, RoundDispatch


def rows(folder):
    return [json.loads(x) for x in Path(folder, "rounds.jsonl").read_text().splitlines()]


def same_weights(folder, reference):
    ours, theirs = (
        safetensors.torch.load_file(Path(f) / "model.safetensors") for f in (folder, reference)
    )
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.fixture(scope="module")
def started():
    """A fork server for all tests that look at none of their own: it imports PyTorch once."""
    server = ForkServer.prepare()
    server.start()
    yield server
    server.close()


@pytest.fixture
def forks(started, monkeypatch):
    monkeypatch.setenv(SHARED, str(started.path))


@pytest.fixture
def faulty(quick, forks, tmp_path, monkeypatch):
    """A configuration whose clients fail as environment variables say."""
    asked = tmp_path / "asked"
    asked.mkdir()
    monkeypatch.setenv("D2FT_TEST_ASKED", str(asked))
    return lambda **changes: quick(budgets="tests.faulty:budget", clients=5, **changes)


@pytest.mark.parametrize(
    "transport,more",
    [
        ("shared", {"strategy": "d2ft-paper"}),
        ("shared", {"upload_bits": 4, "download_bits": 8}),
        pytest.param("message", {}, marks=pytest.mark.slow),
    ],
)
def test_processes_give_the_result_of_one(quick, forks, tmp_path, transport, more):
    """In shared memory, where weights are coded as they are taken, as in messages."""
    config = quick(slots=2, compensation=True, score_every=3, transport=transport, **more)
    run_local(config, workers=2)
    reference = replace(config, run_folder=str(tmp_path / "one"), transport="message")
    run_local(reference)
    assert same_weights(config.run_folder, reference.run_folder)
    clocks = ("wall_seconds", "plan_seconds", "clock")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in clocks} for row in rows(c.run_folder)]
        for c in (config, reference)
    )
    assert ours == theirs


@pytest.mark.parametrize("transport", ["shared", pytest.param("message", marks=pytest.mark.slow)])
def test_who_raises_hangs_or_dies_is_left_out_and_the_rest_go_on(faulty, monkeypatch, transport):
    for client, how in ((0, "raise"), (2, "hang"), (3, "die")):
        monkeypatch.setenv(f"D2FT_TEST_1_{client}", how)
    config = faulty(client_timeout=6.0, transport=transport)
    before = set(psutil.Process().children(recursive=True))
    summary = run_local(config, workers=2)
    first, second = rows(config.run_folder)
    assert first["faults"] == [
        "client 0: ConfigError: budgets = 'tests.faulty:budget' raised RuntimeError: no battery "
        "for client 0 in round 1",
        "client 2: took longer than 6 s",
        "client 3: its process ended (signal SIGKILL)",
    ]
    assert first["worked"] == 2
    assert second["faults"] == []
    assert summary["faults"] == 3
    assert set(psutil.Process().children(recursive=True)) == before


def test_messages_larger_than_a_connection_holds_do_not_lock(quick, forks):
    """Models and replies of 2.7 MB, and more clients than can be sent ahead."""
    config = quick(transport="message", clients=8, rounds=1, strategy="fedavg", round_timeout=60.0)
    summary = run_local(config, workers=2)
    assert (summary["faults"], summary["client_rounds"]) == (0, 8)


@pytest.mark.slow
def test_a_round_ends_at_its_deadline(faulty, monkeypatch):
    monkeypatch.setenv("D2FT_TEST_1_1", "hang")
    started = time.monotonic()
    run_local(faulty(round_timeout=20.0, rounds=1), workers=2)
    assert 20 < time.monotonic() - started < 60


def test_too_few_replies_stop_a_run_which_can_be_resumed(faulty, monkeypatch):
    monkeypatch.setenv("D2FT_TEST_2_1", "raise")
    config = faulty(min_replies=5)
    with pytest.raises(RunError, match=r"4 of 5 clients answered in round 2, min-replies = 5; the"):
        run_local(config)
    assert len(rows(config.run_folder)) == 1
    monkeypatch.delenv("D2FT_TEST_2_1")
    assert run_local(replace(config, resume=config.run_folder))["rounds"] == 2


def test_too_few_replies_repeat_a_round(faulty, monkeypatch, caplog):
    monkeypatch.setenv("D2FT_TEST_2_1", "raise")
    config = faulty(min_replies=5, few_replies="repeat")
    with pytest.raises(RunError, match="4 of 5"):
        run_local(config)
    assert caplog.text.count("the round is repeated") == 2  # three attempts
    assert [row["round"] for row in rows(config.run_folder)] == [1]


def test_a_configuration_that_a_child_cannot_use_is_said(quick, forks):
    worker_pool = WorkerPool(quick().to_mapping() | {"tuning": "gone.module"}, 1)
    with worker_pool, pytest.raises(ConfigError, match=r"gone\.module"):
        list(worker_pool.work([Job(1, 0, b"")], 60.0))


def test_workers_that_were_started_ahead_are_those_that_answer(quick):
    options = quick(clients=3).to_mapping()
    others = set(psutil.Process().children())
    with WorkerPool(options, 2) as pool:
        pool.start(1)
        pool.start(3)
        pool.start(3)
        assert [client for client, *_ in pool.reports([0, 2], 1, 60.0)] == [0, 2]
        (fork_server,) = set(psutil.Process().children()) - others
        started = {p.pid for p in fork_server.children()}
        assert len(started) == 2
        assert [client for client, *_ in pool.reports([1], 1, 60.0)] == [1]
        assert {p.pid for p in fork_server.children()} == started


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"


def test_a_child_ends_with_its_parent(quick):
    reader, writer = os.pipe()
    if not (parent := os.fork()):
        try:
            worker_pool = WorkerPool(quick().to_mapping(), 1)
            worker_pool.reports([0], 1, 60.0)
            (fork_server,) = psutil.Process().children()
            (worker,) = fork_server.children()
            os.write(writer, f"{fork_server.pid} {worker.pid}".encode())
        finally:
            os._exit(0)  # nothing is closed in order
    os.waitpid(parent, 0)
    orphans = list(map(int, os.read(reader, 40).split()))
    for _ in range(100):
        if not any(map(runs, orphans)):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a child is still there")


def test_what_nobody_began_before_the_deadline_is_said(quick):
    with WorkerPool(quick().to_mapping(), 1) as worker_pool:
        found = dict(worker_pool.work([Job(1, 0, b""), Job(1, 1, b"")], 0.5))
    assert found == {c: ClientFailure("not begun before the round's deadline") for c in (0, 1)}


def test_shares_cost_about_the_same_and_start_with_the_longest():
    work = RoundDispatch(1, {0: 7, 1: 5, 2: 4, 3: 4, 4: 0}, {}, lambda client, shared: b"")
    assert work.longest_first == [0, 1, 2, 3, 4]
    assert work.shares(2) == [[0, 3], [1, 2, 4]]
    assert work.shares(9) == [[0], [1], [2], [3], [4]]
