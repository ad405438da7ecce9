"""Prices of options, subnet by subnet, of a cost model in which no two numbers are alike."""

from types import SimpleNamespace

import numpy as np
import pytest

from d2ft_fl.planning.patterns import Patterns
from d2ft_fl.planning.pricing import Pricing, table_of
from d2ft_fl.subnets.schedule import Operation

BLOCKS, HEADS, SLOTS, ACTIVE, RANK, ROTATION = 2, 3, 3, 2, 5, 1
SUBNETS = [(b, h) for b in range(BLOCKS) for h in range(HEADS)]
HAS = np.array([[True, False, True], [False, False, False]])
TOTALS = [23, 19, 17]  # examples of slots in a round
SIZES = {1: [3, 2, 0], 4: [2, 1, 0]}  # of 7 and 4 examples, in slots that are active
COPIES = {1: 2, 4: 5}
SPARED = 1009  # FLOPs and bytes at the bottom


class MadeUp:
    """Everything that prices are made of, drawn at random."""

    def __init__(self, rank=RANK, micro_batches=3, checkpointing=False, seed=0):
        self.draw = np.random.default_rng(seed)
        of = self.numbers
        self.arch = SimpleNamespace(
            blocks=BLOCKS, heads=HEADS, rank=rank, tokens=11, dim=13, input_elements=29,
            trains="trains", widths=[of(HEADS), of(HEADS)],
        )  # fmt: skip
        self.slots, self.calibrating, self.compensated = SLOTS, False, False
        self.options = SimpleNamespace(micro_batches=micro_batches, checkpointing=checkpointing)
        self.parts = SimpleNamespace(
            **{
                name: SimpleNamespace(
                    sliced=of(BLOCKS, HEADS), shared=of(BLOCKS), outer=int(of()),
                    tensors=of(BLOCKS), bytes_of_blocks=of(BLOCKS), outer_bytes=int(of()),
                )
                for name in ("base", "factors", "trained", "whole", "ranked", "fixed", "loose")
            }
        )  # fmt: skip
        self.communication = SimpleNamespace(
            spared_up=of(BLOCKS, HEADS), spared_down=of(BLOCKS, HEADS), kept=of(BLOCKS, HEADS),
            message_bytes=int(of()), rank_bytes=int(of()),
        )  # fmt: skip
        self.activations = SimpleNamespace(
            alive=of(2, HEADS), full=of(2, HEADS), dropped=of(2, HEADS), keeps_y=np.array([1, 0]),
            masked=of(2), ranked=of(2), stream=int(of()), statistics=int(of()), narrow=int(of()),
            outer=int(of()), scores=int(of()), cast_scores=0, classifier=int(of()), gradient=0,
            spared_at_the_bottom=self.bytes_spared,
        )  # fmt: skip
        self.round_flops = SimpleNamespace(
            of_operations=of(4, HEADS), of_blocks=np.sort(of(4)), of_merging=of(BLOCKS, HEADS),
            outside=int(of()),
            by_branch=SimpleNamespace(
                near=of(4, 2, 2, HEADS), spared_at_the_bottom=self.flops_spared
            ),
        )  # fmt: skip
        self.round_memory = SimpleNamespace(
            batch_extremes=lambda examples: {40: (7, 4), 4: (7, 0)}[examples],
            copies=lambda moments: COPIES[4 if moments else 1],
        )

    def numbers(self, *shape):
        return self.draw.integers(100, 1000, shape)

    def slot_totals(self, examples):
        return TOTALS

    def bytes_spared(self, frozen, checkpointing, slots):
        return SPARED + 1000 * frozen + 5000 * checkpointing + 20_000 * slots

    def flops_spared(self, trains, rank):
        assert (trains, rank) == ("trains", self.arch.rank)
        return SPARED


def pricing(frozen=True, ranks=(2, RANK), active=ACTIVE, cached=HAS, examples=40, **options):
    costs = MadeUp(**options)
    patterns = Patterns.of(SLOTS, active, frozen, ranks)
    return Pricing(costs, patterns, examples, active, ROTATION, cached)


