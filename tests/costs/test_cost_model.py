"""Predictions against what torch counts: FLOPs as integers, memory by following storages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2ft_fl.bench.step import saved_bytes
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs import cost_model as costs
from d2ft_fl.costs.probe_costs import Probes, probes_cost, round_cost
from d2ft_fl.costs.resources import MEMORY_MARGIN, Cost
from d2ft_fl.costs.round_flops import RoundFlops
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.probes import probe_scores
from d2ft_fl.engine.trainer import train
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.planning.importance import MEASURED, TENSOR
from d2ft_fl.subnets.packing import down_spec, pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.tasks.task import Batch
from d2ft_fl.wire.blob import encode
from d2ft_fl.wire.sizes import MESSAGE_HEADER, TENSOR_HEADER
from tests.conftest import (
    CLASSIFY,
    build,
    cost_model,
    images_for,
    learning_rate,
    random_schedule,
    running,
    weights_of,
)

MODEL, ARCH = build(embed_dim=48, depth=3, num_heads=4)
WEIGHTS = weights_of(MODEL)


def measure(arch, weights, model, schedule, examples, side=16, tokens=None, **options):
    """FLOPs and peak bytes of a round of training, counted."""
    costs, meter = cost_model(arch, schedule.slots, **options), Meter(verify=True)
    costs = costs.under(ExecutionPolicy(tokens=tokens))
    partial = PartialModel(TimmViT(model), arch, Numerics.of(costs.options))
    partial.tokens = tokens
    partial.reset(schedule, pack_for(arch, weights, schedule))
    images, labels = images_for(arch, examples, side=side)
    size = options["batch_size"]
    data = (
        Batch(images[i : i + size].clone(), labels[i : i + size]) for i in range(0, examples, size)
    )
    train(partial, data, CLASSIFY, costs.options, learning_rate, meter)
    return costs.cost(schedule, examples), meter


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 4),
    batch=st.integers(1, 12),
    examples=st.integers(1, 30),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    checkpointing=st.booleans(),
    micro_batches=st.integers(1, 4),
    tokens=st.integers(2, ARCH.tokens),
)
def test_counted_equals_predicted(seed, slots, batch, examples, **options):
    """FLOPs exactly; peak memory never above the prediction."""
    schedule = random_schedule(ARCH, slots, seed)
    predicted, meter = measure(
        ARCH, WEIGHTS, MODEL, schedule, examples, batch_size=batch, **options
    )
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory


FIVE = {"slots": 5, "batch_size": 11, "checkpointing": False}


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 5),
    batch_size=st.integers(5, 16),
    examples=st.integers(1, 40),
    micro_batches=st.integers(1, 6),
    epochs=st.integers(1, 2),
    dear=st.integers(0, 4),
    precision=st.sampled_from(["fp32", "bf16"]),
    checkpointing=st.booleans(),
)
@example(**FIVE, examples=32, dear=1, micro_batches=6, epochs=1, precision="fp32")
@example(**FIVE, examples=31, dear=2, micro_batches=6, epochs=2, precision="fp32")
@example(**FIVE | {"slots": 1}, examples=32, dear=0, micro_batches=3, epochs=1, precision="bf16")
def test_memory_is_that_of_the_worst_micro_batch_of_any_batch(slots, examples, dear, **options):
    """One slot trains everything, the others next to nothing; each batch is looked at by itself."""
    schedule = one_slot_trains(slots, dear % slots)
    model = cost_model(ARCH, slots, **options)
    assert model.memory(schedule, examples) == worst_batch(model, schedule, examples)


def one_slot_trains(slots, dear):
    operations = np.zeros((slots, ARCH.blocks, ARCH.heads), dtype=np.int8)
    operations[:, -1, 0] = Operation.FORWARD_ONLY
    operations[dear] = Operation.FULL
    return Schedule(operations)


def test_a_smaller_last_batch_may_take_the_most():
    """It is cut elsewhere: two examples of the slot that trains come together."""
    schedule = one_slot_trains(5, 1)
    whole, last = (
        measure(ARCH, WEIGHTS, MODEL, schedule, n, batch_size=11, micro_batches=6) for n in (22, 32)
    )
    assert whole[1].peak_bytes < last[1].peak_bytes <= last[0].memory


def worst_batch(model, schedule, examples):
    """The peak of a round, batch by batch and micro-batch by micro-batch."""
    size, pixels = model.options.batch_size, ARCH.input_elements
    operations, ranks = schedule.operations[None], np.zeros((1, ARCH.blocks, ARCH.heads), int)
    (peak,) = model.round_memory.resident(operations, ranks)  # when all is done
    batches = [min(size, examples - start) for start in range(0, examples, size)]
    for index, batch in enumerate(batches * model.options.epochs):
        (held,) = model.round_memory.resident(operations, ranks, moments=index > 0)
        for part in model.micro_batches(schedule, batch):
            peak = max(peak, held + 4 * pixels * batch + model.peak_bytes(schedule, part))
    return peak + peak // MEMORY_MARGIN


WAYS = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "accumulated": {"micro_batches": 3},
    "bfloat16": {"precision": "bf16"},
    "all of it": {"precision": "bf16", "checkpointing": True, "micro_batches": 2},
}
FEWER = {"fewer tokens": {"tokens": 9}, "most left out": {"tokens": 3, "micro_batches": 2}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 4, 24])
@pytest.mark.parametrize("trained", [1, 2])
def test_peak_memory_with_2000_classes_is_predicted_within_ten_percent(trained, batch, precision):
    """Scores and the classifier, whose gradient is made anew, take more than the blocks."""
    model, arch = build(depth=2, num_heads=2, num_classes=2000)
    schedule = Schedule.filled(Operation.FORWARD_ONLY, 1, 2, 2)
    schedule.operations[0, -trained:] = Operation.FULL
    options = {"batch_size": batch, "precision": precision, "optimizer": "sgd"}
    predicted, meter = measure(arch, weights_of(model), model, schedule, 3 * batch, **options)
    assert meter.peak_bytes <= predicted.memory <= 1.1 * meter.peak_bytes


@pytest.mark.parametrize("policy", [*WAYS, *FEWER])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_peak_memory_is_predicted_within_ten_percent(seed, slots, policy):
    schedule, own = random_schedule(ARCH, slots, seed), (WAYS | FEWER)[policy]
    predicted, meter = measure(ARCH, WEIGHTS, MODEL, schedule, 24, batch_size=8, **own)
    assert meter.peak_bytes <= predicted.memory <= 1.1 * meter.peak_bytes


KINDS = {
    "layer scale": {"init_values": 0.1},
    "average pooling": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 3},
    "q/k norms": {"qk_norm": True},
    "root mean square norms": {"norm_layer": "rmsnorm"},
    "gated attention": {"gated": True},
    "uneven slices": {"mlp_ratio": 66 / 48},
    "attention dropout": {"attn_drop_rate": 0.1},
    "dropout": {"proj_drop_rate": 0.1},
    "stochastic depth": {"drop_path_rate": 0.1},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", [3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_costs_hold_for_other_plain_vits(kind, seed, checkpointing):
    model, arch = build(embed_dim=48, **KINDS[kind])
    schedule = random_schedule(arch, 2, seed)
    predicted, meter = measure(
        arch, weights_of(model), model, schedule, 16, batch_size=8, checkpointing=checkpointing
    )
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.15 * meter.peak_bytes


ROWS = {
    "all full": [Operation.FULL] * 3,
    "forward alone": [Operation.FORWARD_ONLY] * 3,
    "forward above": [Operation.FULL, Operation.FORWARD_ONLY, Operation.FORWARD_ONLY],
    "frozen above": [Operation.FULL, Operation.FROZEN, Operation.FROZEN],
    "full above": [Operation.FORWARD_ONLY, Operation.FORWARD_ONLY, Operation.FULL],
}


@pytest.mark.parametrize("policy", ["plain", "checkpointing", "bfloat16"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dropout,side", [(0.1, 16), (0.1, 48), (0.0, 16), (0.0, 48)])
def test_memory_of_attention_that_is_not_fused(dropout, side, row, policy, monkeypatch):
    # Then there are matrices of tokens by tokens: 145 of them at 48 pixels, beside 12 of a head.
    monkeypatch.setattr("d2ft_fl.models.timm_vit.fused_attention", lambda *_: False)
    monkeypatch.setattr(costs, "fused_attention", lambda *_: False)
    model, arch = build(embed_dim=48, depth=3, num_heads=4, img_size=side, attn_drop_rate=dropout)
    for heads in (1, 4):
        operations = np.zeros((1, 3, 4), dtype=np.int8)
        operations[0, :, :heads] = np.array(ROWS[row])[:, None]
        schedule = Schedule(operations)
        predicted, meter = measure(
            arch, weights_of(model), model, schedule, 8, side, batch_size=4, **WAYS[policy]
        )
        assert meter.flops == predicted.flops
        assert meter.peak_bytes <= predicted.memory <= 1.35 * meter.peak_bytes


@pytest.mark.parametrize("policy", ["plain", "checkpointing", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_saved_bytes_are_predicted_within_two_percent(seed, slots, policy):
    schedule = random_schedule(ARCH, slots, seed)
    sizes = running(schedule, 6)
    costs = cost_model(ARCH, slots, **WAYS[policy])
    partial = PartialModel(TimmViT(MODEL), ARCH, Numerics.of(costs.options))
    partial.reset(schedule, pack_for(ARCH, WEIGHTS, schedule))
    images, labels = images_for(ARCH, sum(sizes))
    held = [t for _, t in partial.held()]
    measured = saved_bytes(lambda: F.cross_entropy(partial(images, sizes).float(), labels), held)
    assert costs.saved_bytes(schedule, sizes) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_activations_shrink_with_the_heads_that_train(share):
    """Beside timm's own: at most 0.27 + 0.75 times the share that runs FULL."""
    model, arch = build(embed_dim=96, img_size=32, depth=4)
    operations = np.zeros((1, arch.blocks, arch.heads), dtype=np.int8)
    operations[:, :, : round(share * arch.heads)] = Operation.FULL
    schedule = Schedule(operations)
    ours = cost_model(arch).saved_bytes(schedule, [8])
    images, labels = images_for(arch, 8, side=32)
    theirs = saved_bytes(lambda: F.cross_entropy(model(images), labels), model.parameters())
    assert ours <= (0.27 + 0.75 * share) * theirs


