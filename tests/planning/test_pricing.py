"""Prices of options, step by step, against the cost model and hand arithmetic.

A price of an option is what a schedule costs with it, less what the schedule costs without. The
other subnets are FULL in every slot, so that blocks are open and slots active either way.
"""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.planning.cost_tables import FLOPS, LATER, MEMORY
from d2ft_fl.planning.patterns import Patterns, pattern_starts
from d2ft_fl.planning.pricing import LIVE, RESIDENT, TRAINED, Pricing
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.sizes import ELEMENT, MESSAGE_HEADER
from tests.conftest import all_of, build, cost_model

_, ARCH = build(depth=2, num_heads=3)
EXAMPLES = 20
HAS = np.array([[True, True, False], [False, False, False]])


def pricing(slots=1, lora=None, cached=None, frozen=True, ranks=(0,), changes=(), **options):
    arch = with_lora(ARCH, lora) if lora else ARCH
    costs = replace(cost_model(arch, slots, batch_size=8, **options), **dict(changes))
    patterns = Patterns.of(slots, slots, frozen, ranks)
    return Pricing(costs, patterns, EXAMPLES, slots, rotation=1, cached=cached)


def with_option(p, subnet, option):
    """Everything FULL, but for one subnet and its option."""
    operations = p.costs.everything().operations.copy()
    block, head = divmod(subnet, p.costs.arch.heads)
    operations[:, block, head] = p.patterns.operations[option, p.starts[subnet]]
    return Schedule(operations)


def differences(p, cost):
    """What each option of each subnet adds to a cost of schedules: [subnets, options]."""
    subnets, options = len(p.head), len(p.patterns.full)
    table = np.array([[cost(with_option(p, s, o)) for o in range(options)] for s in range(subnets)])
    return table - table[:, :1]


def ordinary(p):
    """Options but those for below the lowest trained block, which nothing is here."""
    return ~p.patterns.below


def test_patterns_are_all_counts_of_slots():
    patterns = Patterns.of(2, 2, frozen=True, ranks=(2, 4))
    counts = set(zip(patterns.full, patterns.frozen, patterns.forward, patterns.rank, strict=True))
    assert {(2, 0, 0, 2), (2, 0, 0, 4), (0, 1, 1, 0)} <= counts
    assert max(sum(count[:3]) for count in counts) == 2
    assert patterns.runs[0] == 0
    # resident, live, then trained at the lower and at the higher rank
    level = dict(
        zip(
            map(tuple, np.stack([patterns.full, patterns.frozen, patterns.rank], axis=1).tolist()),
            patterns.levels,
            strict=True,
        )
    )
    assert (level[0, 2, 0], level[1, 0, 2], level[1, 1, 4]) == (2, 3, 4)


def test_patterns_start_one_slot_later_from_head_to_head_and_block_to_block():
    assert pattern_starts(ARCH, 3, 0).tolist() == [0, 1, 2, 1, 2, 0]
    assert pattern_starts(ARCH, 3, 1).tolist() == [1, 2, 0, 2, 0, 1]


@pytest.mark.parametrize("slots", [1, 3])
def test_examples_of_an_operation_are_those_of_its_slots(slots):
    p = pricing(slots)
    sizes = np.array([5, 3, 1])[:slots]
    for subnet, option in [(0, 1), (4, 2), (5, len(p.patterns.full) - 1)]:
        block, head = divmod(subnet, 3)
        done = with_option(p, subnet, option).operations[:, block, head]
        for operation in Operation:
            count = p.examples_of(operation, sizes)[subnet, option]
            assert count == sizes[done == operation].sum()


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"epochs": 2}])
def test_flops_of_options_are_the_cost_models(slots, options):
    p = pricing(slots, **options)
    exact = differences(p, lambda schedule: p.costs.flops(schedule, EXAMPLES))
    assert np.array_equal(p.flops_of_options()[:, ordinary(p)], exact[:, ordinary(p)])


def test_flops_of_options_of_one_slot_under_lora_are_the_cost_models():
    """In the upper block, which has something that trains below it."""
    p = pricing(lora=Lora(rank=4), ranks=(4,), frozen=False)
    exact = differences(p, lambda schedule: p.costs.flops(schedule, EXAMPLES))
    assert np.array_equal(p.flops_of_options()[3:, [0, 2]], exact[3:, [0, 2]])
    # Forward alone without training has no factors: they are multiplied out.
    assert np.array_equal(p.flops_of_options()[3:, 1], exact[3:, 1])


