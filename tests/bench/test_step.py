"""The benchmark of a training step: what it measures, and its command."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from d2ft_fl.bench import step_schedules
from d2ft_fl.bench.step import saved_bytes
from d2ft_fl.cli.main import app
from d2ft_fl.subnets.schedule import Operation
from tests.conftest import build

KEYS = {
    "schedule",
    "flop_ratio",
    "time_ratio",
    "batch_size",
    "own_flop_ratio",
    "own_time_ratio",
    "activation_ratio",
    "predicted_activation_ratio",
    "peak_memory_ratio",
}
SMALL = [
    "bench", "step", "--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch-size", "4",
    "--threads", "1", "--pairs", "1",
]  # fmt: skip


def test_a_batch_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("d2ft_fl.bench.step.free_memory", lambda device: 10**6)
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code == 2
    assert "--batch-size 4 takes about" in result.stderr
    assert "of which 1 MB are free" in result.stderr


def test_counting_what_is_saved_keeps_nothing():
    """A node of autograd that keeps its result, as that of exp, must not keep itself for good."""
    made = []

    def forward():
        result = torch.ones(3, requires_grad=True).exp()
        made.append(weakref.ref(result))
        return result.sum()

    assert saved_bytes(forward, []) == 3 * 4
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("slots", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_are_a_contract_and_predictions_hold(slots, tmp_path):
    picture = tmp_path / "step.png"
    command = [*SMALL, "--slots", str(slots), "--json", "--output", str(picture)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert all(row.keys() >= KEYS for row in rows)
    assert picture.stat().st_size > 10_000
    for row in rows:
        assert row["flops_as_predicted"], row["schedule"]
        assert row["predicted_activation_ratio"] == pytest.approx(row["activation_ratio"], rel=0.02)
        assert row["predicted_peak_memory_ratio"] == pytest.approx(
            row["peak_memory_ratio"], rel=0.1
        )
        assert row["peak_memory_ratio"] <= row["predicted_peak_memory_ratio"]
    by_name = {row["schedule"]: row for row in rows}
    assert by_name["all FULL"]["flop_ratio"] == by_name["all FULL"]["own_flop_ratio"] == 1.0
    assert all(row["flop_ratio"] == row["own_flop_ratio"] for row in rows)
    assert {row["batch_size"] for row in rows} == {4}
    assert by_name["all FULL"]["activation_ratio"] == pytest.approx(1.0, rel=0.01)
    for name, row in by_name.items():
        if name.endswith("SHORTCUT") and row["slots"] == 1:
            share = {"3/5": 0.6, "1/2": 0.5, "1/4": 0.25}[name[:3]]
            assert row["activation_ratio"] <= 0.27 + 0.75 * share


@pytest.mark.parametrize("slots", [1, 5])
def test_mixtures_have_the_shares_they_say(slots):
    _, arch = build(depth=5, num_heads=4)
    schedule = step_schedules.mixture(arch, slots, {Operation.FULL: 0.4, Operation.FROZEN: 0.2})
    shares = {op: float((schedule.operations == op).mean()) for op in Operation}
    assert shares[Operation.FULL] == pytest.approx(0.4, abs=0.03)
    assert shares[Operation.FROZEN] == pytest.approx(0.2, abs=0.03)
    assert np.ptp((schedule.operations == Operation.FULL).sum(axis=2)) <= 1  # evenly over blocks


@pytest.mark.parametrize(
    "options,message",
    [
        (["--batch-size", "0"], "--batch-size 0 must be 1 or more"),
        (["--slots", "9", "--batch-size", "8"], "--slots 9 is more than --batch-size 8"),
        (["--model", "resnet18"], "model 'resnet18' is not supported"),
        (["--output", "step.txt"], "must end in .png, .svg, .pdf"),
        (["--output", "/nowhere/step.png"], "there is no folder '/nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options, message):
    result = CliRunner().invoke(app, ["bench", "step", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_command_shows_a_table():
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code == 0, result.output
    assert "all FULL" in result.stdout
    assert "FLOPs as predicted, exactly" in result.stdout
