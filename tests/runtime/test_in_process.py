"""Whole runs in this process."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from d2ft_fl.client import trainer
from d2ft_fl.costs.flops import BranchFlops
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.costs.round_flops import RoundFlops
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.records.run_folder import claim_folder
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime.in_process import run_local


def rows(folder, name="rounds.jsonl"):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("strategy", ["d2ft", "random"])
def test_a_run_keeps_every_budget_and_leaves_its_folder(quick, strategy):
    config = quick(strategy=strategy, verify_costs=True)
    summary = run_local(checked(config))
    assert summary["violations"] == 0
    assert summary["faults"] == 0
    assert summary["flops_as_predicted"] == summary["client_rounds"] == 8
    folder = Path(config.run_folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.toml", "rounds.jsonl", "clients.jsonl", "plans", "plan.png",
        "model.safetensors", "model.json", "summary.json", "status.json",
        "versions.json", "data.json", "report.html", "checkpoints",
    }  # fmt: skip
    for row in rows(folder):
        assert {"round", "accuracy", "loss", "flops", "memory", "bytes_up", "bytes_down"} <= set(
            row
        )
        for resource in RESOURCES:
            assert 0 < row[resource]["worst"] <= 1
    plans = safetensors.torch.load_file(folder / "plans" / "round-002.safetensors")
    assert plans["schedules"].shape == (4, 1, 6, 6)
    model = timm.create_model(**json.loads((folder / "model.json").read_text()))
    model.load_state_dict(weights(folder))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(quick, tmp_path):
    results = []
    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        trainer.client_trainer.cache_clear()
        config = quick(seed=seed, run_folder=str(tmp_path / name))
        run_local(config)
        results.append(weights(config.run_folder))
    assert all(torch.equal(results[1][n], t) for n, t in results[0].items())
    assert not torch.equal(results[2]["head.weight"], results[0]["head.weight"])


def test_fedavg_reports_what_it_uses_beyond_budgets(quick):
    summary = run_local(quick(strategy="fedavg"))
    assert summary["violations"] > 0
    assert not summary["keeps_budgets"]
    assert summary["resources"]["flops"]["share"] == pytest.approx(1.0)


def test_a_planted_wrong_formula_shows_up_as_violations(quick, monkeypatch):
    """What clients report as used does not come from the cost model."""
    right = RoundFlops.by_branch.func

    def half(self):
        whole = right(self)
        return BranchFlops(whole.base // 2, whole.near // 2, whole.far // 2)

    broken = property(half)
    reference = run_local(quick(rounds=1))
    assert reference["violations"] == 0
    full = {c["client"]: c["allowed"] for c in rows(reference["folder"], "clients.jsonl")}
    monkeypatch.setattr(RoundFlops, "by_branch", broken)
    budgets = {c: allowed["flops"] for c, allowed in full.items()}
    monkeypatch.setattr(
        "d2ft_fl.budgets.device_classes.DeviceClasses.__call__",
        lambda self, client, round_number: _only_flops(budgets[client.client]),
    )
    trainer.client_trainer.cache_clear()
    summary = run_local(quick(rounds=1, run_folder=quick().run_folder + "-2"))
    assert summary["violations"] > 0
    assert summary["flops_as_predicted"] == 0


def _only_flops(flops):
    from d2ft_fl.budgets.budget import Amount, Budget

    return Budget(flops=Amount(flops))


BUDGETS = """
mix = ["rich", "broke", "rich", "rich"]
[classes.rich]
flops = "70 %"
[classes.broke]
memory = "1 kB"
"""


def test_a_client_whose_budget_affords_nothing_sits_out_and_is_counted(quick, tmp_path):
    file = tmp_path / "budgets.toml"
    file.write_text(BUDGETS)
    config = quick(budgets=str(file))
    summary = run_local(config)
    assert summary["sat_out"] == 2
    assert summary["faults"] == summary["violations"] == 0
    assert [c["sat_out"] for c in rows(config.run_folder, "clients.jsonl")][:4] == [
        False, True, False, False,
    ]  # fmt: skip


def test_when_everyone_sits_out_the_run_stops_with_one_line(quick, tmp_path):
    file = tmp_path / "budgets.toml"
    file.write_text("[classes.broke]\nflops = '0 %'")
    with pytest.raises(RunError, match="every client sits out round 1") as error:
        run_local(quick(budgets=str(file)))
    assert "\n" not in str(error.value)


def test_a_later_round_in_which_everyone_sits_out_is_an_empty_round(quick, tmp_path, monkeypatch):
    tmp_path.joinpath("pausing.py").write_text(
        "def budget(client, round):\n    return {'flops': '0 %' if round == 2 else '60 %'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = checked(quick(budgets="pausing:budget", rounds=3))
    summary = run_local(config)
    worked = [row["worked"] for row in rows(config.run_folder)]
    assert worked == [4, 0, 4]
    assert summary["sat_out"] == 4
    first, second, _ = rows(config.run_folder)
    assert second["accuracy"] == first["accuracy"]


def test_a_run_folder_is_one_runs_own(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folders = {claim_folder(quick(run_folder="")) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_relative_to(tmp_path / "data") for folder in folders)
    config = quick()
    run_local(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        run_local(config)
    tmp_path.joinpath("file").touch()
    with pytest.raises(ConfigError, match="cannot be written to"):
        claim_folder(quick(run_folder=str(tmp_path / "file" / "run")))


def test_a_client_can_change_its_budget_between_rounds(quick, tmp_path, monkeypatch):
    tmp_path.joinpath("fading.py").write_text(
        "def battery(client, round):\n    return {'flops': f'{90 - 30 * round} %'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = checked(quick(budgets="fading:battery"))
    run_local(config)
    used = [
        row["flops"]["used_mean"] / row["flops"]["full_mean"] for row in rows(config.run_folder)
    ]
    assert 0.5 < used[0] <= 0.6
    assert 0.2 < used[1] <= 0.3


def test_a_strategy_of_ones_own(quick, tmp_path, monkeypatch):
    package = tmp_path / "mine"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath("last_blocks.py").write_text(
        "import numpy as np\n"
        "SCORES = ()\n"
        "def schedule(round):\n"
        "    depth = np.arange(round.shape[0])[:, None] * np.ones(round.shape)\n"
        "    return round.plan(1 + depth, np.ones(round.shape))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    summary = run_local(checked(quick(strategy="mine.last_blocks")))
    assert summary["violations"] == 0
    trained = rows(summary["folder"])[0]["trained"]
    assert sum(trained[-1]) > sum(trained[0])


def test_compensation_runs_within_budgets_and_is_charged(quick):
    summary = run_local(quick(compensation=True, score_every=1, rounds=3))
    plain = run_local(quick(run_folder=quick().run_folder + "-plain", score_every=1, rounds=3))
    assert summary["violations"] == plain["violations"] == 0
    assert summary["faults"] == 0
    assert summary["flops_as_predicted"] == plain["flops_as_predicted"]
    assert summary["resources"]["bytes_up"]["used"] != plain["resources"]["bytes_up"]["used"]


@pytest.mark.parametrize(
    "options",
    [
        {"checkpointing": True},
        pytest.param({"micro_batches": 3, "slots": 2}, marks=pytest.mark.slow),
        {"precision": "bf16"},
        {"proximal": 0.1},
    ],
)
def test_what_saves_memory_keeps_budgets(quick, options):
    summary = run_local(quick(verify_costs=True, **options))
    assert summary["violations"] == 0
    assert summary["faults"] == 0
    assert summary["flops_as_predicted"] == summary["client_rounds"]


def test_a_client_refuses_what_does_not_fit(quick, monkeypatch):
    """The budget that a client finds when the plan arrives is smaller than it was when asked."""
    asked = set()

    def shrinking(self, client, round_number):
        first = (client.client, round_number) not in asked
        asked.add((client.client, round_number))
        return _only_flops(10**15 if first or client.client else 1)

    monkeypatch.setattr("d2ft_fl.budgets.device_classes.DeviceClasses.__call__", shrinking)
    trainer.client_trainer.cache_clear()
    summary = run_local(quick(rounds=1))
    failures = [c["fault"] for c in rows(summary["folder"], "clients.jsonl") if c["fault"]]
    assert len(failures) == 1
    assert "Refusal: the plan needs" in failures[0]
    assert "of flops, the budget allows 1" in failures[0]


def test_a_client_refuses_what_its_memory_cannot_hold(quick, monkeypatch):
    monkeypatch.setattr("d2ft_fl.client.refusals.free_memory", lambda device: 1000)
    trainer.client_trainer.cache_clear()
    with pytest.raises(RunError, match="bytes of memory, 1000 are free"):
        run_local(quick(rounds=1))


def test_fedavg_is_not_refused(quick):
    trainer.client_trainer.cache_clear()
    assert run_local(quick(strategy="fedavg", rounds=1))["faults"] == 0