def test_by_hand_one_block_one_head():
    """T = 17 tokens, D = d = 24, f = 96: written out from the module's docstring."""
    _, arch = build(depth=1, num_heads=1)
    costs = cost_model(arch)
    inward, outward = 17 * 24 * (3 * 24 + 96), 17 * 24 * (24 + 96)
    attention = 2 * 17 * 17 * 24
    forward = 2 * (inward + outward) + 2 * attention
    through = 2 * (inward + outward) + 5 * attention
    weights = 2 * (inward + outward)
    expected = [0, forward, forward + through, forward + through + weights]
    assert costs.round_flops.of_operations[:, 0].tolist() == expected
    again = cost_model(arch, checkpointing=True).round_flops.of_operations[:, 0]
    assert (again - expected).tolist() == [0, 0] + [2 * inward + 2 * attention] * 2
    assert costs.round_flops.outside == 2 * 16 * (4 * 4) * 24 + 6 * 24 * 5
    assert costs.flops(costs.everything(), 10) == 10 * (expected[3] + costs.round_flops.outside)
    saved = costs.saved_bytes(costs.everything(), [1]) - costs.activations.outer - 4 * 5  # scores
    # 16 units of T D, the statistics of two norms, and the log-sum of attention
    assert saved == 4 * (16 * 17 * 24 + 2 * 2 * 17 + 17)