def table(p, of):
    """What ``of`` says of each block, head and option, as [subnets, options]."""
    options = range(len(p.patterns.full))
    return [[int(of(b, h, o)) for o in options] for b, h in SUBNETS]


def count(p, b, h, o, operation, sizes):
    """Examples on which an option does an operation, slot by slot."""
    does = p.patterns.operations[o, (b + h + ROTATION) % p.active]
    return sum(size for size, one in zip(sizes, does, strict=True) if one == operation)


# -- what prices begin with ------------------------------------------------------------------


@pytest.mark.parametrize(
    "micro_batches,examples,expected",
    [(1, 40, [1, 1]), (3, 40, [3, 3]), (4, 40, [4, 3]), (9, 40, [5, 3]), (4, 4, [4, 1])],
)
def test_batches_are_the_first_and_the_largest_later_one(micro_batches, examples, expected):
    p = pricing(micro_batches=micro_batches, examples=examples)
    assert [phase.resource for phase in p.phases] == [1, 4]
    later = SIZES[4] if examples == 40 else [0, 0, 0]
    assert [phase.sizes.tolist() for phase in p.phases] == [SIZES[1], later]
    assert [phase.total for phase in p.phases] == [5, sum(later)]
    assert [phase.copies for phase in p.phases] == [2, 5]
    assert [phase.micro_batches for phase in p.phases] == expected


def test_what_is_counted_by():
    p = pricing()
    assert p.totals.tolist() == TOTALS
    assert p.head.tolist() == [0, 1, 2, 0, 1, 2]
    assert p.starts.tolist() == [1, 0, 1, 0, 1, 0]
    assert p.rank_steps.tolist() == [2, 3]
    assert p.has_fixed is HAS
    assert pricing(cached=None).has_fixed.tolist() == [[False] * 3] * 2


@pytest.mark.parametrize("operation", list(Operation))
def test_examples_of_operations_slot_by_slot(operation):
    p = pricing()
    expected = table(p, lambda b, h, o: count(p, b, h, o, operation, TOTALS))
    assert p.examples_of(operation, np.array(TOTALS)).tolist() == expected


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank,ranks", [(0, (0,)), (RANK, (2, RANK))])
def test_flops_of_options(rank, ranks):
    p = pricing(rank=rank, ranks=ranks)
    flops = p.costs.round_flops

    def price(b, h, o):
        own, total = p.patterns.rank[o], 0
        for operation in (Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL):
            near = sum(flops.by_branch.near[operation, 1, branch, h] for branch in range(2))
            each = flops.of_operations[operation, h]
            if rank and operation == Operation.FULL:
                each = each - near * (rank - own)  # which counts the largest rank
            elif rank:
                each = each + own * (near + flops.of_blocks[operation])
            total += each * count(p, b, h, o, operation, TOTALS)
        return total + (flops.of_merging[b, h] * (rank - own) if p.patterns.runs[o] else 0)

    assert p.flops_of_options().tolist() == table(p, price)


def test_bytes_of_options():
    p = pricing()
    parts, travels = p.costs.parts, p.costs.communication

    def up(b, h, o):
        trains, ranked = p.patterns.full[o] > 0, p.patterns.rank[o] * parts.ranked.sliced[b, h]
        elements = trains * parts.whole.sliced[b, h] + ranked
        return 4 * elements - trains * travels.spared_up[b, h]

    def down(b, h, o):
        fixed = 0 if HAS[b, h] else parts.fixed.sliced[b, h]
        return (p.patterns.runs[o] > 0) * (
            4 * (parts.loose.sliced[b, h] + fixed) - travels.spared_down[b, h]
        )

    assert p.bytes_up_of_options().tolist() == table(p, up)
    assert p.bytes_down_of_options().tolist() == table(p, down)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_options(checkpointing):
    p = pricing(checkpointing=checkpointing)
    a, parts = p.costs.activations, p.costs.parts
    for phase in p.phases:
        sizes, copies = SIZES[phase.resource], COPIES[phase.resource]

        def saved(b, h, o, sizes=sizes):
            full = count(p, b, h, o, Operation.FULL, sizes)
            frozen = count(p, b, h, o, Operation.FROZEN, sizes)
            alive = a.alive[:, h].sum() * (full + frozen)
            return 0 if checkpointing else (alive + (a.full + a.dropped)[:, h].sum() * full) // 3

        def memory(b, h, o, copies=copies, saved=saved):
            trains, rank = p.patterns.full[o] > 0, p.patterns.rank[o]
            elements = (p.patterns.runs[o] > 0) * parts.base.sliced[b, h]
            elements += copies * trains * parts.whole.sliced[b, h]
            elements += rank * (parts.factors.sliced[b, h] + copies * parts.ranked.sliced[b, h])
            return 4 * elements + trains * p.costs.communication.kept[b, h] + saved(b, h, o)

        assert p.memory_of_options(phase).tolist() == table(p, memory)
        if not checkpointing:
            assert p.saved_by_options(phase).tolist() == table(p, saved)