def test_flops_of_operations_besides_training_pay_the_blocks_factors_under_lora():
    """A head that trains in one slot of two pays for the block in the other, alone in it."""
    p = pricing(slots=2, lora=Lora(rank=4), ranks=(4,), frozen=False)
    operations = p.costs.everything().operations.copy()
    operations[:, 1] = Operation.SHORTCUT
    without = p.costs.flops(Schedule(operations.copy()), EXAMPLES)
    (option,) = np.flatnonzero((p.patterns.full == 1) & (p.patterns.forward == 1))
    operations[:, 1, 0] = p.patterns.operations[option, p.starts[3]]
    exact = p.costs.flops(Schedule(operations), EXAMPLES) - without
    # What opening the block costs is priced in all slots, although one trains.
    opening = p.flops_of_openings(3)[TRAINED] * (operations[:, 1, 0] == Operation.FULL).mean()
    assert p.flops_of_options()[3, option] + opening == exact


@pytest.mark.parametrize("changes", [{}, {"bits_up": 4, "bits_down": 8}])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_bytes_of_options_are_the_cost_models(changes, lora):
    p = pricing(lora=lora, ranks=(4 if lora else 0,), cached=HAS, changes=changes)
    up = differences(p, p.costs.bytes_up)
    assert np.array_equal(p.bytes_up_of_options(), up)
    cost = p.costs.cost
    down = differences(p, lambda schedule: cost(schedule, EXAMPLES, HAS).bytes_down)
    # Head 2 of block 0 is the only one there that is sent: the block's headers go with it.
    rest = [0, 1, 3, 4, 5]
    assert np.array_equal(p.bytes_down_of_options()[rest], down[rest])


@pytest.mark.parametrize("slots", [1, 3])
def test_what_options_save_is_the_cost_models(slots):
    p = pricing(slots)
    sizes = [3, 3, 2][:slots] if slots == 3 else [8]
    exact = differences(p, lambda schedule: p.costs.saved_bytes(schedule, sizes))
    for phase in p.phases:
        assert phase.sizes.tolist() == sizes
        saved = p.saved_by_options(phase)
        assert np.array_equal(saved[:, ordinary(p)], exact[:, ordinary(p)])