def test_frozen_below_all_that_trains_is_forward_only():
    operations = np.full((1, ARCH.blocks, ARCH.heads), Operation.FROZEN, dtype=np.int8)
    operations[0, 1, 0] = Operation.FULL
    silent = operations.copy()
    silent[0, 0] = Operation.FORWARD_ONLY
    costs = cost_model(ARCH)
    assert costs.cost(Schedule(operations), 20) == costs.cost(Schedule(silent), 20)
    cut = silent.copy()
    cut[0, 2] = Operation.FORWARD_ONLY
    assert costs.flops(Schedule(cut), 20) < costs.flops(Schedule(silent), 20)


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


@pytest.mark.parametrize("kinds", [("fisher",), ("taylor",), MEASURED])
@pytest.mark.parametrize("changes", [{}, {"attn_drop_rate": 0.1, "proj_drop_rate": 0.1}])
def test_the_scoring_pass_costs_what_is_predicted(changes, kinds):
    model, arch = build(embed_dim=48, **changes)
    costs = cost_model(arch, 3, epochs=2)  # each example is scored once all the same
    partial = PartialModel(TimmViT(model), arch)
    everything = Schedule.filled(Operation.FULL, 1, arch.blocks, arch.heads)
    packed = pack_for(arch, weights_of(model), everything)
    partial.reset(everything, packed, gradients=False)
    assert not any(block.store.grads for block in partial.blocks.values())
    images, labels = images_for(arch, 4)
    meter = Meter(verify=True)
    found = probe_scores(partial, Batch(images, labels), CLASSIFY, kinds, meter)
    predicted = probes_cost(costs, Probes(scored=4, kinds=tuple(kinds)))
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.25 * meter.peak_bytes
    reply = {TENSOR + kind: torch.from_numpy(scores).float() for kind, scores in found.items()}
    data = sum(tensor.nbytes for tensor in reply.values())
    assert predicted.bytes_up == data + len(kinds) * TENSOR_HEADER
    assert len(encode(reply, {})) - len(encode({}, {})) <= predicted.bytes_up


def test_a_kind_of_score_more_costs_one_tensor_up_and_nothing_else():
    costs = cost_model(ARCH)
    one, two = (
        round_cost(costs, costs.everything(), 20, Probes(scored=4, kinds=kinds)).vector()
        for kinds in (("fisher",), ("fisher", "taylor"))
    )
    assert (two - one).tolist() == [0, 0, 4 * ARCH.blocks * ARCH.heads + TENSOR_HEADER, 0]


def test_a_cost_model_believes_nobody_but_its_own_arithmetic(monkeypatch):
    """What one has found stays its own, also where another one of the same run is equal to it."""

    def found():
        costs = cost_model(ARCH)
        return costs.full_cost(20), probes_cost(costs, Probes(scored=4, kinds=("fisher",)))

    right = found()
    monkeypatch.setattr(RoundFlops, "outside", 0)
    assert all(now.flops < then.flops for now, then in zip(found(), right, strict=True))
    monkeypatch.undo()
    assert found() == right


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
