"""Whole runs under LoRA, in this process."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from d2ft_fl.config.choices import LORA_AGGREGATIONS
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.export import export_run
from d2ft_fl.preview.plan_preview import preview
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import InProcessPool, run_local
from d2ft_fl.server.run import run
from d2ft_fl.wire.parameter_cache import ParameterCache


@pytest.fixture
def lora(quick):
    def make(**changes):
        return quick(**{"tuning": "lora", "lora_rank": 4, "lora_lr": 5e-3, **changes})

    return make


def rows(folder, name="rounds.jsonl"):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_a_run_keeps_its_predictions_and_reports_its_error(lora, mode):
    summary = run_local(lora(lora_aggregation=mode, verify_costs=True))
    assert summary["violations"] == 0
    found = rows(summary["folder"])
    errors = [row["aggregation_error"] for row in found]
    assert summary["aggregation_error"] == pytest.approx(np.mean(errors))
    for row in found:
        assert not row["faults"]
        assert row["flops_as_predicted"] == row["worked"]
        exact = mode in ("stack", "freeze-common")
        assert row["aggregation_error"] < 1e-5 if exact else row["aggregation_error"] > 1e-3
    for client in rows(summary["folder"], "clients.jsonl"):
        for resource in ("memory", "bytes_up", "bytes_down"):
            assert client["used"][resource] <= client["predicted"][resource]
        down = client["used"]["bytes_down"]
        assert down >= client["predicted"]["bytes_down"] - 30_000  # headers are an upper bound


def test_weights_that_a_client_has_do_not_travel_again(lora):
    """By the second round some, by a third with the same assignments all."""
    config = lora(strategy="fedavg", rounds=3)
    down = [row["bytes_down"]["used_mean"] for row in rows(run_local(config)["folder"])]
    assert down[1] < down[0] / 4
    assert down[2] == pytest.approx(down[1], rel=1e-3)


def test_a_client_that_lost_its_weights_says_so_and_gets_them_again(lora, tmp_path):
    config = lora(strategy="fedavg", rounds=3, clients=2, transport="message")
    pool = InProcessPool(config)
    work, full, empty, messages = (
        pool.client_trainer.work,
        pool.client_trainer.store,
        ParameterCache(tmp_path / "empty"),
        [],
    )

    def losing(blob, weights, asked):
        messages.append(blob)
        pool.client_trainer.store = empty if len(messages) == 4 else full  # client 1 in round 2
        return work(blob, weights, asked)

    pool.client_trainer.work = losing
    first, second, third = rows(run(config, pool)["folder"])
    assert not first["faults"]
    (failure,) = second["faults"]
    assert failure.startswith("client 1:")
    assert "gone" in failure
    assert not third["faults"]
    assert len(messages[5]) > 3 * len(messages[4])  # client 1 gets everything again


def test_slora_begins_factors_from_what_sparse_tuning_changed(lora):
    summary = run_local(lora(rounds=3, slora_rounds=2))
    first, second, third = rows(summary["folder"])
    assert "aggregation_error" not in first
    assert 0 < third["slora_discarded"] < 1
    assert third["aggregation_error"] is not None
    assert third["accuracy"] >= second["accuracy"] - 0.1
    assert summary["violations"] == 0


def test_costs_are_measured_anew_when_something_else_trains(lora):
    summary = run_local(lora(rounds=2, slora_rounds=1, strategy="fedavg"))  # the same schedules
    for row in rows(summary["folder"]):
        assert row["flops_as_predicted"] == row["worked"]


def test_an_adapter_begins_a_run(lora, quick, tmp_path):
    from d2ft_fl.models.export import export_run

    summary = run_local(lora(rounds=2))
    export_run(Path(summary["folder"]), "peft", tmp_path / "adapter")
    before = rows(summary["folder"])[-1]
    more = lora(
        rounds=1,
        lora_adapter=str(tmp_path / "adapter"),
        run_folder=str(tmp_path / "more"),
        lora_lr=0.0,
        head_lr=0.0,
    )
    after = rows(run_local(checked(more))["folder"])[-1]
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=1e-6)
    with pytest.raises(ConfigError, match="lora-rank=4"):
        checked(lora(lora_rank=8, lora_adapter=str(tmp_path / "adapter")))


def test_everything_assigned_to_one_client_is_the_mean(lora):
    """One client: whatever the mode, its own result but for the discarded singular values."""
    found = {}
    for mode in ("factors", "stack"):
        config = lora(
            strategy="fedavg",
            clients=1,
            rounds=1,
            lora_aggregation=mode,
            run_folder=lora().run_folder + mode,
        )
        folder = Path(run_local(config)["folder"])
        found[mode] = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in found["factors"].items():
        torch.testing.assert_close(tensor, found["stack"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"lora_rank": 0}, "lora-rank = 0 must be 1 or more"),
        ({"lora_rank": 97}, "between 1 and 96"),
        ({"lora_targets": "qkv, key"}, "'key' is unknown"),
        ({"lora_targets": "patch_embed.proj"}, "'patch_embed.proj' is unknown"),
        ({"lora_targets": ""}, "lora-targets is empty"),
        ({"lora_targets": "qkv, qkv"}, "names one twice"),
        ({"lora_alpha": 0.0}, "lora-alpha = 0.0"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"lora_init": "pissa"}, "use one of lora, federa"),
        ({"lora_aggregation": "mean"}, "use one of factors, freeze-a"),
        ({"slora_rounds": 2}, "must be below rounds = 2"),
        ({"lora_init": "federa", "rounds": 4, "slora_rounds": 2}, "choose one"),
        ({"lora_init": "federa", "lora_aggregation": "freeze-common"}, "draws the factors"),
        ({"tuning": "full", "slora_rounds": 1}, "slora-rounds belongs to tuning = 'lora'"),
        ({"lora_adapter": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_named(lora, changes, message):
    with pytest.raises(ConfigError, match=message):
        checked(lora(**changes))


def test_the_same_seed_gives_the_same_run(lora):
    options = {"lora_init": "federa", "lora_aggregation": "product"}
    folder = lora().run_folder
    folders = [run_local(lora(**options, run_folder=folder + n))["folder"] for n in "ab"]
    one, two = (safetensors.torch.load_file(Path(f) / "model.safetensors") for f in folders)
    assert all(np.array_equal(one[name].numpy(), two[name].numpy()) for name in one)


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_the_bytes_of_plan_are_those_of_a_run(lora, mode):
    """Round after round, also where folding changes weights that clients have."""
    config = lora(lora_aggregation=mode, rounds=3, strategy="fedavg", lora_error=False)
    planned = preview(checked_options(config), rounds=3)
    found = rows(run_local(config)["folder"], "clients.jsonl")
    for r in planned.rounds:
        ran = {c["client"]: c["predicted"] for c in found if c["round"] == r.round}
        assert {c.client: asdict(c.cost) for c in r.clients} == ran


@pytest.mark.parametrize("rate, moves", [("lr", True), ("lora_lr", False)])
def test_the_first_stage_of_slora_learns_at_the_rate_of_weights(lora, rate, moves):
    rates = {"lr": 0.0, "lora_lr": 0.0, rate: 0.01}
    config = lora(slora_rounds=1, rounds=2, **rates)
    found = rows(run_local(config)["folder"])
    assert (found[1]["slora_discarded"] > 0) is moves


@pytest.mark.parametrize("start", ["check", "run"])
def test_an_adapter_of_another_rank_is_refused_however_a_run_starts(lora, quick, tmp_path, start):
    folder = run_local(lora(rounds=1))["folder"]
    adapter = export_run(Path(folder)).folder
    config = lora(lora_rank=2, lora_adapter=str(adapter), run_folder=str(tmp_path / "next"))
    with pytest.raises(ConfigError, match="has other factors than the run: set lora-rank=4"):
        checked(config) if start == "check" else preview(checked_options(config))


def test_an_adapter_that_is_not_finite_is_refused(lora, tmp_path):
    adapter = export_run(Path(run_local(lora(rounds=1))["folder"])).folder
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(n for n in tensors if "blocks.1.attn.qkv.lora_A" in n)
    tensors[name][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    config = lora(lora_adapter=str(adapter), run_folder=str(tmp_path / "next"))
    with pytest.raises(ConfigError, match=r"blocks.1.attn.qkv.lora_A.weight' holds numbers that"):
        checked(config)
