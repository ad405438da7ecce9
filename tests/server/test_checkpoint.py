"""Checkpoints: what is saved comes back, what is damaged or foreign does not, and runs go on."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from d2ft_fl.aggregation.mean_compensation import MeanBook
from d2ft_fl.aggregation.server_optimizer import Moments
from d2ft_fl.budgets.budget import Budget
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.planning.importance import ScoreBook
from d2ft_fl.records.run_folder import (
    claim_folder,
    note_failure,
    only_one,
    read_rows,
    read_status,
    stands,
)
from d2ft_fl.report.run_folder import RunFolder
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.server import checkpoint, run
from d2ft_fl.server.checkpoint import Checkpoint
from d2ft_fl.server.recorder import Recorder

CLOCKS = ("wall_seconds", "plan_seconds", "clock", "training_seconds", "predicted_seconds")


def some_state(round_number=3):
    draw = np.random.default_rng(0)
    return State(
        round_number,
        {"a.weight": torch.randn(3, 2), "b": torch.tensor([-0.0, 1e-40])},
        ScoreBook({"fisher": np.array([[np.nan, 1.5]])}),
        MeanBook({(0, 1): torch.randn(2, 5)}, np.array([[True, False]])),
        np.array([[3, 0]], dtype=np.int64),
        {4: np.array([[True, False]]), 9: np.array([[True, True]])},
        {(-1, -1): "00ff", (0, -1): "aa", (0, 1): "bb"},
        {"aggregation_error": 0.25, "other": None},
        {
            "a.weight": Moments(torch.randn(3, 2), None),
            "b": Moments(torch.randn(2), torch.from_numpy(draw.random(2)).float()),
        },
    )


def some_reports():
    budget = Budget.from_mapping({"flops": "60 %", "memory": "3 GiB", "device": "phone"})
    return {4: Report(4, 17, budget), 7: Report(7, 1, Budget())}


def same(a, b):
    """Equal to the last bit, through everything that a state is made of."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, quick):
    config, own = quick(), Checkpoint(some_state(), some_reports())
    path = checkpoint.save(tmp_path, config, "origin", own)
    assert same(checkpoint.load(tmp_path, config, "origin"), own)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    first = Checkpoint(State(1, some_state().weights, last_trained=np.array([[1, 0]])), {})
    empty = tmp_path / "empty"
    empty.mkdir()
    checkpoint.save(empty, config, "origin", first)
    assert same(checkpoint.load(empty, config, "origin"), first)


def test_two_are_kept_and_a_damaged_one_gives_way_to_the_one_before(tmp_path, quick, caplog):
    config = quick()
    for round in (1, 2, 3):
        path = checkpoint.save(
            tmp_path, config, "origin", Checkpoint(some_state(round), some_reports())
        )
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "round-0002.safetensors", "round-0003.safetensors",
    ]  # fmt: skip
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], whole + b"x", _flipped(whole, -3)):
        path.write_bytes(damaged)
        caplog.clear()
        assert checkpoint.load(tmp_path, config, "origin").state.round == 2
        assert "round-0003.safetensors is not used: it is damaged" in caplog.text
    for other in path.parent.iterdir():
        other.write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"no checkpoint can be used: .*round-0003.*damaged"):
        checkpoint.load(tmp_path, config, "origin")


def _flipped(blob, place):
    changed = bytearray(blob)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "change, origin, said",
    [
        ({"seed": 1}, "origin", "of a run with seed = 0, not 1"),
        ({"lr": 0.1}, "origin", "of a run with lr = 0.0005, not 0.1"),
        ({}, "another", "of a run that began with other weights"),
    ],
)
def test_a_foreign_one_is_refused_with_the_reason(tmp_path, quick, change, origin, said):
    checkpoint.save(tmp_path, quick(), "origin", Checkpoint(some_state(), {}))
    with pytest.raises(ConfigError, match=said):
        checkpoint.load(tmp_path, quick(**change), origin)


def test_more_rounds_and_other_timeouts_are_no_other_run(tmp_path, quick):
    checkpoint.save(tmp_path, quick(), "origin", Checkpoint(some_state(), {}))
    config = quick(rounds=9, round_timeout=5.0, resume=str(tmp_path), transport="message")
    assert checkpoint.load(tmp_path, config, "origin").state.round == 3


