"""The figures of ``d2ft bench scale`` from rounds by hand; real runs of it are slow."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from d2ft_fl.bench import scale
from d2ft_fl.bench.scale import ScaleBench, Side, _parts, _policy, _ratios
from d2ft_fl.bench.scale_sides import Job, Trainer
from d2ft_fl.cli.main import app
from d2ft_fl.errors import ConfigError

BENCH = ScaleBench(10, 8, "vit_glyphs", 0, 8, 2, 1, workers=2)


def test_ratios_are_of_medians_and_none_without_a_side():
    found = {
        "floor": Side([4.0, 5.0, 9.0]),
        "full": Side([6.0, 5.0, 7.0], [{"train": 4.5}, {"train": 4.0}, {"train": 5.0}]),
    }
    ratios = _ratios(BENCH, found)
    assert ratios["floor_ratio"] == pytest.approx(6 / 5)
    assert ratios["overhead_ratio"] == pytest.approx(0.25)  # of 0.25, 0.2, 2 / 7
    assert ratios["milliseconds_beyond_training"] == pytest.approx(150.0)  # of 1.5, 1, 2 s
    for without_a_side in (
        "flower_fedavg_ratio", "full_flower_ratio", "own_ratio", "flop_ratio", "policy",
        "same_products_floor_ratio",
    ):  # fmt: skip
        assert ratios[without_a_side] is None


def test_d2ft_is_held_against_full_and_full_against_the_floor_of_its_products():
    policies = Counter({"8 of 8 examples, batch 8": 3, "6 of 8 examples, batch 6": 1})
    found = {
        "floor": Side([9.0]),
        "products": Side([4.0, 5.0, 5.0]),
        "full": Side([6.0, 5.0, 5.5], [{"train": 4.0}] * 3, flops=[100, 100, 100]),
        "d2ft": Side([3.0, 4.4, 5.0], flops=[50, 60, 61], policies=policies),
    }
    ratios = _ratios(BENCH, found)
    assert ratios["own_ratio"] == pytest.approx(4.4 / 5.5)
    assert ratios["flop_ratio"] == pytest.approx(0.6)
    assert ratios["same_products_floor_ratio"] == pytest.approx(5.5 / 5)
    assert ratios["policy"] == "8 of 8 examples, batch 8 (75% of client rounds)"
    assert Side(policies=Counter({"batch 8": 2})).policy == "batch 8"


def test_a_policy_says_examples_batch_micro_batches_and_bits():
    policy = {"batch": None, "micro_batches": 2, "bits_up": 8, "bits_down": None}
    said = _policy(BENCH, {"examples": 6, "policy": policy})
    assert said == "6 of 8 examples, batch 6, 2 micro-batches, 8 bits up"


def test_the_floor_with_the_projects_products_takes_the_floors_step():
    job = Job("vit_glyphs", 0, 1, 8, 8, 1, 1)
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    left = []
    for same_products in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(job, same_products)
        trainer.train([(images, torch.arange(8) % 10)])
        left.append([p.grad for p in trainer.trained])
    for theirs, ours in zip(*left, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_round_splits_into_what_it_was_spent_on():
    clock = {"ask": 0.1, "plan": 0.2, "broadcast": 0.3, "training": 4.0, "fold": 0.5}
    parts = _parts({"clock": clock, "wall_seconds": 3.0}, workers=2)
    assert parts == pytest.approx(
        {"plan": 0.3, "broadcast": 0.3, "train": 2.0, "evaluate": 0.0, "idle": 0.4, "fold": 0.5}
    )


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ConfigError, match="--clients 0 must be 1 or more"):
        ScaleBench(0, 8, "vit_glyphs", 0, 8, 2, 1).check()
    with pytest.raises(ConfigError, match="--side 'pfl' is unknown; use one of floor, products"):
        ScaleBench(2, 8, "vit_glyphs", 0, 8, 2, 1, ("pfl",)).check()


@pytest.mark.parametrize("seconds,runs", [(math.inf, 3), (0.0, 1)])
def test_every_side_runs_once_and_again_while_there_is_time(monkeypatch, seconds, runs):
    def run(bench, side):
        side.seconds.append(1.0)

    monkeypatch.setattr(scale, "_SIDES", {"floor": run, "products": run})
    bench = replace(BENCH, repeats=3, sides=("floor", "products"), seconds=seconds)
    done = []
    measured = scale.bench_scale(bench, done.append)["measured"]
    assert [len(side["rounds"]) for side in measured.values()] == [runs, runs]
    assert [line.split(",")[0] for line in done] == ["floor", "products"] * runs


@pytest.mark.slow
def test_all_sides_are_measured():
    ended = CliRunner().invoke(
        app,
        ["bench", "scale", "--clients", "4", "--examples", "8", "--model", "vit_glyphs",
         "--rounds", "1", "--repeats", "1", "--json"],
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout[ended.stdout.index("{") :])
    keys = ("floor_ratio", "overhead_ratio", "full_flower_ratio", "flower_fedavg_ratio",
            "own_ratio", "flop_ratio", "same_products_floor_ratio")  # fmt: skip
    assert all(found[key] > 0 for key in keys)
    assert "of 8 examples, batch" in found["policy"]
    assert list(found["measured"]) == ["floor", "products", "flower", "full", "d2ft"]
