"""The files of experiments/ are sweeps and configurations that can run."""

from pathlib import Path

import pytest

from d2ft_fl.config import RunConfig, read_toml
from d2ft_fl.devices import read_devices
from d2ft_fl.methods import STRATEGIES
from d2ft_fl.sweep.reading import read_sweep
from d2ft_fl.sweep.trials import expand

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.rglob("*.toml"))
PAPERS = [f for f in FILES if f.parent.name == "papers" and not f.stem.endswith("_budgets")]
BUDGETS = [f for f in FILES if f.stem.endswith("_budgets")]
CONFIGS = [FOLDER / "default.toml", FOLDER / "cifar10_vit_tiny.toml"]
SWEEPS = [f for f in FILES if f not in BUDGETS + CONFIGS]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_trial_of_an_experiment_can_run(path):
    trials = expand(read_sweep(path))
    assert trials
    assert [t.refused for t in trials if t.refused] == []
    assert len({t.config.seed for t in trials}) >= 3 or path.stem == "sweep_example"


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_papers_come_at_both_scales(path):
    stem = path.stem.removesuffix("_small")
    small, whole = (path.with_name(f"{stem}{end}.toml") for end in ("_small", ""))
    readme = FOLDER.joinpath("README.md").read_text()
    assert f"papers/{stem}" in readme
    few = [t.config for t in expand(read_sweep(small))]
    many = [t.config for t in expand(read_sweep(whole))]
    assert {c.dataset for c in few} == {"digits"}
    labels = {"hub:uoft-cs/cifar10": "label", "hub:uoft-cs/cifar100": "fine_label"}
    assert all(c.label_column == labels[c.dataset] for c in many)
    assert {c.strategy for c in few} >= {c.strategy for c in many}


@pytest.mark.parametrize("path", BUDGETS, ids=lambda p: p.stem)
def test_budgets_can_be_read(path):
    assert read_devices(path).classes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_can_be_read(path):
    RunConfig.from_mapping(read_toml(path))


def test_all_strategies_that_keep_a_budget_of_compute_are_compared():
    trials = expand(read_sweep(FOLDER / "methods_digits.toml"))
    compared = {t.config.strategy for t in trials}
    assert compared == set(STRATEGIES) - {"accumulate"}
    assert {t.config.match_share for t in trials if t.config.match} == {0.6, 0.4, 0.25}
