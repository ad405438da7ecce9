"""Seconds of many clients' rounds, against what is added up in loops, on an uneven machine."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.costs import seconds
from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.costs.seconds import FEATURES
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.subnets.schedule import Operation
from tests.conftest import build, cost_model
from tests.costs.by_parameters import ADAPTED, ARCHITECTURES, UNEVEN, schedule_of
from tests.costs.rounds_by_loops import pass_features, round_features

DRAW = np.random.default_rng(0)
MACHINE = MachineSpeed(  # no two figures are alike
    device="cpu",
    precision="fp32",
    threads=1,
    source="drawn",
    rows=(10.0, 100.0, 1000.0),
    widths=(3.0, 30.0),
    products=tuple(tuple(DRAW.uniform(1e8, 1e9, 6).tolist()) for _ in range(3)),
    tokens=(4.0, 32.0),
    head_widths=(4.0, 16.0),
    attention=tuple(tuple(DRAW.uniform(1e8, 1e9, 4).tolist()) for _ in range(2)),
    message=0.031,
    **dict(zip(FEATURES, DRAW.uniform(1e-3, 1e-2, len(FEATURES)).tolist(), strict=True)),
)
EXAMPLES = [17, 1, 7, 14, 0, 9]  # of clients, in batches of 7


def model(arch, slots, bits=32, **options):
    return replace(cost_model(arch, slots, batch_size=7, **options), machine=MACHINE, bits_up=bits)


def clients(costs, first=0):
    """Schedules, the last of which does nothing, and examples of each."""
    schedules = [schedule_of(costs.arch, costs.slots, first + seed) for seed in range(5)]
    schedules.append(replace(schedules[0], operations=0 * schedules[0].operations))
    return list(zip(schedules, EXAMPLES, strict=True))


def arrays(pairs):
    operations = np.stack([schedule.operations for schedule, _ in pairs])
    some = pairs[0][0].ranks is not None
    ranks = np.stack([s.ranks for s, _ in pairs]) if some else None
    return operations, np.array([examples for _, examples in pairs]), ranks


KINDS = ARCHITECTURES | {"LoRA of one product": with_lora(UNEVEN, Lora(targets=("proj",)))}
CASES = [
    (1, {}),
    (1, {"micro_batches": 3, "optimizer": "sgd", "epochs": 2}),
    (2, {"micro_batches": 2}),
    (3, {"checkpointing": True}),
    (3, {"micro_batches": 4, "epochs": 3, "bits": 8}),
]


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("slots,options", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_rounds_consist_of_is_what_their_passes_add_up_to(kind, slots, options, first):
    costs = model(KINDS[kind], slots, **options)
    pairs = clients(costs, first)
    operations, examples, ranks = arrays(pairs)
    used = costs.ranks(operations, ranks)
    found = costs.round_seconds.features(operations, examples, used)
    for (schedule, count), row in zip(pairs, found, strict=True):
        expected = round_features(costs, schedule, count)
        assert row.tolist() == pytest.approx([expected[name] for name in FEATURES], rel=1e-9)
    constants = [getattr(MACHINE, name) for name in FEATURES]
    assert costs.round_seconds.of(operations, examples, used) == pytest.approx(found @ constants)


def test_attention_that_is_not_fused_and_fewer_tokens_take_what_they_take(monkeypatch):
    monkeypatch.setattr("d2ft_fl.costs.cost_model.fused_attention", lambda *_: False)
    costs = replace(model(UNEVEN, 2), tokens=9)
    schedule = schedule_of(UNEVEN, 2, 4)
    (found,) = costs.round_seconds.features(
        schedule.operations[None], np.array([9]), np.zeros((1, 2, 3), dtype=np.int64)
    )
    expected = round_features(costs, schedule, 9)
    assert expected["attend"] > 0
    assert found.tolist() == pytest.approx([expected[name] for name in FEATURES], rel=1e-9)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_pass_may_go_forward_alone(live, seed):
    costs = model(UNEVEN, 2)
    schedule, sizes = schedule_of(UNEVEN, 2, 2 * seed), [3, 2]
    (found,) = costs.round_seconds.passes(
        schedule.operations[None], np.array([sizes]), np.zeros((1, 2, 3), dtype=np.int64), live
    )
    expected = pass_features(costs, schedule, sizes, live)
    assert found.tolist() == pytest.approx([expected[name] for name in FEATURES], rel=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_work_is_whole_and_the_same_for_clients_at_once_and_one_by_one(kind, monkeypatch):
    """Times the peak: the fastest forward product. A message goes down, and one comes up."""
    monkeypatch.setattr(seconds, "CHUNK", 4)
    costs = model(ARCHITECTURES[kind], 3, micro_batches=2)
    pairs = clients(costs)
    operations, examples, ranks = arrays(pairs)
    found = costs.work(operations, examples, ranks)
    assert found.dtype == np.int64
    for (schedule, count), work in zip(pairs, found.tolist(), strict=True):
        of_round = round_features(costs, schedule, count)
        time = sum(getattr(MACHINE, name) * much for name, much in of_round.items())
        time += 2 * MACHINE.message * bool(of_round)
        assert work == pytest.approx(time * max(MACHINE.products[0]), rel=1e-9, abs=0.6)
        ranks = None if schedule.ranks is None else schedule.ranks[None]
        assert costs.work(schedule.operations[None], np.array([count]), ranks).tolist() == [work]


def test_a_round_of_factors_alone_steps_them_at_their_ranks():
    """By hand, of block 1, heads 0 and 2 at ranks 1 and 3: 24 + 12 and 24 + 11 rows a rank, and of
    the block 2 * 24 a rank; the classifier has 24 * 5 weights and 5 biases."""
    operations = np.zeros((1, 2, 3), dtype=np.int8)
    operations[0, 1] = Operation.FULL, Operation.FORWARD_ONLY, Operation.FULL
    ranks = np.array([[[1, 1, 1], [1, 4, 3]]])
    costs = model(ADAPTED, 1, optimizer="sgd")
    used = costs.ranks(operations[None], ranks)
    (found,) = costs.round_seconds.features(operations[None], np.array([7]), used)
    elements = 1 * 36 + 3 * 35 + 3 * 48 + 24 * 5 + 5
    assert found[FEATURES.index("stepped")] == 3 * 4 * elements
    assert found[FEATURES.index("tensor")] == 4 + 2  # B of qkv; A and B of fc2; B of proj


def test_norms_and_biases_that_train_are_tensors_too():
    """Two norms, four products, each a weight and a bias, and two layer scales: of each block."""
    costs = model(build(depth=2, num_heads=3, init_values=0.1)[1], 1)
    (found,) = costs.round_seconds.features(
        costs.everything().operations[None], np.array([8]), np.zeros((1, 2, 3), dtype=np.int64)
    )
    assert found[FEATURES.index("tensor")] == 2 * (2 * (2 * 6 + 2) + 4)  # in two steps