@pytest.mark.parametrize("calibrating", [False, True])
def test_items_are_prices_in_order_and_calibrating_adds_means(calibrating):
    p = pricing()
    p.costs.calibrating = calibrating
    items = p.items()
    widths = np.sum(p.costs.arch.widths, axis=0)
    means = table(p, lambda b, h, o: (p.patterns.runs[o] > 0) * 4 * 11 * widths[h])
    assert p.means_of_options().tolist() == means
    more = calibrating * np.array(means)
    first, later = p.phases
    expected = [
        p.flops_of_options(), p.memory_of_options(first) + more, p.bytes_up_of_options() + more,
        p.bytes_down_of_options(), p.memory_of_options(later) + more,
    ]  # fmt: skip
    assert items.shape == (6, len(p.patterns.full), 5)
    for resource, prices in enumerate(expected):
        assert items[..., resource].tolist() == prices.tolist()


# -- openings --------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrating", [False, True])
def test_openings_up_and_down_and_in_flops(calibrating):
    """Levels are resident, live, trained at rank 2, and at 5, which is 3 more."""
    p = pricing()
    p.costs.calibrating = calibrating
    parts, block = p.costs.parts, p.costs.round_flops.of_blocks[Operation.FULL]
    assert p.flops_of_openings(4).tolist() == [0, 0, block * 42 * 2, block * 42 * 3]
    up, down = [], []
    for b in range(BLOCKS):
        whole = 4 * parts.whole.shared[b] + 160 * parts.trained.tensors[b]
        rank = 4 * parts.ranked.shared[b]
        up.append([320 * calibrating, 0, whole + 2 * rank, 3 * rank])
        # Of block 0 there is something already, but not all; of block 1 nothing.
        shared = 4 * parts.fixed.shared[b] * (b == 1)
        down.append(parts.loose.bytes_of_blocks[b] + shared + 160 * parts.fixed.tensors[b])
    assert p.bytes_up_of_openings(4).tolist() == up
    assert p.bytes_down_of_openings().tolist() == down
    whole = pricing(cached=np.array([[True] * 3, [False] * 3]))
    expected = [parts.loose.bytes_of_blocks[0], down[1]]
    assert whole.bytes_down_of_openings().tolist() == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_openings(checkpointing):
    p = pricing(checkpointing=checkpointing)
    a, parts = p.costs.activations, p.costs.parts
    for phase in p.phases:
        sizes, copies = SIZES[phase.resource], COPIES[phase.resource]
        least = sizes[1]  # of the smallest slot that is active
        live, trained, ranked = 2 * a.stream * sum(sizes), 0, 0
        if not checkpointing:
            live += 2 * a.statistics * least
            trained = (a.narrow + a.masked.sum()) * least  # one of two branches keeps y
            ranked = a.ranked.sum() * least
        assert p.saved_by_block(phase) == (live, trained, ranked)
        expected = []
        for b in range(BLOCKS):
            rank = 4 * (parts.factors.shared[b] + copies * parts.ranked.shared[b])
            lower, upper = (trained + 2 * ranked) // 3, (trained + 5 * ranked) // 3
            expected.append(
                [4 * parts.base.shared[b], live // 3,
                 lower + 4 * copies * parts.whole.shared[b] + 2 * rank, upper - lower + 3 * rank]
            )  # fmt: skip
        assert p.memory_of_openings(phase, 4).tolist() == expected