def test_in_micro_batches_options_save_their_mean_and_checkpointed_nothing():
    first, _ = pricing(micro_batches=4).phases
    assert first.micro_batches == 4
    whole = pricing().saved_by_options(pricing().phases[0])
    assert np.array_equal(pricing(micro_batches=4).saved_by_options(first), whole // 4)
    assert pricing(checkpointing=True).saved_by_options(first) == 0


@pytest.mark.parametrize("optimizer,moments", [("adamw", 2), ("sgd", 1)])
@pytest.mark.parametrize("proximal", [0.0, 0.1])
def test_memory_of_options_is_weights_gradients_and_optimiser_state(optimizer, moments, proximal):
    p = pricing(checkpointing=True, optimizer=optimizer, proximal=proximal)
    sizes = ARCH.subnet_sizes.reshape(-1, 1)
    copies = 1 + (proximal > 0)
    runs, trains = p.patterns.runs > 0, p.patterns.full > 0
    first, later = p.phases
    assert (first.resource, later.resource) == (MEMORY, LATER)
    assert np.array_equal(p.memory_of_options(first), ELEMENT * sizes * (runs + copies * trains))
    copies += moments
    assert np.array_equal(p.memory_of_options(later), ELEMENT * sizes * (runs + copies * trains))


def test_a_calibrating_client_holds_means_of_all_tokens():
    p = pricing()
    widths = 24 // 3 + 96 // 3  # of a head, and of its slice
    means = p.means_of_options()
    assert np.array_equal(means, np.tile(4 * 17 * widths * (p.patterns.runs > 0), (6, 1)))


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_bytes_of_openings_are_the_cost_models(lora):
    """Of a block that opens with one FULL head, less the head's own."""
    p = pricing(lora=lora, ranks=(4 if lora else 0,))
    operations = p.costs.everything().operations.copy()
    operations[:, 1] = Operation.SHORTCUT
    closed = Schedule(operations.copy())
    operations[:, 1, 0] = Operation.FULL
    opened = Schedule(operations)
    full = int(np.flatnonzero(p.patterns.full)[0])
    up = p.costs.bytes_up(opened) - p.costs.bytes_up(closed)
    assert p.bytes_up_of_openings(3)[1].sum() == up - p.bytes_up_of_options()[3, full]
    down = p.costs.bytes_down(opened) - p.costs.bytes_down(closed)
    assert p.bytes_down_of_openings()[1] == down - p.bytes_down_of_options()[3, full]


def test_memory_of_openings_by_hand():
    """T = 17, D = 24; a block's heads share two norms and the biases of both products out."""
    p = pricing()
    first, later = p.phases
    shared, stream = 4 * (2 * 2 * 24 + 2 * 24), 4 * 17 * 24
    memory = p.memory_of_openings(first, 3)[0]
    assert memory[RESIDENT] == shared
    assert memory[LIVE] == 8 * 2 * (stream + 8 * 17)  # x and statistics
    assert memory[TRAINED] == shared + 8 * 2 * stream  # gradients and y
    assert p.memory_of_openings(later, 3)[0, TRAINED] == 3 * shared + 8 * 2 * stream
    checkpointed = pricing(checkpointing=True)
    memory = checkpointed.memory_of_openings(checkpointed.phases[0], 3)[0]
    assert memory.tolist() == [shared, 8 * 2 * stream, shared]


def test_openings_by_rank_add_what_each_rank_adds():
    p = pricing(lora=Lora(rank=4), ranks=(1, 4))
    per_rank = p.costs.round_flops.of_blocks[Operation.FULL] * EXAMPLES
    assert p.flops_of_openings(4).tolist() == [0, 0, per_rank, 3 * per_rank]
    # Of the common factor of each of four products, 3 more rows of it: all are D = 24 or 96 wide.
    widths = [
        q.numel // 4 for q in p.costs.arch.parameters if q.factor and q.block == 0 and not q.rows
    ]
    assert p.bytes_up_of_openings(4)[0, -1] == ELEMENT * 3 * sum(widths)


def test_without_frozen_what_is_live_is_trained():
    joined, apart = pricing(frozen=False).openings(), pricing().openings()
    assert joined.shape[1] == apart.shape[1] - 1
    assert np.array_equal(joined[:, LIVE], apart[:, LIVE] + apart[:, TRAINED])


def test_anything_at_all_costs_embedding_classifier_and_headers():
    p = pricing()
    constant = p.constant()
    everything = p.costs.cost(all_of(ARCH), EXAMPLES)
    full = int(np.flatnonzero(p.patterns.full)[0])
    items = p.items()[:, full].sum(axis=0)
    total = constant + items + p.openings().sum(axis=(0, 1))
    assert total[[0, 2, 3]].tolist() == [
        everything.flops,
        everything.bytes_up,
        everything.bytes_down,
    ]
    assert constant[FLOPS] == p.costs.round_flops.outside * EXAMPLES
    outer = sum(q.numel for q in ARCH.parameters if q.block < 0 and q.trains)
    assert constant[2] - MESSAGE_HEADER >= ELEMENT * outer
    assert total[MEMORY] <= everything.memory
    assert total[LATER] <= everything.memory


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_excess_bounds_how_much_is_priced_too_high_under_lora(slots, frozen):
    p = pricing(slots, lora=Lora(rank=4), ranks=(4,), frozen=frozen)
    items, openings, excess = p.items(), p.openings(), p.excess()
    draw, worst = np.random.default_rng(0), 0
    for _ in range(60):
        choice = draw.integers(0, len(p.patterns.full), 6) * (draw.random(6) < 0.7)
        choice *= ordinary(p)[choice]
        choice[0] = np.argmax(p.patterns.full)  # in every slot: FROZEN has no price below it
        columns = p.patterns.operations[choice, p.starts]
        schedule = Schedule(columns.T.reshape(slots, 2, 3))
        if not schedule.active.all():
            continue
        levels = p.patterns.levels[choice].reshape(2, 3).max(axis=1)
        total = p.constant() + items[np.arange(6), choice].sum(axis=0)
        total = total + sum(openings[b, :level].sum(axis=0) for b, level in enumerate(levels))
        worst = max(worst, int(total[FLOPS]) - p.costs.flops(schedule, EXAMPLES))
        assert total[FLOPS] - p.costs.flops(schedule, EXAMPLES) <= excess[FLOPS]
        assert total[MEMORY] - excess[MEMORY] <= p.costs.memory(schedule, EXAMPLES)
    assert worst > 0
    assert not pricing(slots).excess().any()  # without LoRA prices of FLOPs are exact
