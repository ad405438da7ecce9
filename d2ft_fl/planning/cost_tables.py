"""What the planner's options are, and what they cost: the knapsack's items, openings, constant.

Costs come from the cost model: once a subnet, whatever the slots, for what it holds and sends; per
slot for FLOPs and activations; a block charges for being opened. Peak memory is two resources, the
first batch, which finds no optimiser state, and later ones. It does not add up (the worst pass,
transients): tables price it from below.

Under LoRA FLOPs and memory depend on which block is the lowest that trains, and FLOPs on what the
heads of a block share in each slot. Tables price every block as if something below it trained, and
as if its heads shared the least; by how much that can be too much is the table's excess.

Under LoRA an option that trains is one option a rank that is offered. What a subnet has of its own
is in proportion to its rank; what a block has in common goes by the largest rank in use, so that
its levels are: resident, live, trained at the lowest rank, then each higher one for what it adds.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.subnets.schedule import Operation, slot_sizes
from d2ft_fl.wire.sizes import ELEMENT, MESSAGE_HEADER, TENSOR_HEADER

FLOPS, MEMORY, UP, DOWN = range(len(RESOURCES))
LATER = len(RESOURCES)  # the solver's fifth resource: memory of later batches
TIME = LATER + 1  # and its sixth, where clients have deadlines: ticks of each client's own
MEMORIES = [MEMORY, LATER]
TICKS = 2**40  # of a deadline


@dataclass(frozen=True)
class Patterns:
    """The options of a subnet, and the slots that each means.

    Attributes:
        full, frozen, forward: Slots of each option: int64 [options].
        rank: At which an option trains, 0 where it does not: int64 [options].
        ranks: All that are offered, ascending.
        below: bool [options]: FORWARD_ONLY below the lowest trained block, worth as FROZEN.
        operations: int8 [options, active, slots], by where a subnet's pattern starts.
    """

    full: np.ndarray
    frozen: np.ndarray
    forward: np.ndarray
    rank: np.ndarray
    ranks: tuple[int, ...]
    below: np.ndarray
    operations: np.ndarray

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, slots: int, active: int, frozen: bool, ranks: tuple[int, ...] = (0,)) -> "Patterns":
        """All counts of slots with at most ``active`` slots at work; the first one does nothing.

        Args:
            frozen: Whether FROZEN is offered. ranks: Those to train at, ascending.
        """
        counts = [
            (a, z, b, rank, False)
            for a in range(active + 1)
            for z in range(active + 1 - a if frozen else 1)
            for b in range(active + 1 - a - z)
            for rank in (ranks if a else (0,))
        ]
        counts += [(0, 0, b, 0, True) for b in range(1, active + 1)] if frozen else []
        operations = np.zeros((len(counts), active, slots), dtype=np.int8)
        for row, (a, z, b, _, _) in enumerate(counts):
            done = [Operation.FULL] * a + [Operation.FROZEN] * z + [Operation.FORWARD_ONLY] * b
            for shift in range(active):
                operations[row, shift, (np.arange(len(done)) + shift) % active] = done
        a, z, b, rank, below = np.array(counts).T
        return cls(a, z, b, rank, ranks, below.astype(bool), operations)

    @property
    def runs(self) -> np.ndarray:
        """Slots in which an option runs at all: int64 [options]."""
        return self.full + self.frozen + self.forward

    @property
    def levels(self) -> np.ndarray:
        """What a block has to be open to: resident, live (where FROZEN is offered), trained.

        The last at each rank that is offered, in ascending order.
        """
        live = 2 * (self.frozen > 0)
        first = 3 if self.below.any() else 2
        trained = (first + np.searchsorted(self.ranks, self.rank)) * (self.full > 0)
        return np.maximum(np.maximum(live, trained), self.runs > 0).astype(np.int64)


@dataclass(frozen=True)
class Table:
    """What options and openings cost a client with so many examples.

    Attributes:
        items: int64 [subnets, options, 5].
        openings: int64 [blocks, levels, 5].
        constant: int64 [5], for running anything at all.
        excess: int64 [5], by how much all of that can at most be above what a plan costs.
    """

    items: np.ndarray
    openings: np.ndarray
    constant: np.ndarray
    excess: np.ndarray

    def timed(self, budget: Budget) -> "Table":
        """The same with a sixth resource: ticks of the deadline, rounded up; none without one."""
        rates = np.array([budget.speed, 0, budget.bandwidth_up, budget.bandwidth_down, 0], float)
        each = np.zeros(5)
        if budget.deadline is not None:
            with np.errstate(over="ignore"):
                np.divide(TICKS / budget.deadline, rates, out=each, where=rates > 0)
            each = np.minimum(each, 1e300)

        def with_time(costs: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):
                time = np.ceil(np.minimum(costs @ each, TICKS + 1)).astype(np.int64)
            return np.concatenate([costs, time[..., None]], axis=-1)

        return Table(*map(with_time, (self.items, self.openings, self.constant, self.excess)))


def shifts_of(costs: CostModel, active: int, rotation: int) -> np.ndarray:
    """Where each subnet's pattern starts: int64 [subnets]."""
    block, head = np.divmod(np.arange(costs.arch.blocks * costs.arch.heads), costs.arch.heads)
    return (block + head + rotation) % active


