"""A run of a task that is no classification, from its loss to its summary."""

import json
import math
from pathlib import Path

import pytest

from d2ft_fl.records.run_folder import read_rows
from d2ft_fl.report.run_folder import RunFolder
from d2ft_fl.rounds.checks import checked
from d2ft_fl.rounds.components import Components
from d2ft_fl.runtime.in_process import InProcessPool, run_local
from d2ft_fl.server import console as run_console
from d2ft_fl.server import run as run_module
from tests.tasks.made_up import Distance


def test_a_run_records_the_metrics_of_its_task(quick, monkeypatch, capsys):
    """The last of three rounds is evaluated, and every second: not the first."""
    monkeypatch.setattr(Components, "task", Distance())
    config = checked(quick(rounds=3, eval_every=2, trackers="tensorboard"))
    summary = run_local(config)
    folder = Path(config.run_folder)
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["metrics"]["distance"] is None for row in rows] == [True, False, False]
    assert all("accuracy" not in row for row in rows)
    assert all(row["distance"] == row["metrics"]["distance"] for row in rows)
    assert rows[2]["task"]["maximise"] is False
    assert 0 < rows[2]["within"] < 1
    distances = [row["distance"] for row in rows[1:]]
    assert summary["metrics"] == rows[2]["metrics"]
    assert summary["best"] == summary["best_distance"] == min(distances)
    assert RunFolder.read(folder).rounds["distance"].tolist()[1:] == distances
    run_console.summary(summary)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"distance {distances[-1]:.3f} (best {min(distances):.3f}) after 3 rounds" in said


def test_training_follows_the_loss_of_the_task(quick, monkeypatch, tmp_path):
    """Clients report the mean of the loss that they trained with."""

    class Nothing(Distance):
        def loss(self, outputs, batch):
            return 0.0 * outputs.logits.sum()

    losses = []
    for task in (Nothing(), Distance()):
        monkeypatch.setattr(Components, "task", task)
        config = quick(rounds=1, run_folder=str(tmp_path / task.__class__.__name__))
        run_local(checked(config), lambda row: losses.append(row["train_loss"]), report=False)
    assert losses[0] == 0 < losses[1]


@pytest.mark.parametrize("evaluated", [True, False])
def test_old_scripts_find_metrics_by_their_names_alone(quick, evaluated):
    config = checked(quick(rounds=1 if evaluated else 2, eval_every=2))
    rows = []
    summary = run_local(config, rows.append, report=False)
    assert (rows[0]["accuracy"] is None) is not evaluated
    assert summary["accuracy"] == summary["metrics"]["accuracy"] == summary["best_accuracy"]
    assert summary["loss"] == rows[-1]["loss"]
    assert rows[0]["utility"] > 0


def test_a_model_whose_loss_is_not_finite_leaves_json(quick, monkeypatch):
    """It is null in every file, and the page is written all the same."""
    losses = iter([math.nan, math.inf])

    def evaluate(*arguments):
        return {"accuracy": 0.5, "loss": next(losses)}

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    config = checked(quick())
    folder = Path(run_module.run(config, InProcessPool(config))["folder"])
    lines = [
        line
        for path in folder.glob("*.json*")
        for line in ([path.read_text()] if path.suffix == ".json" else path.open())
    ]
    read = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["loss"] for row in read_rows(folder)] == [None, None]
    assert [row["accuracy"] for row in read_rows(folder)] == [0.5, 0.5]
    assert len(read) > 5
    assert folder.joinpath("report.html").stat().st_size > 10_000