@pytest.mark.parametrize("frozen", [False, True])
def test_openings_are_prices_in_order_and_without_frozen_what_is_live_is_trained(frozen):
    p = pricing(frozen)
    first, later = p.phases
    expected = np.zeros((BLOCKS, 4, 5), dtype=np.int64)
    expected[..., 0] = p.flops_of_openings(4)
    expected[..., 1], expected[..., 4] = (p.memory_of_openings(f, 4) for f in (first, later))
    expected[..., 2] = p.bytes_up_of_openings(4)
    expected[:, 0, 3] = p.bytes_down_of_openings()
    if not frozen:
        expected[:, 2] += expected[:, 1]
        expected = expected[:, [0, 2, 3]]
    assert p.openings().tolist() == expected.tolist()


# -- anything at all -------------------------------------------------------------------------


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("cached,ranks", [(HAS, (2, RANK)), (None, (RANK,))])
@pytest.mark.parametrize(
    "narrow,gradient,scarce", [(0, 0, True), (0, 0, False), (0, 90_000, True), (307, 90_000, True)]
)
def test_running_anything_at_all(compensated, cached, ranks, narrow, gradient, scarce):
    """Memory is that of the loss, or of the classifier with a gradient that is larger."""
    p = pricing(ranks=ranks, cached=cached)
    p.costs.compensated, b = compensated, p.costs.activations
    b.cast_scores, b.gradient = narrow, gradient
    b.stream = 3 * b.scores - (50 if scarce else -50)  # what branches are priced with besides
    costs, parts, travels = p.costs, p.costs.parts, p.costs.communication
    skips = compensated * 4 * BLOCKS * ACTIVE * 2 * 11 * 13
    down = parts.loose.outer_bytes + travels.message_bytes + skips + compensated * 160 * BLOCKS
    down += parts.fixed.outer_bytes if cached is None else travels.rank_bytes
    memory = {}
    for resource in (1, 4):
        elements = parts.base.outer + COPIES[resource] * parts.trained.outer
        total = sum(SIZES[resource])
        if gradient:
            of_one, once = b.outer + (narrow or b.scores) - b.stream, gradient
        else:
            of_one, once = b.outer + (50 if scarce else 0), b.classifier
        memory[resource] = 4 * elements + 4 * total * 29 + total * of_one // 3 + once
    assert p.constant().tolist() == [
        costs.round_flops.outside * (23 + 19), memory[1] + skips,
        parts.trained.outer_bytes + 2048, down, memory[4] + skips,
    ]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("active,examples", [(1, 23), (2, 42), (3, 59)])
def test_excess_of_prices(active, examples, frozen, checkpointing):
    """In several slots a block pays for FULL in each, and each other head for the dearest else."""
    p = pricing(frozen, active=active, checkpointing=checkpointing)
    block = p.costs.round_flops.of_blocks
    each = SPARED
    if active > 1:
        other = block[Operation.FROZEN if frozen else Operation.FORWARD_ONLY]
        each += BLOCKS * RANK * (block[Operation.FULL] + (HEADS - 1) * other)
    assert p.excess_flops(frozen) == each * examples
    lowest = min(active, BLOCKS)  # of so many slots they may be different blocks
    spared = SPARED + 1000 * frozen + 5000 * checkpointing + 20_000 * lowest
    memory = [-(-spared * f.total // min(3, f.total)) for f in p.phases]
    assert p.excess().tolist() == [each * examples, memory[0], 0, 0, memory[1]]


def test_without_lora_nothing_is_in_excess():
    assert pricing(rank=0, ranks=(0,)).excess().tolist() == [0] * 5


def test_a_table_has_all_prices():
    for cached in (HAS, None):
        p = pricing(cached=cached)
        found = table_of(p.costs, p.patterns, 40, ACTIVE, ROTATION, cached)
        for part in ("items", "openings", "constant", "excess"):
            assert getattr(found, part).tolist() == getattr(p, part)().tolist()
