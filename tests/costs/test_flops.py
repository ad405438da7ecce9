"""FLOPs against what torch counts where only some of a product trains, and bounds by hand."""

import itertools

import numpy as np
import pytest

from d2ft_fl.costs.flops import BranchFlops
from d2ft_fl.lora.config import Lora, targets_alone, with_lora
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import all_of, build, cost_model, random_schedule, weights_of
from tests.costs.by_parameters import UNEVEN, schedule_of
from tests.costs.moments_by_loops import drawn
from tests.costs.test_lora_costs import adapted, measure

MODEL, PLAIN = build(depth=2, num_heads=3, mlp_ratio=34 / 24)
TARGETS = [("qkv",), ("proj",), ("fc1", "fc2"), ("qkv", "fc2"), ("proj", "fc1")]
T, D, HEAD, R = 17, 24, 8, 4
FULL, FROZEN, FORWARD = Operation.FULL, Operation.FROZEN, Operation.FORWARD_ONLY


def rows_of(*blocks):
    return Schedule(np.array([blocks], dtype=np.int8))


# The lowest block that trains is the first, and the second.
BOTH = {
    "first": rows_of([FULL, FROZEN, FORWARD], [FROZEN, FULL, FULL]),
    "second": rows_of([FORWARD, FROZEN, Operation.SHORTCUT], [FROZEN, FULL, FORWARD]),
}


@pytest.mark.parametrize("lowest", BOTH)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_weights_of_some_products_train(targets, checkpointing, lowest):
    arch = targets_alone(PLAIN, Lora(targets=targets))
    options = {"batch_size": 3, "checkpointing": checkpointing}
    predicted, meter = measure(arch, weights_of(MODEL), MODEL, BOTH[lowest], 3, **options)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory


@pytest.mark.parametrize("frozen", ["", "A", "B"])
@pytest.mark.parametrize("checkpointing,dropout", [(False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("targets", TARGETS)
def test_factors_of_some_products_train(targets, checkpointing, dropout, frozen):
    """At ranks of their own; in slots where a head may be FULL once, and FROZEN then."""
    still = [(target, frozen) for target in targets]
    arch, state = adapted(PLAIN, MODEL, rank=R, targets=targets, dropout=dropout, frozen=still)
    schedule, options = schedule_of(arch, 3, 2), {"batch_size": 4, "checkpointing": checkpointing}
    predicted, meter = measure(arch, state, MODEL, schedule, 5, **options)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory


ONE = 2 * T * D * HEAD  # FLOPs of a head's rows of one of q, k, v and of the product out
INTO, OUT, BACK = 3 * ONE, ONE, 5 * 2 * T * T * HEAD
IN_A, IN_B, OUT_A, OUT_B = (R * 2 * T * width for width in (D, 3 * HEAD, HEAD, D))


@pytest.mark.parametrize(
    "targets,frozen,of_heads,of_block",
    [
        # A head that is FULL is spared its products in; one that is FROZEN all on the way back.
        (("qkv",), "", INTO + OUT + BACK + IN_B, IN_A),
        # Neither A nor what is before it needs the error behind B.
        (("qkv",), "A", INTO + OUT + BACK + IN_B, IN_A),
        # Nothing before the product out trains: gradient ends there, of a head that is FULL too.
        (("proj",), "", INTO + OUT + BACK + OUT_A, 0),
        (("proj",), "A", INTO + OUT + BACK + OUT_A, OUT_B),
    ],
)
def test_what_the_lowest_block_is_spared(targets, frozen, of_heads, of_block):
    arch = with_lora(PLAIN, Lora(rank=R, targets=targets), [(targets[0], frozen)])
    flops = BranchFlops.of(arch, fused=True, checkpointing=False)
    assert flops.spared_at_the_bottom(arch.trains, R) == 3 * of_heads + of_block
    unfused = BranchFlops.of(arch, fused=False, checkpointing=False)
    less = 3 * BACK // 5
    assert unfused.spared_at_the_bottom(arch.trains, R) == 3 * of_heads + of_block - less
    again = BranchFlops.of(arch, fused=True, checkpointing=True)
    twice = INTO + 2 * 2 * T * T * HEAD  # products in, and attention ahead
    twice += (targets == ("qkv",)) * IN_B
    assert again.spared_at_the_bottom(arch.trains, R) == 3 * (of_heads + twice) + of_block


@pytest.mark.parametrize("targets", [*TARGETS, ()])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_block_is_spared_more_than_the_bound(targets, checkpointing):
    """The second block, where the first one trains too, and where it runs forward alone."""
    arch = with_lora(PLAIN, Lora(rank=R, targets=targets)) if targets else PLAIN
    costs = cost_model(arch, checkpointing=checkpointing)
    bound = costs.round_flops.by_branch.spared_at_the_bottom(arch.trains, arch.rank)
    below = {
        operation: costs.flops(rows_of([operation] * 3, [FORWARD] * 3), 1)
        for operation in (FORWARD, FULL)
    }
    most = 0
    for row in np.ndindex(4, 4, 4):
        if FULL in row:
            low, high = (costs.flops(rows_of([o] * 3, row), 1) - below[o] for o in (FORWARD, FULL))
            assert high - low <= bound
            most = max(most, high - low)
    assert bound if targets else bound == most == 0


@pytest.mark.parametrize("kind", ["all", "feed-forward", "product out"])
def test_bytes_that_the_lowest_block_is_spared(kind):
    """Below the lowest branch that trains: streams, in each slot; what heads have there."""
    targets = {"all": (), "feed-forward": ("fc1",), "product out": ("fc2",)}[kind]
    arch = with_lora(UNEVEN, Lora(rank=R, targets=targets)) if targets else UNEVEN
    b = drawn(cost_model(arch).activations, 1)
    attention, feed_forward = (int(of.sum()) for of in b.alive + b.full)
    lowest = 0 if kind == "all" else 1
    for frozen, slots in itertools.product((False, True), (1, 3)):
        spared = b.spared_at_the_bottom(frozen, checkpointing=True, slots=slots)
        assert spared == slots * lowest * b.stream
        expected = (lowest + 1) * (slots * b.stream + b.statistics)
        if lowest:
            expected += attention
        if frozen or kind == "product out":
            expected += (attention, feed_forward)[lowest]
        spared = b.spared_at_the_bottom(frozen, checkpointing=False, slots=slots)
        assert spared == expected


@pytest.mark.parametrize("fused", [False, True])
def test_flops_of_examples_are_those_of_their_slots(fused):
    """Of a few schedules at once, with and without LoRA, as of each by itself."""
    for arch in (PLAIN, with_lora(PLAIN, Lora(rank=R))):
        flops = BranchFlops.of(arch, fused, checkpointing=False)
        tables = np.stack([random_schedule(arch, 3, seed).operations for seed in range(4)])
        ranks = R * (tables == FULL).any(axis=1) * bool(arch.rank)
        together = flops.per_slot(tables, arch.trains, ranks)
        for index, slot in np.ndindex(together.shape):
            alone = flops.per_slot(tables[index, slot][None, None], arch.trains, ranks[index][None])
            assert alone.tolist() == [[together[index, slot]]]
        assert flops.far.any() == bool(arch.rank)
        assert flops.base.shape == flops.near.shape == (4, 2, 2, 3)
        assert flops.far.shape == (4, 2, 2)
    everything = cost_model(PLAIN).flops(all_of(PLAIN), 7)
    assert everything == 7 * cost_model(PLAIN).flops(all_of(PLAIN), 1)
