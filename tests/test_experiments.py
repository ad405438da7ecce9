"""The files of experiments/ are sweeps and configurations that can run."""

import importlib.util
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from d2ft_fl.budgets.device_classes import ASSETS, read_devices
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.preview.plan_preview import preview
from d2ft_fl.rounds.strategies import STRATEGIES
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.sweep import command
from d2ft_fl.sweep.reading import read_sweep
from d2ft_fl.sweep.remote import Outcome
from d2ft_fl.sweep.trials import expand
from d2ft_fl.util.toml import read_toml

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.rglob("*.toml"))
PAPERS = [f for f in FILES if f.parent.name == "papers" and not f.stem.endswith("_budgets")]
BUDGETS = [f for f in FILES if f.stem.endswith("_budgets") or f.parent.name == "budgets"]
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


def in_this_process(todo, ledger, scratch):
    """An engine of sweeps without Ray."""
    for trial in todo:
        ledger.started(trial.id)
        folder = scratch / trial.id
        summary = run_local(replace(trial.config, run_folder=str(folder)), report=False)
        left = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "checkpoints"]
        changes = {str(p.relative_to(folder)): (0, p.read_bytes()) for p in left}
        ledger.ended(trial.id, Outcome("finished"), summary["accuracy"], changes)


@pytest.mark.slow
def test_a_comparison_under_budgets_can_be_read_off(tmp_path, monkeypatch, capsys):
    """Two seeds of three settings on digits: differences by hand from the trials' summaries."""
    sweep = tmp_path / "small.toml"
    budgets = FOLDER / "accuracy" / "budgets"
    sweep.write_text(
        "seeds = 2\n[base]\nrounds = 2\nclients = 4\ntrain-examples = 120\ntest-examples = 60\n"
        f'[[group]]\nbase.strategy = "fedavg"\nbase.budgets = "{budgets / "none.toml"}"\n'
        f'[[group]]\nbase.budgets = "{budgets / "compute_60.toml"}"\n'
        'grid.strategy = ["d2ft", "fewer-examples"]\n'
    )
    folder = tmp_path / "out"
    assert command.sweep(sweep, output=folder, engine=in_this_process) == 0
    capsys.readouterr()
    compare = script("compare")
    pictures = [tmp_path / "p.png", tmp_path / "s.png"]
    options = ["--picture", str(pictures[0]), "--spent", str(pictures[1])]
    monkeypatch.setattr("sys.argv", ["compare", str(folder), *options])
    compare.main()
    said = capsys.readouterr().out
    found = {s.label: s for s in compare.settings([folder])}
    ours, theirs = found["d2ft"].accuracy, found["fewer-examples"].accuracy
    mean = sum(ours[seed] - theirs[seed] for seed in "01") / 2
    (line,) = (line for line in said.splitlines() if line.startswith("| fewer-examples"))
    assert f"{mean:+.1f} ±" in line
    assert "### compute_60" in said
    assert "Spearman's correlation" in said
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    spent = {name: found[name].measured("cum_flops") for name in ("d2ft", "fedavg")}
    assert len(spent["d2ft"]) == 2  # rounds
    assert spent["d2ft"][-1] / spent["fedavg"][-1] <= 0.6
    assert found["d2ft"].measured("accuracy")[-1] == pytest.approx(sum(ours.values()) / 200)
    assert found["d2ft"].beside(found["fedavg"]) == pytest.approx(sum(ours.values()) / 2)


def test_the_classifier_can_go_first():
    """Who cannot run everything forward does as d2ft has it."""
    config = RunConfig(strategy="experiments.accuracy.warm_up")
    first, second = preview(config, examples=64, rounds=2).rounds
    probes = [c for c in first.clients if c.operations["forward_only"] == 36]
    others = [c for c in first.clients if c not in probes]
    assert {c.device for c in others} == {"phone", "board"}
    assert all(c.operations["full"] > 0 for c in [*others, *second.clients])


@pytest.fixture
def rerun(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER / "accuracy")
    options = ["--output", str(tmp_path), "--set", "rounds=2"]
    monkeypatch.setattr("sys.argv", ["rerun", "cifar10", "--all", *options])
    return script("rerun")


@pytest.mark.parametrize("code,left", [(0, "finished"), (1, "failed"), (1, "waiting"), (130, "")])
def test_the_comparison_reruns_what_is_asked_for(rerun, tmp_path, monkeypatch, code, left):
    """Trials that failed do not keep it from comparing; being stopped does."""
    sweeps, compared = [], []

    def app(arguments, standalone_mode):
        sweeps.append(arguments)
        return code

    read = SimpleNamespace(read=lambda folder: SimpleNamespace(trials=[Mock(status=left)]))
    monkeypatch.setattr(rerun, "app", app)
    monkeypatch.setattr(rerun, "SweepFolder", read)
    monkeypatch.setattr(rerun.compare, "compare", lambda folders, *_: compared.append(folders))
    with pytest.raises(SystemExit) as ended:
        rerun.main()
    assert ended.value.code == code
    if left in ("waiting", ""):
        assert len(sweeps) == 1
        assert not compared
        return
    names = [["cifar10", "cifar10_all"], ["cifar10_batch16"], ["options"]]
    assert compared == [[tmp_path / name for name in some] for some in names]
    for name, arguments in zip(chain(*names), sweeps, strict=True):
        file = FOLDER / "accuracy" / f"{name}.toml"
        own = ["sweep", str(file), "--output", str(tmp_path / name), "--set", "rounds=2"]
        assert arguments == own
        assert expand(read_sweep(file))


def test_the_comparison_ends_as_a_sweep_does_that_cannot_begin(rerun, monkeypatch):
    monkeypatch.setattr(rerun, "HERE", FOLDER / "nowhere")
    with pytest.raises(SystemExit) as ended:
        rerun.main()
    assert ended.value.code == 2


def script(name):
    """A script of experiments/accuracy, as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / "accuracy" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_ablation_costs_nothing_without_what_is_skipped(quick, capsys, monkeypatch):
    config = quick(strategy="fedavg", rounds=3)
    summary = run_local(config, report=False)
    ablate = script("ablate")
    found = ablate.Ablation(Path(config.run_folder), 60)
    assert found.whole == pytest.approx(100 * summary["accuracy"])
    grid = found.arch.blocks, found.arch.heads
    assert found.lost(np.zeros(grid, dtype=bool)) == 0
    assert found.lost(np.ones(grid, dtype=bool)) > 10
    monkeypatch.setattr("sys.argv", ["ablate", config.run_folder, "--examples", "60"])
    ablate.main()
    assert capsys.readouterr().out.count("\n") == 1 + 2 + grid[0] + 3


def test_a_class_of_devices_alone_has_the_budgets_that_it_has_among_others():
    among = read_devices(ASSETS / "devices.toml")
    for name, own in among.classes.items():
        alone = read_devices(FOLDER / "accuracy" / "budgets" / f"alone_{name}.toml")
        assert alone.mix == among.mix
        assert alone.classes[name] == own
        others = [c for other, c in alone.classes.items() if other != name]
        assert all(c.budget.flops.value == 0 for c in others)
