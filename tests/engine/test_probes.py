"""Passes over the whole model: who is unsure of what. Scores: test_training and test_costs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2ft_fl.client.trainer import client_trainer
from d2ft_fl.costs.probe_costs import Probes, probes_cost, with_probes
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.probes import ProbeRunner
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.tasks.task import Batch
from tests.conftest import all_of, build, cost_model, images_for, training_options, weights_of
from tests.runtime.test_in_process import rows


def whole_of(model, arch, meter, batch_size=8):
    packed = pack_for(arch, weights_of(model), all_of(arch))
    return ProbeRunner(
        PartialModel(TimmViT(model), arch),
        arch,
        arch,
        packed,
        training_options(batch_size=batch_size),
        meter,
    )


def batches(images, labels, size):
    for start in range(0, len(images), size):
        yield Batch(images[start : start + size], labels[start : start + size])


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_entropy_is_that_of_the_models_own_outputs(temperature):
    model, arch = build(attn_drop_rate=0.3)
    images, labels = images_for(arch, 11)
    found = whole_of(model, arch, Meter()).entropy(batches(images, labels, 4), temperature)
    with torch.no_grad():
        p = torch.softmax(model.eval()(images).double() / temperature, dim=1)
    np.testing.assert_allclose(found, -(p * p.log()).sum(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attn_drop_rate": 0.1, "init_values": 0.1}, {"embed_dim": 24, "num_classes": 2000}],
)
def test_selecting_costs_what_is_predicted(changes):
    model, arch = build(**{"embed_dim": 48, **changes})
    meter = Meter(verify=True)
    images, labels = images_for(arch, 20)
    whole_of(model, arch, meter).entropy(batches(images, labels, 8), 0.1)
    predicted = probes_cost(cost_model(arch, 2, batch_size=8), Probes(viewed=20))
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.25 * meter.peak_bytes
    assert predicted.bytes_up == 0


def test_passes_add_up_and_peaks_do_not():
    _, arch = build()
    costs = cost_model(arch, batch_size=8)
    both = probes_cost(costs, Probes(4, 20))
    one, other = probes_cost(costs, Probes(4)), probes_cost(costs, Probes(viewed=20))
    assert both.flops == one.flops + other.flops
    assert both.memory == max(one.memory, other.memory)
    assert both.bytes_down == one.bytes_down == other.bytes_down
    training = costs.cost(all_of(arch, Operation.FORWARD_ONLY), 20)
    assert with_probes(training, both).bytes_down == both.bytes_down


@pytest.mark.parametrize("strategy", ["d2ft", "caff"])
def test_a_run_selects_what_it_is_least_sure_of(quick, strategy, monkeypatch):
    options = {"data_share": 0.5, "data_selection": "entropy", "strategy": strategy}
    options |= {"match": "flops", "match_share": 0.9, "verify_costs": True, "score_every": 1}
    config = checked(quick(**options))
    client_trainer.cache_clear()
    who, seen = client_trainer(config), []
    inner = who.examples.epochs
    monkeypatch.setattr(who.examples, "epochs", lambda *a: seen.append(a) or inner(*a))
    summary = run_local(config)
    assert summary["violations"] == summary["faults"] == 0
    assert summary["flops_as_predicted"] == summary["client_rounds"]
    told = [row for row in rows(config.run_folder, "clients.jsonl") if row["used"]]
    assert {row["viewed"] for row in told} == {30}
    counts = [row["examples"] for row in told]
    assert max(counts) == 15
    if strategy == "caff":  # d2ft takes fewer where compute binds
        assert min(counts) == 15
    assert all(row["scored"] == (4 if strategy == "d2ft" else 0) for row in told)
    assert [len(set(chosen.tolist())) for _, _, chosen in seen] == counts


def test_who_cannot_afford_to_select_draws(quick):
    options = {"data_share": 0.1, "data_selection": "entropy", "strategy": "heterofl"}
    config = checked(quick(match="flops", match_share=0.3, **options))
    summary = run_local(config)
    assert summary["faults"] == 0
    told = rows(config.run_folder, "clients.jsonl")
    assert {row["viewed"] for row in told} == {0, 30}
    assert {row["examples"] for row in told} == {3}


def test_drawn_examples_are_others_every_round(quick, monkeypatch):
    config = checked(quick(data_share=0.4, strategy="fedavg", epochs=2))
    client_trainer.cache_clear()
    who, seen = client_trainer(config), {}
    inner = who.examples.epochs

    def epochs(client, round_number, chosen):
        seen[client, round_number] = found = inner(client, round_number, chosen)
        return found

    monkeypatch.setattr(who.examples, "epochs", epochs)
    summary = run_local(config)
    assert summary["flops_as_predicted"] == 8
    assert summary["resources"]["flops"]["share"] == pytest.approx(0.4, abs=1e-3)
    one, other = (set(seen[0, r][0].tolist()) for r in (1, 2))
    assert len(one) == 12
    assert one != other
    first, second = seen[0, 1]
    assert sorted(first) == sorted(second)
    assert list(first) != list(second)
    assert json.loads(Path(config.run_folder, "summary.json").read_text())["faults"] == 0


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"data_share": 0.0}, "data-share = 0.0 must be above 0"),
        ({"data_share": 1.5}, "data-share = 1.5 must be above 0, and 1 at most"),
        ({"data_selection": "loss"}, "use one of random, entropy"),
        ({"selection_temperature": 0.0}, "must be a finite number above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(quick, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        checked_options(quick(**changes))