def rows(folder):
    lines = Path(folder, "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]


def same_run(folder, reference):
    assert rows(folder) == rows(reference)
    ours, theirs = (
        safetensors.torch.load_file(Path(f) / "model.safetensors") for f in (folder, reference)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    clients = [Path(f, "clients.jsonl").read_text().count("\n") for f in (folder, reference)]
    assert clients[0] == clients[1]


MOMENTS = {
    "while it plans": (Recorder, "plan"),
    "while it folds": (run, "evaluate"),
    "before a checkpoint": (checkpoint, "save"),
    "while a checkpoint is written": (checkpoint, "put_in_place"),
}


class Left(Exception):
    """A run is left in the middle of something."""


def at_the_second(call, act):
    """The same function, which acts before it does anything for the second time."""
    calls = []

    def acting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            act()
        return call(*args, **kwargs)

    return acting


def leave(*_):
    raise Left


THREE = {"rounds": 3, "server_optimizer": "fedavgm"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A function that returns the folder of a run that nothing came in the way of."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def of(config):
        if not folder.exists():
            run_local(dataclasses.replace(config, run_folder=str(folder)))
        return str(folder)

    return of


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(moment, quick, whole_run, monkeypatch):
    """The process is gone at once: nothing is closed, flushed or tidied up."""
    config = quick(**THREE)
    reference = whole_run(config)
    where, name = MOMENTS[moment]
    if not (child := os.fork()):
        try:
            die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            monkeypatch.setattr(where, name, at_the_second(getattr(where, name), die))
            run_local(config)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    summary = run_local(dataclasses.replace(config, resume=config.run_folder))
    assert summary["rounds"] == 3
    same_run(config.run_folder, reference)


def changing(client, round_number):
    """A budget that is another one in every round."""
    return {"flops": f"{np.random.default_rng([client.client, round_number]).integers(60, 95)} %"}


def measured(client, round_number):
    """A budget that is as it is when it is asked for, whatever the round."""
    return {"flops": os.environ["D2FT_TEST_FLOPS"]}


def test_everything_that_a_state_is_made_of_goes_on(quick, tmp_path, monkeypatch):
    """LoRA, with what clients hold; compensation, scores, an agenda, budgets that change."""
    config = quick(
        tuning="lora", lora_aggregation="product", compensation=True, score_every=2, slots=2,
        coupling="agenda", budgets="tests.server.test_checkpoint:changing", rounds=4,
    )  # fmt: skip
    reference = dataclasses.replace(config, run_folder=str(tmp_path / "whole"))
    run_local(reference)
    monkeypatch.setattr(run, "evaluate", at_the_second(run.evaluate, leave))
    with pytest.raises(Left):
        run_local(config)
    run_local(dataclasses.replace(config, resume=config.run_folder))
    same_run(config.run_folder, reference.run_folder)


def test_a_round_that_was_left_has_the_budgets_that_it_was_planned_with(quick, monkeypatch):
    config = quick(budgets="tests.server.test_checkpoint:measured", rounds=3)
    monkeypatch.setenv("D2FT_TEST_FLOPS", "65 %")
    monkeypatch.setattr(run, "evaluate", at_the_second(run.evaluate, leave))
    with pytest.raises(Left):
        run_local(config)
    monkeypatch.setenv("D2FT_TEST_FLOPS", "95 %")
    run_local(dataclasses.replace(config, resume=config.run_folder))
    lines = Path(config.run_folder, "clients.jsonl").read_text().splitlines()
    allowed = {(r["round"], r["client"]): r["allowed"]["flops"] for r in map(json.loads, lines)}
    assert allowed[2, 0] == allowed[1, 0]
    assert allowed[3, 0] > allowed[2, 0]
    asked = Path(config.run_folder, "reports.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in asked] == [1, 2, 3]


def test_rounds_that_were_left_keep_budgets_whatever_is_there_by_now(quick, monkeypatch):
    """All that were recorded beyond the checkpoint, and though clients would refuse them today."""
    config = quick(budgets="tests.server.test_checkpoint:measured", rounds=4, checkpoint_every=2)
    monkeypatch.setenv("D2FT_TEST_FLOPS", "95 %")
    evaluations = iter([run.evaluate] * 3 + [leave])
    whole = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *a: next(evaluations)(*a))
    with pytest.raises(Left):
        run_local(config)  # in round 4
    monkeypatch.setattr(run, "evaluate", whole)
    monkeypatch.setenv("D2FT_TEST_FLOPS", "60 %")
    run_local(dataclasses.replace(config, resume=config.run_folder))
    lines = Path(config.run_folder, "clients.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert all(r["fault"] is None for r in found)
    allowed = {(r["round"], r["client"]): r["allowed"]["flops"] for r in found}
    assert allowed[1, 0] == allowed[3, 0] == allowed[4, 0]


def test_what_was_shared_in_memory_is_not_taken_for_held(quick):
    """Clients that came to their weights through memory have kept none of them."""
    config = quick(tuning="lora", strategy="fedavg", backward_score="magnitude",
                   forward_score="magnitude", rounds=1)  # fmt: skip
    run_local(config)
    more = dataclasses.replace(config, rounds=2, resume=config.run_folder, transport="message")
    assert run_local(more)["faults"] == 0


def test_a_refused_resumption_leaves_a_run_as_it_was(quick):
    config = quick(rounds=1)
    run_local(config)
    folder = Path(config.run_folder)
    other = dataclasses.replace(config, resume=config.run_folder, rounds=2, lr=0.1)
    with pytest.raises(ConfigError, match="it is of a run with lr"):
        run_local(other)
    note_failure(folder, "no checkpoint can be used")  # as the command does
    assert stands(read_status(folder)) == "finished"
    assert RunFolder.begun(folder).status == "finished"
    with pytest.raises(ConfigError, match="has finished all of rounds = 1"):
        run_local(dataclasses.replace(other, rounds=1, lr=config.lr))
    with only_one(folder), pytest.raises(RunError, match="another process is at work"):
        claim_folder(other)
    with only_one(folder):
        before = read_status(folder)
        note_failure(folder, "not mine")
        assert read_status(folder) == before


def test_a_run_that_never_began_has_failed(quick):
    config = quick()
    for _ in range(2):  # by the command, and by the process that carries it out
        folder = claim_folder(config)
    note_failure(folder, "no budget")
    assert stands(read_status(folder)) == "failed"
    assert read_status(folder)["reason"] == "no budget"


def test_a_run_without_checkpoints_keeps_its_record(quick):
    config = quick(rounds=2, checkpoint_every=0)
    run_local(config)
    with pytest.raises(ConfigError, match="has 2 rounds and no checkpoint"):
        run_local(dataclasses.replace(config, rounds=3, resume=config.run_folder))
    assert len(rows(config.run_folder)) == 2


def test_stages_are_those_of_the_run_that_began(quick):
    config = quick(strategy="slt", rounds=1)
    run_local(config)
    with pytest.raises(ConfigError, match="it is of a run with rounds = 1, not 2"):
        run_local(dataclasses.replace(config, rounds=2, resume=config.run_folder))


def test_a_resumed_run_tells_all_its_time_and_its_last_accuracy(quick):
    config = quick(rounds=2, eval_every=5)
    summary = run_local(config)
    assert summary["accuracy"] is not None
    config = dataclasses.replace(config, rounds=3, resume=config.run_folder)
    again = run_local(config)
    before = read_rows(Path(config.run_folder))[:2]
    assert again["wall_seconds"] > sum(row["wall_seconds"] for row in before)


def test_a_finished_run_is_not_resumed_but_with_more_rounds(quick, tmp_path):
    config = quick(rounds=1)
    run_local(config)
    again = dataclasses.replace(config, resume=config.run_folder)
    with pytest.raises(ConfigError, match="has finished all of rounds = 1; set more rounds"):
        run_local(again)
    more = dataclasses.replace(again, rounds=2)
    run_local(more)
    reference = dataclasses.replace(config, rounds=2, run_folder=str(tmp_path / "whole"))
    run_local(reference)
    same_run(config.run_folder, reference.run_folder)


def test_a_folder_without_a_run_cannot_be_resumed(quick, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: there is no config\.toml"):
        run_local(quick(resume=str(tmp_path), run_folder=""))
    with pytest.raises(ConfigError, match="leave run-folder empty"):
        run_local(quick(resume=str(tmp_path)))


def test_one_process_at_a_time(tmp_path):
    another = only_one(tmp_path)
    with only_one(tmp_path), pytest.raises(RunError, match="another process is at work"):
        another.__enter__()


def test_what_was_said_before_is_replayed_attempt_by_attempt(quick):
    config = quick(rounds=1)
    run_local(config)
    folder = Path(config.run_folder)
    said = [[[0, 30, {"flops": n}]] for n in (1, 2, 3)]
    lines = [(1, said[0]), (2, said[1]), (2, []), (2, said[2])]  # once nobody answered
    text = "".join(json.dumps({"round": r, "reports": own}) + "\n" for r, own in lines)
    folder.joinpath("reports.jsonl").write_text(text)
    components = Components(config)
    adapter = build_adapter(components.model_spec)
    recorder = Recorder(folder, Federation(components, adapter.describe()), adapter)
    recorder.resume(1)
    assert recorder.next_reports(1) is None  # it is over
    found = [recorder.next_reports(2) for _ in range(3)]
    assert [own and own[0].budget.flops.value for own in found] == [2, 3, None]


def test_a_forked_process_keeps_no_lock(tmp_path):
    # As one does that another thread has just started, before it runs its program.
    with only_one(tmp_path):
        if not (child := os.fork()):
            signal.pause()
    try:
        with only_one(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_twenty_runs_killed_at_random_moments_end_as_one_that_was_not(quick, tmp_path):
    options = {"rounds": 4, "clients": 3, "score_every": 2, "server_optimizer": "fedyogi",
               "server_lr": 0.01}  # fmt: skip
    reference = quick(**options, run_folder=str(tmp_path / "whole"))
    run_local(reference)  # which also loads what every run needs
    started = time.monotonic()
    again = quick(**options, run_folder=str(tmp_path / "again"))
    run_local(again)
    length = time.monotonic() - started
    same_run(again.run_folder, reference.run_folder)
    draw = np.random.default_rng(0)
    resumed = 0
    for number in range(20):
        config = quick(**options, run_folder=str(tmp_path / str(number)))
        killed = _run_and_kill(config, float(draw.uniform(0, length)))
        if not Path(config.run_folder, "config.toml").exists():
            assert killed  # before it had begun: there is nothing to resume
            run_local(config)
        elif killed:
            run_local(dataclasses.replace(config, resume=config.run_folder))
            resumed += 1
        same_run(config.run_folder, reference.run_folder)
    print(f"resumed {resumed} of 20")
    assert resumed >= 10


def _run_and_kill(config, seconds):
    """Run in a process of its own; whether it had to be killed after so many seconds."""
    if not (child := os.fork()):
        try:
            run_local(config)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL
