"""The figures of ``d2ft bench scale`` from rounds by hand; real runs of it are slow."""

import json

import pytest
from typer.testing import CliRunner

from d2ft_fl.bench.scale import ScaleBench, Side, _parts, _ratios
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
    assert ratios["flower_fedavg_ratio"] is None
    assert ratios["full_flower_ratio"] is None


def test_a_round_splits_into_what_it_was_spent_on():
    clock = {"ask": 0.1, "plan": 0.2, "broadcast": 0.3, "training": 4.0, "fold": 0.5}
    parts = _parts({"clock": clock, "wall_seconds": 3.0}, workers=2)
    assert parts == pytest.approx(
        {"plan": 0.3, "broadcast": 0.3, "train": 2.0, "evaluate": 0.0, "idle": 0.4, "fold": 0.5}
    )


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ConfigError, match="--clients 0 must be 1 or more"):
        ScaleBench(0, 8, "vit_glyphs", 0, 8, 2, 1).check()
    with pytest.raises(ConfigError, match="--side 'pfl' is unknown; use some of floor, flower"):
        ScaleBench(2, 8, "vit_glyphs", 0, 8, 2, 1, ("pfl",)).check()


@pytest.mark.slow
def test_all_sides_are_measured():
    ended = CliRunner().invoke(
        app,
        ["bench", "scale", "--clients", "4", "--examples", "8", "--model", "vit_glyphs",
         "--rounds", "1", "--repeats", "1", "--json"],
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout[ended.stdout.index("{") :])
    keys = ("floor_ratio", "overhead_ratio", "full_flower_ratio", "flower_fedavg_ratio")
    assert all(found[key] > 0 for key in keys)
    assert list(found["measured"]) == ["floor", "flower", "full", "d2ft"]
