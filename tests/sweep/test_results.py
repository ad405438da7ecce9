import csv
import json
import math

import pandas as pd
import pytest

from d2ft_fl.sweep.folder import SweepFolder
from d2ft_fl.sweep.ledger import Ledger
from d2ft_fl.sweep.remote import Outcome
from d2ft_fl.sweep.results import by_setting, trial_rows, write_tables
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.metrics import MetricSpec
from tests.sweep.fake_trials import TRIALS, FakeEngine
from tests.tasks.made_up import DISTANCE

ACCURACY = MetricSpec.of(ImageClassification())


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(SweepFolder(tmp_path), TRIALS)
    todo = ledger.open()
    FakeEngine()(todo[:2], ledger, tmp_path)
    ledger.started(todo[2].id)
    rows = [
        {"round": number, "accuracy": accuracy, "loss": 1.0, "wall_seconds": 2.5}
        for number, accuracy in ((1, 0.3), (2, 0.2))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    ledger.progressed(todo[2].id, 2, 0.2, {"rounds.jsonl": (0, lines)})
    ledger.stopped(todo[2].id, 2, 5.0)
    ledger.started(todo[3].id)
    ledger.ended(todo[3].id, Outcome("failed", "OSError: no disk"))
    return ledger


def rows_of(ledger):
    return trial_rows(ledger.folder, ledger.trials, ledger.states)


def test_a_row_has_settings_first_and_then_the_figures_of_the_summary(ledger):
    first, _, stopped, failed = rows_of(ledger)
    assert list(first)[:5] == ["trial", "status", "reason", "lr", "seed"]
    assert first["accuracy"] == pytest.approx(0.1)
    assert (first["flops_used"], first["bytes_up_share"]) == (6e6, 0.6)
    assert "folder" not in first
    assert stopped["status"] == "stopped"
    assert (stopped["rounds"], stopped["accuracy"], stopped["best_accuracy"]) == (2, 0.2, 0.3)
    assert stopped["wall_seconds"] == 5.0
    assert list(failed) == ["trial", "status", "reason", "lr", "seed"]


def test_both_files_hold_a_row_a_trial(ledger, tmp_path):
    rows = rows_of(ledger)
    write_tables(tmp_path, rows)
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert list(table["trial"]) == [row["trial"] for row in rows]
    assert list(table["accuracy"])[:3] == pytest.approx([0.1, 0.2, 0.2])
    assert math.isnan(table["accuracy"][3])
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines[3]["reason"] == "OSError: no disk"
    assert list(lines[0]) == list(table.columns)


def test_a_setting_is_the_mean_over_seeds_that_finished():
    def row(lr, seed, accuracy, status="finished"):
        figures = {"flops_share": 0.5, "bytes_up_used": 1e6, "bytes_down_used": 3e6}
        return {"lr": lr, "seed": seed, "status": status, "accuracy": accuracy, "wall_seconds": 4.0,
                **figures}  # fmt: skip

    found = by_setting(
        [row(1, 0, 0.7), row(2, 0, 0.9), row(1, 1, 0.8), row(1, 2, 0.1, "stopped"),
         row(3, 0, 0.2, "stopped")],
        ["lr", "seed"],
        ACCURACY,
    )  # fmt: skip
    assert [s.settings for s in found] == [{"lr": 2}, {"lr": 1}, {"lr": 3}]
    assert [(s.finished, s.trials) for s in found] == [(1, 1), (2, 3), (0, 1)]
    assert found[0].deviation is None
    assert found[1].mean == pytest.approx(0.75)
    assert found[1].deviation == pytest.approx(math.sqrt(2 * 0.05**2))
    assert (found[1].flops_share, found[1].megabytes, found[1].seconds) == (0.5, 4.0, 4.0)
    assert found[2].mean is None


def test_settings_of_a_metric_that_is_minimised_begin_with_the_least():
    figures = {"flops_share": 0.5, "bytes_up_used": 1e6, "bytes_down_used": 3e6}
    rows = [
        {"lr": lr, "status": "finished", "distance": distance, "wall_seconds": 4.0, **figures}
        for lr, distance in ((1, 3.0), (2, 1.0), (3, 2.0))
    ]
    found = by_setting(rows, ["lr"], DISTANCE)
    assert [(s.settings["lr"], s.mean) for s in found] == [(2, 1), (3, 2), (1, 3)]
    assert found[0].to_json(DISTANCE)["distance"] == 1


def test_a_trial_that_was_stopped_early_has_its_own_metrics(tmp_path):
    ledger = Ledger(SweepFolder(tmp_path), TRIALS[:1])
    (trial,) = ledger.open()
    ledger.started(trial.id)
    rows = [
        {"round": number, "wall_seconds": 1.0, **DISTANCE.entries({"distance": d, "within": 0.5})}
        for number, d in ((1, 2.0), (2, 3.0))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    ledger.progressed(trial.id, 2, 3.0, {"rounds.jsonl": (0, lines)})
    ledger.stopped(trial.id, 2, 2.0)
    (row,) = rows_of(ledger)
    assert (row["distance"], row["best_distance"], row["best"]) == (3, 2, 2)
    assert row["within"] == 0.5
    assert "metrics" not in row


def test_a_sweep_of_nothing_but_seeds_is_one_setting():
    assert [
        s.settings for s in by_setting([{"seed": 0, "status": "failed"}], ["seed"], ACCURACY)
    ] == [{}]
