"""The server's optimisers, beside Flower's and by hand."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower

from d2ft_fl.aggregation.server_optimizer import Moments, ServerOptimizer
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update
from d2ft_fl.errors import ConfigError
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import up_spec
from tests.conftest import all_of, build, random_schedule, weights_of
from tests.runtime.test_in_process import weights

MODEL, ARCH = build(depth=2)


def changed(values, names, seed):
    """Values that clients' means could have."""
    draw = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * torch.randn(t.shape, generator=draw) if n in names else t
        for n, t in values.items()
    }


def everything():
    """Every parameter that trains, with all heads."""
    return {
        p.name: tuple(range(ARCH.heads)) if p.kind is Kind.SLICED else ()
        for p in ARCH.parameters
        if p.kind is not Kind.EMBEDDING
    }


def flowers(kind, old, mean, before):
    """What Flower's strategy makes of the same mean, and the strategy for the next round."""
    if before is None:
        before = {
            "fedavgm": lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
            "fedyogi": lambda: flower.FedYogi(eta=0.5, beta_1=0.9, beta_2=0.99, tau=1e-3),
        }[kind]()
        before.current_arrays = None
    record = ArrayRecord({n: Array(t.numpy().copy()) for n, t in old.items()})
    if kind == "fedyogi":
        before.current_arrays = {n: t.numpy().copy() for n, t in old.items()}
    else:
        before.current_arrays = record
    aggregated = ArrayRecord({n: Array(t.numpy().copy()) for n, t in mean.items()})
    parent = flower.FedAvg.aggregate_train
    try:
        flower.FedAvg.aggregate_train = lambda *_: (aggregated, None)
        found, _ = before.aggregate_train(1, [])
    finally:
        flower.FedAvg.aggregate_train = parent
    return {n: torch.from_numpy(a.numpy()) for n, a in found.items()}, before


@pytest.mark.parametrize("kind", ["fedavgm", "fedyogi"])
def test_with_every_slice_trained_steps_are_flowers(kind):
    optimizer = ServerOptimizer(kind, 0.5, 0.9, 0.99, 1e-3)
    trained, other = everything(), None
    old, moments = {n: t for n, t in weights_of(MODEL).items() if n in trained}, {}
    theirs = old
    for round in range(3):
        mean = changed(old, trained, round)
        ours, moments = optimizer.step(ARCH, old, mean, trained, moments)
        theirs, other = flowers(kind, theirs, mean, other)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
        old = theirs = ours


def test_fedadam_by_hand():
    optimizer = ServerOptimizer("fedadam", 0.1, 0.9, 0.99, 1e-3)
    old = {"head.bias": torch.zeros(5)}
    mean = {"head.bias": torch.full((5,), 0.2)}
    new, moments = optimizer.step(ARCH, old, mean, {"head.bias": ()}, {})
    # m = 0.1 * 0.2, v = 0.01 * 0.04, x = 0.1 * 0.02 / (0.02 + 0.001)
    assert new["head.bias"][0].item() == pytest.approx(0.1 * 0.02 / 0.021)
    new, moments = optimizer.step(ARCH, new, new, {"head.bias": ()}, moments)  # nothing changed
    assert moments["head.bias"].first[0].item() == pytest.approx(0.018)
    assert moments["head.bias"].second[0].item() == pytest.approx(0.99 * 0.0004)


