"""What needs no Ray that runs; ``integration/test_sweep.py`` has one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import RunError
from d2ft_fl.rounds.components import Components
from d2ft_fl.sweep import engine
from d2ft_fl.sweep.folder import SweepFolder
from d2ft_fl.sweep.ledger import Ledger
from d2ft_fl.sweep.remote import METRIC, ROUND, Outcome
from d2ft_fl.sweep.spec import Asha, RunOptions
from d2ft_fl.sweep.trials import Trial
from tests.sweep.fake_trials import TRIALS
from tests.tasks.made_up import DISTANCE, Distance


@pytest.fixture
def ledger(tmp_path):
    """Two trials that ended before, at 20 % after round 1 and at 60 %."""
    trials = [replace(t, config=replace(t.config, rounds=8)) for t in TRIALS]
    ledger = Ledger(SweepFolder(tmp_path), trials)
    ledger.open()
    for trial, accuracy, status in zip(trials, (0.2, 0.6), ("stopped", "finished"), strict=False):
        ledger.started(trial.id)
        rows = [
            {"round": r, "accuracy": accuracy} for r in range(1, 2 if status == "stopped" else 9)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        ledger.progressed(trial.id, 1, accuracy, {"rounds.jsonl": (0, lines)})
        ledger.folder.write(trial.id, {"summary.json": (0, b"{}")})
        ledger.ended(trial.id, Outcome(status, "early" if status == "stopped" else ""))
    return ledger


def after(scheduler, id, round_number, metric):
    trial = SimpleNamespace(trial_id=id)
    if round_number == 1:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {ROUND: round_number, METRIC: metric})


def test_early_stopping_knows_the_trials_that_ended_before(ledger):
    """The first rung has seen 20 % and 60 %: with factor 2 the median, 40 %, has to be reached."""
    scheduler = engine._scheduler(Asha(1, 2.0), ledger)
    assert after(scheduler, "new", 1, 0.39) == "STOP"
    scheduler = engine._scheduler(Asha(1, 2.0), ledger)
    assert after(scheduler, "new", 1, 0.41) == "CONTINUE"
    assert after(scheduler, "new", 2, 0.59) == "STOP"  # that rung knows 60 % alone


def test_early_stopping_of_a_metric_that_is_minimised_stops_the_large(tmp_path, monkeypatch):
    """Of distances 2 and 6 after round 1, the better half is at most 4."""
    monkeypatch.setattr(Components, "task", Distance())
    trials = [replace(t, config=replace(t.config, rounds=8)) for t in TRIALS]
    ledger = Ledger(SweepFolder(tmp_path), trials)
    for trial, distance in zip(trials, (2.0, 6.0), strict=False):
        ledger.started(trial.id)
        row = {"round": 1, **DISTANCE.entries({"distance": distance, "within": 0.5})}
        lines = (json.dumps(row) + "\n").encode()
        ledger.ended(trial.id, Outcome("stopped"), distance, {"rounds.jsonl": (0, lines)})
    scheduler = engine._scheduler(Asha(1, 2.0), ledger)
    assert after(scheduler, "new", 1, 4.1) == "STOP"
    scheduler = engine._scheduler(Asha(1, 2.0), ledger)
    assert after(scheduler, "new", 1, 3.9) == "CONTINUE"


def test_early_stopping_without_others_stops_nobody(tmp_path):
    scheduler = engine._scheduler(Asha(1, 2.0), Ledger(SweepFolder(tmp_path), TRIALS))
    assert [after(scheduler, "a", r, 0.1) for r in (1, 2, 3)] == ["CONTINUE"] * 3


@pytest.fixture
def nodes(monkeypatch):
    def make(*resources):
        found = [{"Alive": True, "Resources": r} for r in resources]
        monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {}}])

    return make


def trial(**options):
    return Trial(RunConfig(**options), {})


def test_trials_need_a_core_for_each_thread_of_the_widest(nodes):
    nodes({"CPU": 2.0}, {"CPU": 4.0})
    assert engine._needs([trial()], 2) == [{"CPU": 1.0}]
    assert engine._needs([trial(), trial(threads_per_client=4)], 2) == [{"CPU": 4.0}] * 2


@pytest.mark.parametrize("at_once,share", [(1, 1.0), (2, 1.0), (3, 0.5), (8, 0.25), (0, 1.0)])
def test_trials_share_the_gpus_there_are(at_once, share, nodes):
    nodes({"CPU": 8.0, "GPU": 2.0})
    (need,) = engine._needs([trial(device="cuda")], at_once)
    assert need == {"CPU": 1.0, "GPU": share}


def test_a_trial_needs_its_cores_and_its_gpu_on_one_machine(nodes):
    nodes({"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0})
    (need,) = engine._needs([trial(device="cuda", threads_per_client=8)], 1)
    assert need == {"CPU": 8.0, "GPU": 1.0}
    with pytest.raises(RunError, match="no GPU on a machine with 16 cores for a trial"):
        engine._needs([trial(device="cuda", threads_per_client=16)], 1)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"threads_per_client": 3}, "threads-per-client = 3 is more than the 2 cores that Ray has"),
        ({"device": "cuda"}, "Ray has no GPU"),
    ],
)
def test_what_would_wait_forever_is_said_at_once(options, message, nodes):
    nodes({"CPU": 2.0}, {"CPU": 2.0})
    with pytest.raises(RunError, match=message):
        engine._needs([trial(**options)], 2)


def test_a_cluster_that_does_not_answer_is_said_at_once(tmp_path):
    options = RunOptions(address="127.0.0.1:1")
    ledger = Ledger(SweepFolder(tmp_path), TRIALS)
    with pytest.raises(RunError, match=r"cannot reach Ray at '127\.0\.0\.1:1': .*refused"):
        engine.TuneEngine(options)(TRIALS, ledger, tmp_path)


def test_machines_of_a_cluster_get_this_package_and_plug_ins(tmp_path, monkeypatch):
    for name in ("sent_one", "sent_two", "sent_three"):
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    todo = [
        trial(strategy="sent_one.best", tuning="sent_three.way"),
        trial(budgets="sent_two.more:budget"),
        trial(budgets="some.toml", strategy="scipy.linalg"),
    ]
    *plugins, package = engine._shipped(todo, tmp_path)
    assert {module.__name__ for module in plugins} == {"sent_one", "sent_two", "sent_three"}
    # Ray puts it into a folder of its own: what it needs has to be inside.
    found = "import d2ft_fl.strategies.fedrolex as m; print(m.__file__)"
    command = [sys.executable, "-P", "-c", found]
    env = os.environ | {"PYTHONPATH": str(Path(package).parent)}
    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert Path(printed.strip()) == tmp_path / "d2ft_fl" / "strategies" / "fedrolex.py"


def test_a_worker_that_breaks_off_does_so_for_a_reason_of_one_line():
    assert engine._reason("").endswith("no reason known")
    assert engine._reason("Failure # 1\n\nModuleNotFoundError: No module named 'timm'\n") == (
        "its worker broke off: ModuleNotFoundError: No module named 'timm'"
    )
    died = "The actor is dead because its worker process has died. Worker exit type: ...\n"
    assert "out of memory, or a crash" in engine._reason(died)
