import json
from dataclasses import replace

import pytest

from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.sweep.folder import SweepFolder
from d2ft_fl.sweep.remote import Files, Outcome, run_trial
from d2ft_fl.sweep.trials import Trial

CLOCKS = ("wall_seconds", "plan_seconds", "clock", "training_seconds", "predicted_seconds")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "run"
    folder.joinpath("plans").mkdir(parents=True)
    return Files(folder)


def test_lines_are_sent_once_and_other_files_whole_when_they_change(files):
    log, picture = files.folder / "rounds.jsonl", files.folder / "plan.png"
    log.write_text("one\n")
    picture.write_bytes(b"12")
    assert files.changes() == {"plan.png": (0, b"12"), "rounds.jsonl": (0, b"one\n")}
    assert files.changes() == {}
    with log.open("a") as file:
        file.write("two\n")
    picture.write_bytes(b"3456")
    assert files.changes() == {"plan.png": (0, b"3456"), "rounds.jsonl": (4, b"two\n")}


@pytest.mark.parametrize("keep", [False, True])
def test_models_are_sent_at_the_end_and_only_if_wanted(files, keep):
    files.models = keep
    models = ("model.safetensors", "model.json", "deep/adapter.safetensors")
    for name in (*models, "plans/round-001.safetensors", "status.json", "config.toml"):
        path = files.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert set(files.changes()) == {"plans/round-001.safetensors"}
    assert set(files.changes(end=True)) == (set(models) if keep else set())


def test_what_is_sent_makes_the_folder_of_an_ordinary_run(quick, tmp_path):
    """From a folder that the sweep never sees: the rounds are those of ``d2ft run``."""
    config = quick(run_folder="", strategy="random", checkpoint_every=0)
    reference = tmp_path / "reference"
    run_local(replace(config, run_folder=str(reference)), report=False)

    sweep, trial = SweepFolder(tmp_path / "sweep"), Trial(config, {})
    sweep.path.mkdir()
    sweep.begin(trial)
    there = Files(tmp_path / "there")
    outcome = run_trial(
        replace(config, run_folder=str(there.folder)),
        lambda row: sweep.write(trial.id, there.changes()),
    )
    sweep.write(trial.id, there.changes(end=True))
    sweep.end(trial, outcome)
    here = sweep.trial(trial.id)

    def rows(folder, name):
        lines = folder.joinpath(name).read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]

    assert outcome.status == "finished"
    for name in ("rounds.jsonl", "clients.jsonl"):
        assert rows(here, name) == rows(reference, name)
    names = {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
    wanted = {p.relative_to(reference).as_posix() for p in reference.rglob("*") if p.is_file()}
    assert names == wanted - {"model.safetensors", "model.json"}
    assert json.loads((here / "summary.json").read_text())["folder"] == str(here)


def test_a_configuration_that_cannot_run_is_refused(quick):
    outcome = run_trial(quick(clients=500), lambda row: None)
    assert outcome.status == "refused"
    assert outcome.reason.startswith("clients = 500 is more than the 120 training examples")
    assert outcome.traceback == ""


def test_a_run_that_breaks_has_failed_for_a_reason_of_one_line(quick, monkeypatch):
    def broken(config, progress, report):
        raise ZeroDivisionError("no clients\nleft")

    monkeypatch.setattr("d2ft_fl.runtime.in_process.run_local", broken)
    outcome = run_trial(quick(), lambda row: None)
    assert (outcome.status, outcome.reason) == ("failed", "ZeroDivisionError: no clients")
    assert "Traceback" in outcome.traceback


def test_a_run_without_a_client_that_works_has_failed_as_it_says(quick, tmp_path):
    budgets = tmp_path / "poor.toml"
    budgets.write_text('[classes.poor]\nmemory = "1 kB"')
    outcome = run_trial(quick(budgets=str(budgets)), lambda row: None)
    assert outcome.status == "failed"
    assert outcome.reason.startswith("every client sits out round 1")


def test_a_stop_from_outside_is_no_failure(quick):
    """Tune stops a trial by leaving its thread."""

    def stop(row):
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        run_trial(quick(), stop)
    assert Outcome("finished").reason == ""