def test_fedyogi_by_hand():
    """The second moment goes towards the square of the change, and stays where both are alike."""
    optimizer = ServerOptimizer("fedyogi", 0.1, 0.5, 0.75, 1e-3)
    name, old = "head.bias", torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0])
    before = torch.tensor([4.0, 0.25, 0.0, 1.0, 0.0])
    moments = {name: Moments(torch.zeros(5), before)}
    change = torch.tensor([1.0, 1.0, 0.0, -1.0, 2.0])
    new, after = optimizer.step(ARCH, {name: old}, {name: old + change}, {name: ()}, moments)
    # v - 0.25 d^2 sign(v - d^2), and m = 0.5 d
    second = torch.tensor([3.75, 0.5, 0.0, 1.0, 1.0])
    assert torch.equal(after[name].second, second)
    assert torch.equal(after[name].first, change / 2)
    assert torch.allclose(new[name], old + 0.1 * (change / 2) / (second.sqrt() + 1e-3))


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedyogi"])
def test_what_nobody_trained_keeps_its_bits_and_moments(kind):
    optimizer = ServerOptimizer(kind, 0.5, 0.9, 0.99, 1e-3)
    name = "blocks.0.attn.qkv.weight"
    p, old = ARCH.by_name[name], weights_of(MODEL)
    first, moments = optimizer.step(ARCH, old, changed(old, [name], 0), {name: (0, 1, 2, 3)}, {})
    mean = dict(first)
    mean[name] = first[name].clone()
    rows = p.index([1, 3])
    mean[name][rows] += 0.1
    second, after = optimizer.step(ARCH, first, mean, {name: (1, 3)}, moments)
    rest = p.index([0, 2])
    assert torch.equal(second[name][rest], first[name][rest])
    assert torch.equal(after[name].first[rest], moments[name].first[rest])
    assert not torch.equal(second[name][rows], first[name][rows])
    assert set(after) == {name}
    assert all(second[n] is mean[n] for n in old if n != name)


@pytest.mark.parametrize("seed", range(3))
def test_fedavgm_without_momentum_is_the_mean(seed):
    schedule = random_schedule(ARCH, 2, seed)
    old = weights_of(MODEL)
    sums = Sums(ARCH, old, 8)
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        n: torch.randn(shape, generator=draw) for n, shape in up_spec(ARCH, schedule).items()
    }
    sums.add(Update(schedule, [4, 4], tensors))
    mean = sums.apply()
    optimizer = ServerOptimizer("fedavgm", 1.0, 0.0, 0.99, 1e-3)
    stepped, _ = optimizer.step(ARCH, old, mean, sums.trained, {})
    for name, tensor in stepped.items():
        torch.testing.assert_close(tensor, mean[name], rtol=0, atol=1e-6)
        if name not in sums.trained:
            assert tensor is old[name]


def test_trained_names_heads_on_which_somebody_had_examples():
    schedule = all_of(ARCH)
    sums = Sums(ARCH, weights_of(MODEL), 4)
    assert sums.trained == {}
    shapes = up_spec(ARCH, schedule)
    sums.add(Update(schedule, [0], {n: torch.zeros(s) for n, s in shapes.items()}))
    assert sums.trained == {}
    sums.add(Update(schedule, [4], {n: torch.zeros(s) for n, s in shapes.items()}))
    assert sums.trained == {n: h for n, h in everything().items() if n in shapes}


def test_runs_step_by_the_servers_optimiser(quick, tmp_path):
    found = {}
    for kind, options in (
        ("mean", {}),
        ("fedavgm", {"server_momentum": 0.0}),
        ("fedadam", {"server_lr": 0.01}),
    ):
        config = quick(
            server_optimizer=kind, run_folder=str(tmp_path / kind), clients=2, train_examples=40,
            score_every=0, backward_score="uniform", forward_score="uniform", **options,
        )  # fmt: skip
        assert run_local(checked(config))["faults"] == 0
        found[kind] = weights(config.run_folder)
    for name, tensor in found["mean"].items():
        torch.testing.assert_close(found["fedavgm"][name], tensor, rtol=0, atol=1e-4)
    assert not np.allclose(found["fedadam"]["head.weight"], found["mean"]["head.weight"], atol=1e-4)


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"server_optimizer": "adam"}, "use one of mean, fedavgm, fedadam, fedyogi"),
        ({"server_lr": 0.5}, "belongs to an optimiser"),
        ({"server_optimizer": "fedyogi"}, "set it to 0.01 or so"),
        ({"server_optimizer": "fedadam", "server_momentum": 1.0}, "below 1"),
        ({"server_optimizer": "fedadam", "server_tau": 0.0}, "above 0"),
        (
            {
                "server_optimizer": "fedadam",
                "server_lr": 0.01,
                "tuning": "lora",
                "lora_aggregation": "stack",
            },
            "use factors",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(quick, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        checked_options(quick(**changes))
