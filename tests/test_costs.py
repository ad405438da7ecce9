"""Predictions against what torch counts: FLOPs as integers, memory by following storages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from clients.full import learning_rate
from d2ft_fl.costs import MESSAGE_HEADER, TENSOR_HEADER, Cost
from d2ft_fl.meter import Meter
from d2ft_fl.partial import PartialModel
from d2ft_fl.planner import Planner
from d2ft_fl.subnets import Operation, Schedule, down_spec, pack_for
from d2ft_fl.training import fisher, train
from d2ft_fl.wire import encode
from tests.conftest import build, cost_model, images_for, random_schedule, weights_of

MODEL, ARCH = build(embed_dim=48, depth=3, num_heads=4)
WEIGHTS = weights_of(MODEL)


def measure(arch, weights, model, schedule, examples, **options):
    """FLOPs and peak bytes of a round of training, counted."""
    partial = PartialModel(model, arch)
    partial.reset(schedule, pack_for(arch, weights, schedule))
    images, labels = images_for(arch, examples)
    size = options["batch_size"]
    data = ((images[i : i + size].clone(), labels[i : i + size]) for i in range(0, examples, size))
    costs, meter = cost_model(arch, schedule.slots, **options), Meter(verify=True)
    train(partial, data, costs.options, learning_rate, meter)
    return costs.cost(schedule, examples), meter


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 4),
    batch=st.integers(1, 12),
    examples=st.integers(1, 30),
    optimizer=st.sampled_from(["adamw", "sgd"]),
)
def test_counted_equals_predicted(seed, slots, batch, examples, optimizer):
    """FLOPs exactly; peak memory never above the prediction."""
    schedule = random_schedule(ARCH, slots, seed)
    predicted, meter = measure(
        ARCH, WEIGHTS, MODEL, schedule, examples, batch_size=batch, optimizer=optimizer
    )
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_peak_memory_is_predicted_within_ten_percent(seed, slots):
    schedule = random_schedule(ARCH, slots, seed)
    predicted, meter = measure(ARCH, WEIGHTS, MODEL, schedule, 24, batch_size=8)
    assert meter.peak_bytes <= predicted.memory <= 1.1 * meter.peak_bytes


@pytest.mark.parametrize(
    "changes", [{"init_values": 0.1}, {"global_pool": "avg"}, {"reg_tokens": 3}]
)
def test_costs_hold_for_other_plain_vits(changes):
    model, arch = build(**{"class_token": "global_pool" not in changes, **changes})
    schedule = random_schedule(arch, 2, 5)
    predicted, meter = measure(arch, weights_of(model), model, schedule, 16, batch_size=8)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.15 * meter.peak_bytes


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_saved_bytes_are_predicted_within_two_percent(seed, slots):
    """Unique storages that autograd saves, parameters left out."""
    schedule = random_schedule(ARCH, slots, seed)
    partial = PartialModel(MODEL, ARCH)
    partial.reset(schedule, pack_for(ARCH, WEIGHTS, schedule))
    images, labels = images_for(ARCH, 6)
    own = {t.untyped_storage().data_ptr() for _, t in partial.held()}
    for slot in range(slots):
        storages = {}

        def keep(tensor, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda t: t):
            F.cross_entropy(partial(images, slot), labels, reduction="sum")
        predicted = cost_model(ARCH, slots).saved_bytes(schedule, slot, 6)
        assert predicted == pytest.approx(sum(storages.values()), rel=0.02)


def test_by_hand_one_block_one_head():
    """T = 17 tokens, D = d = 24, f = 96: written out from the module's docstring."""
    _, arch = build(depth=1, num_heads=1)
    costs = cost_model(arch)
    linear = 17 * (4 * 24 * 24 + 2 * 96 * 24)
    assert costs.forward_flops.tolist() == [2 * linear + 4 * 17 * 17 * 24]
    assert costs.full_flops.tolist() == [6 * linear + 14 * 17 * 17 * 24]
    assert costs.base_flops == 2 * 16 * (4 * 4) * 24 + 6 * 24 * 5
    everything = costs.everything()
    assert costs.flops(everything, 10) == 10 * int(costs.full_flops[0] + costs.base_flops)
    units = costs.saved_slice[0] + costs.saved_block
    assert units == 16 * 17 * 24 + 5 * 17  # 16 units of T D, norms' statistics and the log-sum


def test_bytes_on_the_wire_are_the_plans_up_to_a_stated_constant():
    for seed in range(10):
        schedule = random_schedule(ARCH, 3, seed)
        packed = pack_for(ARCH, WEIGHTS, schedule)
        meta = {"operations": schedule.operations.tobytes().hex(), "round": 1}
        real = len(encode(packed, meta))
        planned = cost_model(ARCH, 3).bytes_down(schedule)
        slack = TENSOR_HEADER * len(down_spec(ARCH, schedule)) + MESSAGE_HEADER
        assert real <= planned <= real + slack


def test_sitting_out_costs_nothing():
    nothing = Schedule.filled(Operation.SHORTCUT, 2, ARCH.blocks, ARCH.heads)
    assert cost_model(ARCH, 2).cost(nothing, 100) == Cost()


def test_the_scoring_pass_costs_what_is_predicted():
    costs = cost_model(ARCH, 3)
    partial = PartialModel(MODEL, ARCH)
    everything = Schedule.filled(Operation.FULL, 1, ARCH.blocks, ARCH.heads)
    partial.reset(everything, pack_for(ARCH, WEIGHTS, everything))
    images, labels = images_for(ARCH, 4)
    meter = Meter(verify=True)
    fisher(partial, images, labels, meter)
    predicted = Planner(costs).scoring_cost(4)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.25 * meter.peak_bytes


def test_cost_grows_with_every_operation():
    costs = cost_model(ARCH, 1)
    seed = random_schedule(ARCH, 1, 3)
    for block, head in np.ndindex(ARCH.blocks, ARCH.heads):
        vectors = []
        for operation in Operation:
            operations = seed.operations.copy()
            operations[0, block, head] = operation
            vectors.append(costs.cost(Schedule(operations), 20).vector())
        assert (np.diff(vectors, axis=0) >= 0).all()


def test_thread_count_of_these_tests_is_one():
    assert torch.get_num_threads() == 1
