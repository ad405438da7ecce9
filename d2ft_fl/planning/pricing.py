"""How the planner's options are priced, step by step.

Costs come from the cost model: once a subnet, whatever the slots, for what it keeps and sends; per
slot for FLOPs and activations; a block charges for being opened. Peak memory is two resources, that
of the first batch, which finds no optimiser state, and that of later ones. It does not add up (the
worst micro-batch, transients): tables price it from below.

Under LoRA FLOPs and memory depend on which block is the lowest that trains, and FLOPs on what the
heads of a block share in each slot. Tables price every block as if something below it trained, and
as if its heads shared the least; by how much that can be too much is the table's excess.

Under LoRA an option that trains is one option a rank that is offered. What a subnet has to itself
is in proportion to its rank; what a block has in common goes by the largest rank in use, so that
its levels are: resident, live, trained at the lowest rank, then each higher one for what it adds.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.planning.cost_tables import DOWN, FLOPS, LATER, MEMORIES, MEMORY, UP, Table
from d2ft_fl.planning.patterns import Patterns, pattern_starts
from d2ft_fl.subnets.schedule import Operation, slot_sizes
from d2ft_fl.wire.sizes import ELEMENT, MESSAGE_HEADER, TENSOR_HEADER

RESIDENT, LIVE, TRAINED = range(3)  # levels of openings; from TRAINED on one for each rank


def table_of(
    costs: CostModel,
    patterns: Patterns,
    examples: int,
    active: int,
    rotation: int,
    cached: np.ndarray | None = None,
) -> Table:
    """Price options, opening blocks to each level, and running anything at all.

    Args:
        costs: The cost model.
        patterns: The options.
        examples: On which the client trains.
        active: Slots that may run anything.
        rotation: By how much patterns are shifted.
        cached: Subnets whose fixed parameters the client has: bool [blocks, heads]; None for none.
    """
    pricing = Pricing(costs, patterns, examples, active, rotation, cached)
    return Table(pricing.items(), pricing.openings(), pricing.constant(), pricing.excess())


@dataclass(frozen=True)
class MemoryPhase:
    """One of the two kinds of batches by which peak memory is priced.

    Attributes:
        resource: ``MEMORY`` for the first batch, ``LATER`` for later ones.
        sizes: Examples of each slot in such a batch, 0 of slots that are not active: int64 [slots].
        copies: Tensors beside each that trains: gradient, optimiser state, FedProx's start.
        micro_batches: In how many the batch is run: the largest saves no less than their mean.
    """

    resource: int
    sizes: np.ndarray
    copies: int
    micro_batches: int

    @property
    def total(self) -> int:
        """Examples of the batch."""
        return int(self.sizes.sum())


@dataclass(frozen=True, eq=False)
class Pricing:
    """The steps in which :func:`table_of` prices options; arguments are those of that function.

    Levels of openings are ``RESIDENT``, ``LIVE`` and one from ``TRAINED`` on for each rank.
    """

    costs: CostModel
    patterns: Patterns
    examples: int
    active: int
    rotation: int
    cached: np.ndarray | None = None

    @cached_property
    def phases(self) -> list[MemoryPhase]:
        """The first batch, and the largest later one.

        Later memory counts also without a later batch: the first step makes optimiser state.
        """
        costs = self.costs
        first, later = costs.round_memory.batch_extremes(self.examples)
        running = np.arange(costs.slots) < self.active
        phases = []
        for resource, batch in ((MEMORY, first), (LATER, later)):
            sizes = np.array(slot_sizes(batch, costs.slots)) * running
            copies = costs.round_memory.copies(moments=resource == LATER)
            micro_batches = max(1, min(costs.options.micro_batches, int(sizes.sum())))
            phases.append(MemoryPhase(resource, sizes, copies, micro_batches))
        return phases

    @cached_property
    def totals(self) -> np.ndarray:
        """Examples that each slot sees in the round: int64 [slots]."""
        return np.array(self.costs.slot_totals(self.examples), dtype=np.int64)

    @cached_property
    def head(self) -> np.ndarray:
        """The head of each subnet: int64 [subnets]."""
        return np.tile(np.arange(self.costs.arch.heads), self.costs.arch.blocks)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each subnet's pattern starts: int64 [subnets]."""
        return pattern_starts(self.costs.arch, self.active, self.rotation)

    @cached_property
    def has_fixed(self) -> np.ndarray:
        """Subnets whose fixed parameters the client has: bool [blocks, heads]."""
        if self.cached is not None:
            return self.cached
        return np.zeros((self.costs.arch.blocks, self.costs.arch.heads), dtype=bool)

    @property
    def rank_steps(self) -> np.ndarray:
        """By how much each rank that is offered is above the one before: int64 [ranks]."""
        return np.diff(self.patterns.ranks, prepend=0)

    def examples_of(self, operation: Operation, sizes: np.ndarray) -> np.ndarray:
        """Count the examples on which options do an operation: int64 [subnets, options].

        Args:
            operation: The operation.
            sizes: Examples of each slot: int64 [slots].
        """
        does = self.patterns.operations == operation  # [options, starts, slots]
        return (does @ sizes).T[self.starts]

    # -- of options ------------------------------------------------------------------------------

    def items(self) -> np.ndarray:
        """Price the options of subnets: int64 [subnets, options, 5]."""
        items = np.zeros((len(self.head), len(self.patterns.full), LATER + 1), dtype=np.int64)
        items[..., FLOPS] = self.flops_of_options()
        items[..., UP] = self.bytes_up_of_options()
        items[..., DOWN] = self.bytes_down_of_options()
        for phase in self.phases:
            items[..., phase.resource] = self.memory_of_options(phase)
        if self.costs.calibrating:
            items[..., [UP, *MEMORIES]] += self.means_of_options()[..., None]
        return items

    def flops_of_options(self) -> np.ndarray:
        """Price FLOPs: int64 [subnets, options].

        An option pays for its operations, and for multiplying out the part of its factors that does
        not train.
        """
        costs, patterns = self.costs, self.patterns
        flops = np.zeros((len(self.head), len(patterns.full)), dtype=np.int64)
        for operation in (Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL):
            flops += self.examples_of(operation, self.totals) * self.flops_of_operation(operation)
        unused = (patterns.runs > 0) * (costs.arch.rank - patterns.rank)
        return flops + costs.round_flops.of_merging.ravel()[:, None] * unused

    def flops_of_operation(self, operation: Operation) -> np.ndarray:
        """Price an operation on one example: int64 [subnets, 1], or [subnets, options] under LoRA.

        The cost model counts FULL at the largest rank, and the block's part of FULL is in what
        opening it costs. Of any other operation a head that trains pays the block's part itself.
        """
        costs, rank = self.costs, self.patterns.rank
        flops = costs.round_flops.of_operations[operation][self.head, None]
        if not costs.arch.rank:
            return flops
        near = costs.round_flops.by_branch.near[operation, 1].sum(axis=0)[self.head, None]
        if operation is Operation.FULL:
            return flops + near * (rank - costs.arch.rank)
        return flops + (near + costs.round_flops.of_blocks[operation]) * rank

    def bytes_up_of_options(self) -> np.ndarray:
        """Price bytes up: the slices of options that train, in [subnets, options]."""
        parts = self.costs.parts
        up = ELEMENT * self.by_rank(parts.whole.sliced, parts.ranked.sliced)
        spared = self.costs.communication.spared_up.ravel()[:, None]
        return up - spared * (self.patterns.full > 0)

    def bytes_down_of_options(self) -> np.ndarray:
        """Price bytes down: slices of resident options that the client does not have."""
        parts = self.costs.parts
        down = ELEMENT * (parts.loose.sliced + parts.fixed.sliced * ~self.has_fixed)
        down = down - self.costs.communication.spared_down
        return down.ravel()[:, None] * (self.patterns.runs > 0)

    def memory_of_options(self, phase: MemoryPhase) -> np.ndarray:
        """Price memory from below: bytes, int64 [subnets, options].

        An option pays for its weights, what trains beside them, and what it saves for backward.
        """
        costs, parts = self.costs, self.costs.parts
        resident = self.by_rank(
            phase.copies * parts.whole.sliced,
            parts.factors.sliced + phase.copies * parts.ranked.sliced,
        )
        resident = resident + parts.base.sliced.ravel()[:, None] * (self.patterns.runs > 0)
        start = costs.communication.kept.ravel()[:, None] * (self.patterns.full > 0)
        return ELEMENT * resident + start + self.saved_by_options(phase)

    def saved_by_options(self, phase: MemoryPhase) -> np.ndarray | int:
        """Price what options save for backward: bytes, int64 [subnets, options]; 0 checkpointed."""
        if self.costs.options.checkpointing:
            return 0
        activations = self.costs.activations
        alive = activations.alive.sum(axis=0)[self.head, None]
        full = (activations.full + activations.dropped).sum(axis=0)[self.head, None]
        n_full = self.examples_of(Operation.FULL, phase.sizes)
        n_frozen = self.examples_of(Operation.FROZEN, phase.sizes)
        return (alive * (n_full + n_frozen) + full * n_full) // phase.micro_batches

    def means_of_options(self) -> np.ndarray:
        """Price the means that a calibrating client measures: bytes, int64 [subnets, options]."""
        widths = np.array(self.costs.arch.widths).sum(axis=0)[self.head][:, None]
        return ELEMENT * self.costs.arch.tokens * widths * (self.patterns.runs > 0)

    def by_rank(self, whole: np.ndarray, ranked: np.ndarray) -> np.ndarray:
        """Count what options that train have: int64 [subnets, options].

        Args:
            whole: What they have whatever the rank: int64 [blocks, heads].
            ranked: What they have per rank: int64 [blocks, heads].
        """
        trains, rank = self.patterns.full > 0, self.patterns.rank
        return whole.ravel()[:, None] * trains + ranked.ravel()[:, None] * rank

    # -- of opening blocks -----------------------------------------------------------------------

    def openings(self) -> np.ndarray:
        """Price opening blocks to each level: int64 [blocks, levels, 5]."""
        levels = TRAINED + len(self.rank_steps)
        openings = np.zeros((self.costs.arch.blocks, levels, LATER + 1), dtype=np.int64)
        openings[..., FLOPS] = self.flops_of_openings(levels)
        openings[..., UP] = self.bytes_up_of_openings(levels)
        openings[:, RESIDENT, DOWN] = self.bytes_down_of_openings()
        for phase in self.phases:
            openings[..., phase.resource] = self.memory_of_openings(phase, levels)
        if self.patterns.below.any():
            return openings
        # Without FROZEN nothing is live without being trained.
        openings[:, TRAINED] += openings[:, LIVE]
        return np.delete(openings, LIVE, axis=1)

    def flops_of_openings(self, levels: int) -> np.ndarray:
        """Price the block's part of LoRA's factors: FLOPs, int64 [levels]."""
        flops = np.zeros(levels, dtype=np.int64)
        examples = int(self.totals[: self.active].sum())
        per_rank = self.costs.round_flops.of_blocks[Operation.FULL] * examples
        flops[TRAINED:] = per_rank * self.rank_steps
        return flops

    def bytes_up_of_openings(self, levels: int) -> np.ndarray:
        """Price what a block's subnets share on its way up: bytes, int64 [blocks, levels]."""
        parts = self.costs.parts
        up = np.zeros((self.costs.arch.blocks, levels), dtype=np.int64)
        up[:, TRAINED] = ELEMENT * parts.whole.shared + TENSOR_HEADER * parts.trained.tensors
        up[:, TRAINED:] += ELEMENT * parts.ranked.shared[:, None] * self.rank_steps
        if self.costs.calibrating:
            up[:, RESIDENT] += 2 * TENSOR_HEADER
        return up

    def bytes_down_of_openings(self) -> np.ndarray:
        """Price what a block's subnets share on its way down: bytes, int64 [blocks]."""
        parts, has = self.costs.parts, self.has_fixed
        down = parts.loose.bytes_of_blocks + ELEMENT * parts.fixed.shared * ~has.any(axis=1)
        return down + TENSOR_HEADER * parts.fixed.tensors * ~has.all(axis=1)

    def memory_of_openings(self, phase: MemoryPhase, levels: int) -> np.ndarray:
        """Price what a block's subnets share in memory: bytes, int64 [blocks, levels]."""
        parts, ranks = self.costs.parts, np.array(self.patterns.ranks)
        live, trained, ranked = self.saved_by_block(phase)
        memory = np.zeros((self.costs.arch.blocks, levels), dtype=np.int64)
        memory[:, RESIDENT] = ELEMENT * parts.base.shared
        memory[:, LIVE] = live // phase.micro_batches
        saved = (trained + ranked * ranks) // phase.micro_batches
        memory[:, TRAINED:] = np.diff(saved, prepend=0)
        memory[:, TRAINED] += ELEMENT * phase.copies * parts.whole.shared
        per_rank = parts.factors.shared + phase.copies * parts.ranked.shared
        memory[:, TRAINED:] += ELEMENT * per_rank[:, None] * self.rank_steps
        return memory

    def saved_by_block(self, phase: MemoryPhase) -> tuple[int, int, int]:
        """Count what both branches of a block save of a batch, at least.

        Returns:
            Bytes where anything is live, besides where anything trains, and per rank of that.
        """
        b, least = self.costs.activations, int(phase.sizes[self.active - 1])
        inputs = 2 * b.stream * phase.total  # x, of all examples
        if self.costs.options.checkpointing:
            return inputs, 0, 0
        trained = int(b.keeps_y.sum()) * b.narrow + int(b.masked.sum())
        return inputs + 2 * b.statistics * least, trained * least, int(b.ranked.sum()) * least

    # -- of anything -----------------------------------------------------------------------------

    def constant(self) -> np.ndarray:
        """Price running anything at all: int64 [5]."""
        constant = np.zeros(LATER + 1, dtype=np.int64)
        constant[FLOPS] = self.costs.round_flops.outside * int(self.totals[: self.active].sum())
        constant[UP] = self.costs.parts.trained.outer_bytes + MESSAGE_HEADER
        constant[DOWN] = self.bytes_down_of_anything()
        for phase in self.phases:
            constant[phase.resource] = self.memory_of_anything(phase)
        if self.costs.compensated:  # at most; a block that skips nothing needs none of it
            arch = self.costs.arch
            skips = ELEMENT * arch.blocks * self.active * 2 * arch.tokens * arch.dim
            constant[DOWN] += skips + TENSOR_HEADER * arch.blocks
            constant[MEMORIES] += skips
        return constant

    def bytes_down_of_anything(self) -> int:
        """Price embedding, final part and headers on their way down, in bytes."""
        parts, communication = self.costs.parts, self.costs.communication
        down = parts.loose.outer_bytes + parts.fixed.outer_bytes * (not self.has_fixed.any())
        several_ranks = len(self.patterns.ranks) > 1
        return down + communication.message_bytes + communication.rank_bytes * several_ranks

    def memory_of_anything(self, phase: MemoryPhase) -> int:
        """Price embedding, final part, images and the classifier's activations, in bytes."""
        parts, total = self.costs.parts, phase.total
        outer = ELEMENT * (parts.base.outer + phase.copies * parts.trained.outer)
        images = ELEMENT * total * self.costs.arch.input_elements
        b = self.costs.activations
        # What branches save is priced with an input that the lowest one may not keep.
        loss = total * (b.outer + max(3 * b.scores - b.stream, 0)) // phase.micro_batches
        scores = (b.cast_scores or b.scores) - b.stream
        classifier = total * (b.outer + scores) // phase.micro_batches
        return outer + images + max(loss + b.classifier, classifier + b.gradient)

    def excess(self) -> np.ndarray:
        """Bound by how much the rest is priced too high: int64 [5]; 0 without LoRA."""
        excess = np.zeros(LATER + 1, dtype=np.int64)
        if not self.costs.arch.rank:
            return excess
        frozen = bool(self.patterns.below.any())
        excess[FLOPS] = self.excess_flops(frozen)
        checkpointing = self.costs.options.checkpointing
        slots = min(self.active, self.costs.arch.blocks)
        spared = self.costs.activations.spared_at_the_bottom(frozen, checkpointing, slots)
        for phase in self.phases:
            excess[phase.resource] = -(-spared * phase.total // phase.micro_batches)
        return excess

    def excess_flops(self, frozen: bool) -> int:
        """Bound by how much FLOPs are priced too high.

        Args:
            frozen: Whether FROZEN is offered.
        """
        costs, arch, totals = self.costs, self.costs.arch, self.totals[: self.active]
        per_example = costs.round_flops.by_branch.spared_at_the_bottom(arch.trains, arch.rank)
        if len(totals) > 1:
            # Of a block in a slot: that nobody is FULL there, and that each head pays for the rest.
            others = [Operation.FORWARD_ONLY, Operation.FROZEN][: 1 + frozen]
            rest = (arch.heads - 1) * costs.round_flops.of_blocks[others].max()
            shared = costs.round_flops.of_blocks[Operation.FULL] + rest
            per_example += arch.blocks * arch.rank * int(shared)
        return per_example * int(totals.sum())