def table_of(
    c: CostModel,
    p: Patterns,
    examples: int,
    active: int,
    rotation: int,
    cached: np.ndarray | None = None,
) -> Table:
    """Costs of options, of opening blocks to each level, and of running anything at all.

    Args:
        holds: bool [blocks, heads], subnets whose fixed parameters the client has; None for none.
    """
    arch, parts = c.arch, c.parts
    first, later = c.batch_extremes(examples)
    # Of each memory: (resource, examples of each slot in its batch, copies of what trains). Without
    # a later batch its memory is still there: the first step makes the optimiser's state.
    running = np.arange(c.slots) < active
    phases = [
        (resource, np.array(slot_sizes(batch, c.slots)) * running, copies)
        for resource, batch, copies in (
            (MEMORY, first, c.copies(moments=False)),
            (LATER, later, c.copies(moments=True)),
        )
    ]
    # Passes that a batch is run in: the largest saves no less than their mean.
    in_micro_batches = [
        max(1, min(c.options.micro_batches, int(sizes.sum()))) for _, sizes, _ in phases
    ]

    totals = np.array(c.slot_totals(examples), dtype=np.int64)
    shifts = shifts_of(c, active, rotation)
    head = np.tile(np.arange(arch.heads), arch.blocks)
    flops = c.operation_flops[:, head]  # [operations, subnets]
    does = {op: p.operations == op for op in Operation}  # [options, shifts, slots]
    resident = p.runs > 0
    if cached is None:
        cached = np.zeros((arch.blocks, arch.heads), dtype=bool)
    alive = c.saved.alive.sum(axis=0)[head, None]
    full = (c.saved.full + c.saved.dropped).sum(axis=0)[head, None]

    def count(operation: Operation, sizes: np.ndarray) -> np.ndarray:
        """Examples on which each option of each subnet does this: int64 [subnets, options]."""
        return (does[operation] @ sizes).T[shifts]

    items = np.zeros((len(head), len(p.full), LATER + 1), dtype=np.int64)
    for operation in (Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL):
        each = flops[operation][:, None]
        if arch.rank:
            near = c.branch_flops.near[operation, 1].sum(axis=0)[head, None]
            if operation is Operation.FULL:  # counted at the largest rank; the block pays its own
                each = each + near * (p.rank - arch.rank)
            else:
                each = each + (near + c.block_flops[operation]) * p.rank
        items[..., FLOPS] += count(operation, totals) * each
    items[..., FLOPS] += c.merge_flops.reshape(-1, 1) * (resident * (arch.rank - p.rank))
    down = (
        ELEMENT * (parts.loose.sliced + parts.fixed.sliced * ~cached) - c.communication.spared_down
    )
    items[..., UP] = ELEMENT * _of_rank(parts.whole.sliced, parts.ranked.sliced, p)
    items[..., UP] -= c.communication.spared_up.reshape(-1, 1) * (p.full > 0)
    items[..., DOWN] = down.reshape(-1, 1) * resident
    # Resident, live, trained at the lowest rank, and what each higher one adds.
    steps = np.diff(p.ranks, prepend=0)
    openings = np.zeros((arch.blocks, 2 + len(steps), LATER + 1), dtype=np.int64)
    openings[:, 0, DOWN] = parts.loose.bytes_of_blocks
    openings[:, 0, DOWN] += ELEMENT * parts.fixed.shared * ~cached.any(axis=1)
    openings[:, 0, DOWN] += TENSOR_HEADER * parts.fixed.tensors * ~cached.all(axis=1)
    openings[:, 2, UP] = ELEMENT * parts.whole.shared + TENSOR_HEADER * parts.trained.tensors
    openings[:, 2:, UP] += ELEMENT * parts.ranked.shared[:, None] * steps
    openings[:, 2:, FLOPS] = c.block_flops[Operation.FULL] * int(totals[:active].sum()) * steps
    constant = np.zeros(LATER + 1, dtype=np.int64)
    constant[FLOPS] = c.base_flops * int(totals[:active].sum())
    constant[UP] = parts.trained.outer_bytes + MESSAGE_HEADER
    constant[DOWN] = parts.loose.outer_bytes + parts.fixed.outer_bytes * (not cached.any())
    constant[DOWN] += c.communication.message_bytes + c.communication.rank_bytes * (len(steps) > 1)
    for (resource, sizes, copies), micro_batches in zip(phases, in_micro_batches, strict=True):
        total, least = int(sizes.sum()), int(sizes[active - 1])
        n_full = count(Operation.FULL, sizes)
        kept = alive * (n_full + count(Operation.FROZEN, sizes)) + full * n_full
        kept = 0 if c.options.checkpointing else kept // micro_batches
        held = _of_rank(
            copies * parts.whole.sliced, parts.factors.sliced + copies * parts.ranked.sliced, p
        )
        held = parts.own.sliced.reshape(-1, 1) * resident + held
        items[..., resource] = (
            ELEMENT * held + c.communication.kept.reshape(-1, 1) * (p.full > 0) + kept
        )
        # x of both branches, of all examples; what else training keeps, of each rank and besides.
        live, trains, ranked = 2 * c.saved.stream * total, 0, 0
        if not c.options.checkpointing:
            live += 2 * c.saved.statistics * least
            keeps = int(c.saved.keeps_y.sum()) * c.saved.narrow + int(c.saved.masked.sum())
            trains, ranked = keeps * least, int(c.saved.ranked.sum()) * least
        openings[:, 0, resource] = ELEMENT * parts.own.shared
        openings[:, 1, resource] = live // micro_batches
        paid = (trains + ranked * np.array(p.ranks)) // micro_batches
        openings[:, 2:, resource] = np.diff(paid, prepend=0)
        openings[:, 2, resource] += ELEMENT * copies * parts.whole.shared
        shared = parts.factors.shared + copies * parts.ranked.shared
        openings[:, 2:, resource] += ELEMENT * shared[:, None] * steps
        outer = ELEMENT * (parts.own.outer + copies * parts.trained.outer)
        images = ELEMENT * total * arch.input_elements
        constant[resource] = outer + images + total * c.saved.outer // micro_batches
    if c.calibrating:
        widths = np.array(arch.widths).sum(axis=0)[head][:, None]
        means = ELEMENT * arch.tokens * widths * resident
        for resource in (UP, *MEMORIES):
            items[..., resource] += means
        openings[:, 0, UP] += 2 * TENSOR_HEADER
    if c.compensated:  # at most; a block that skips nothing needs none of it
        skips = ELEMENT * arch.blocks * active * 2 * arch.tokens * arch.dim
        constant[DOWN] += skips + TENSOR_HEADER * arch.blocks
        constant[MEMORIES] += skips
    if not p.below.any():  # nothing is live without being trained
        openings[:, 2] += openings[:, 1]
        openings = np.delete(openings, 1, axis=1)
    excess = np.zeros(LATER + 1, dtype=np.int64)
    if arch.rank:
        frozen = bool(p.below.any())
        excess[FLOPS] = _excess_flops(c, totals[:active], frozen)
        spared = c.saved.spared_at_the_bottom(frozen, c.options.checkpointing)
        for (resource, sizes, _), micro_batches in zip(phases, in_micro_batches, strict=True):
            excess[resource] = -(-spared * int(sizes.sum()) // micro_batches)
    return Table(items, openings, constant, excess)


def _excess_flops(c: CostModel, totals: np.ndarray, frozen: bool) -> int:
    """What FLOPs are priced too high by at most, over active slots with so many examples each."""
    each = c.branch_flops.spared_at_the_bottom(c.arch.trains, c.arch.rank)
    if len(totals) > 1:
        # Of a block in a slot: that nobody is FULL there, and that each head pays for the rest.
        rest = [Operation.FORWARD_ONLY, Operation.FROZEN][: 1 + frozen]
        most = c.block_flops[Operation.FULL] + (c.arch.heads - 1) * c.block_flops[rest].max()
        each += c.arch.blocks * c.arch.rank * int(most)
    return each * int(totals.sum())


def _of_rank(whole: np.ndarray, ranked: np.ndarray, p: Patterns) -> np.ndarray:
    """What options that train have, whatever the rank and by it: int64 [subnets, options].

    Args:
        whole, ranked: int64 [blocks, heads].
    """
    return whole.reshape(-1, 1) * (p.full > 0) + ranked.reshape(-1, 1) * p.rank
