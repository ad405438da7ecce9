"""What a schedule costs: FLOPs, peak memory, bytes down and up, as integers.

Conventions. FLOPs are those of torch's ``FlopCounterMode``: 2 for a multiply-add, products and
fused attention only. A linear layer costs ``2 m n k`` forward and twice that backward; fused
attention two products forward and five backward (it recomputes one). Bytes are of float32.

With T tokens, head width d, feed-forward slice f_h and model width D, subnet (block, h) costs per
example

    forward   2 T (4 d D + 2 f_h D) + 4 T^2 d
    backward  4 T (4 d D + 2 f_h D) + 10 T^2 d

FORWARD_ONLY pays the first, FULL both: the input gradient of the products is always wanted, by
the block's norm if by nothing below. Saved for backward, per example: with the first FULL subnet
of a block, whole, the inputs and outputs of both norms with their statistics, 4 T D + 4 T (and
2 T D more with layer scale); for every FULL subnet queries, keys, values, the attention output
and its log-sum, and both sides of the activation: T (4 d + 1 + 2 f_h). That is 4 + 12 = 16 units
of T D for a usual block with everything FULL.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.subnets import (
    Architecture,
    Kind,
    Operation,
    Schedule,
    down_spec,
    slot_sizes,
    slot_totals,
    up_spec,
)
from d2ft_fl.training import LocalOptions

RESOURCES = ("flops", "memory", "bytes_up", "bytes_down")
ELEMENT = 4  # bytes of a float32
TENSOR_HEADER = 160  # bytes that name, shape and place of one tensor take on the wire, at most
MESSAGE_HEADER = 2048  # bytes a message takes beside tensors and schedule, at most
MEMORY_MARGIN = 32  # 1/32 on top for the small tensors that the formula passes over
MOMENTS = {"adamw": 2, "sgd": 1}  # tensors of optimiser state per trained tensor


@dataclass(frozen=True)
class Cost:
    """What one client spends in one round."""

    flops: int = 0
    memory: int = 0  # bytes, at the peak
    bytes_up: int = 0
    bytes_down: int = 0

    def vector(self) -> np.ndarray:
        """int64 [4], in the order of ``RESOURCES``."""
        return np.array([getattr(self, r) for r in RESOURCES], dtype=np.int64)


@dataclass(frozen=True)
class Elements:
    """Parameter counts of an architecture, by what they belong to."""

    sliced: np.ndarray  # int64 [blocks, heads]
    feed_forward: np.ndarray  # the part of `sliced` in the feed-forward layer
    shared: np.ndarray  # int64 [blocks]
    embedding: int
    final: int

    @classmethod
    def of(cls, arch: Architecture) -> "Elements":
        """Counted from the parameters."""
        sliced = np.zeros((arch.blocks, arch.heads), dtype=np.int64)
        feed_forward = np.zeros_like(sliced)
        shared = np.zeros(arch.blocks, dtype=np.int64)
        for p in arch.of_kind(Kind.SLICED):
            elements = np.array([p.numel // p.shape[p.axis] * len(rows) for rows in p.rows])
            sliced[p.block] += elements
            if p.role.startswith("fc"):
                feed_forward[p.block] += elements
        for p in arch.of_kind(Kind.SHARED):
            shared[p.block] += p.numel
        embedding = sum(p.numel for p in arch.of_kind(Kind.EMBEDDING))
        final = sum(p.numel for p in arch.of_kind(Kind.FINAL))
        return cls(sliced, feed_forward, shared, embedding, final)


@dataclass(frozen=True)
class CostModel:
    """Costs of schedules of one model under one way of local training."""

    arch: Architecture
    options: LocalOptions
    slots: int

    # -- FLOPs -------------------------------------------------------------------------------

    @cached_property
    def forward_flops(self) -> np.ndarray:
        """FLOPs of running each head's subnet forward on one example: int64 [heads]."""
        linear, attention = self._products
        return 2 * linear + 2 * attention

    @cached_property
    def full_flops(self) -> np.ndarray:
        """FLOPs of running each head's subnet FULL on one example: int64 [heads]."""
        linear, attention = self._products
        return 6 * linear + 7 * attention

    @cached_property
    def _products(self) -> tuple[np.ndarray, np.ndarray]:
        """Multiply-adds of the linear layers, and FLOPs of one attention product: [heads]."""
        a = self.arch
        hidden = np.array(a.hidden, dtype=np.int64)
        linear = a.tokens * (4 * a.head_dim * a.dim + 2 * hidden * a.dim)
        return linear, np.full(a.heads, 2 * a.tokens**2 * a.head_dim, dtype=np.int64)

    @property
    def base_flops(self) -> int:
        """FLOPs of one example outside the blocks: embedding forward, classifier forth and back."""
        return self.arch.embed_flops + 6 * self.arch.dim * self.arch.classes

    def flops(self, schedule: Schedule, examples: int) -> int:
        """FLOPs of one round of local training on ``examples`` examples."""
        per_slot = self.base_flops * schedule.active.astype(np.int64)
        for operation, flops in (
            (Operation.FORWARD_ONLY, self.forward_flops),
            (Operation.FULL, self.full_flops),
        ):
            per_slot = per_slot + (schedule.operations == operation).sum(axis=1) @ flops
        return int(per_slot @ np.array(self.slot_totals(examples), dtype=np.int64))

    def slot_totals(self, examples: int) -> list[int]:
        """Examples each slot sees in one round."""
        return slot_totals(examples, self.options.batch_size, self.slots, self.options.epochs)

    # -- memory ------------------------------------------------------------------------------

    @cached_property
    def elements(self) -> "Elements":
        """Parameter counts of the model."""
        return Elements.of(self.arch)

    @cached_property
    def saved_slice(self) -> np.ndarray:
        """Elements saved per example for each FULL head: int64 [heads]."""
        a = self.arch
        hidden = np.array(a.hidden, dtype=np.int64)
        return a.tokens * (4 * a.head_dim + 1 + 2 * hidden)

    @property
    def saved_block(self) -> int:
        """Elements saved per example with the first FULL head of a block."""
        a = self.arch
        return a.tokens * ((6 if a.layer_scale else 4) * a.dim + 4)

    @property
    def saved_outer(self) -> int:
        """Elements saved per example by final norm, classifier and loss, and the input tokens."""
        a = self.arch
        norm = 2 * a.dim + 2 if a.pooled else 2 * a.tokens * a.dim + 2 * a.tokens
        return norm + 2 * a.classes + 2

    def saved_per_block(self, schedule: Schedule, slot: int, examples: int) -> np.ndarray:
        """Elements each block saves for backward in one micro-batch: int64 [blocks].

        With several slots the FULL weights of a slot may be a choice of the trained ones; the
        copy that is made of them is saved too.
        """
        full = schedule.operations[slot] == Operation.FULL  # [blocks, heads]
        copied = full & (full != schedule.trained).any(axis=1, keepdims=True)
        per_example = full.any(axis=1) * self.saved_block + full @ self.saved_slice
        return examples * per_example + (copied * self.elements.sliced).sum(axis=1)

    def saved_bytes(self, schedule: Schedule, slot: int, examples: int) -> int:
        """Bytes saved for backward by one micro-batch when its forward pass is over."""
        saved = self.saved_per_block(schedule, slot, examples).sum() + examples * self.saved_outer
        return ELEMENT * int(saved)

    def peak_bytes(self, schedule: Schedule, slot: int, examples: int) -> int:
        """Peak bytes of one micro-batch on top of what is held.

        A block's work finds the saved tensors of the blocks up to it alive, forward as backward.
        On top of them come: backward through the feed-forward layer, the gradients of the
        residual stream, of the hidden units and of one weight (where FULL weights were gathered,
        autograd returns their gradients late, into one as wide as all that trains); forward
        through what keeps no graph, three widths of the stream (two where the others are saved),
        both sides of the activation and the copies of weights.
        """
        a, e = self.arch, self.elements
        hidden = np.array(a.hidden, dtype=np.int64)
        stream = examples * a.tokens * a.dim
        operations = schedule.operations[slot]
        full, silent = operations == Operation.FULL, operations == Operation.FORWARD_ONLY
        opened = full.any(axis=1)
        alive = np.cumsum(self.saved_per_block(schedule, slot, examples))

        units = examples * a.tokens * (full @ hidden)  # [blocks]
        backward = alive + stream + units + (full @ hidden) * a.dim
        late = alive + 2 * stream - 2 * units + (schedule.trained @ hidden) * a.dim
        gathered = (full != schedule.trained).any(axis=1)
        backward = np.where(gathered, np.maximum(backward, late), backward)
        copies = np.zeros(a.blocks, dtype=np.int64)
        for store in (schedule.trained, schedule.resident & ~schedule.trained):
            chosen = silent & store
            some = (chosen != store).any(axis=1, keepdims=True)
            copies += ((chosen & some) * e.feed_forward).sum(axis=1)
        forward = (3 - opened) * stream + 2 * examples * a.tokens * (silent @ hidden) + copies

        outer = examples * self.saved_outer + stream
        peaks: list[np.ndarray] = [
            np.where(opened, backward, 0),
            alive + np.where(silent.any(axis=1), forward, 0),
            np.array([alive[-1] + outer, 3 * stream]),
        ]
        return ELEMENT * max(int(np.max(peak)) for peak in peaks)

    def held_bytes(self, schedule: Schedule, moments: bool = True) -> int:
        """Bytes of weights, gradients and (after the first step) optimiser state."""
        e, resident, trained = self.elements, schedule.resident, schedule.trained
        copies = 1 + (MOMENTS[self.options.optimizer] if moments else 0)
        elements = e.embedding + (1 + copies) * e.final
        elements += e.sliced[resident].sum() + copies * e.sliced[trained].sum()
        elements += e.shared[resident.any(axis=1)].sum()
        elements += copies * e.shared[trained.any(axis=1)].sum()
        return ELEMENT * int(elements)

    def memory(self, schedule: Schedule, examples: int) -> int:
        """Peak bytes of one round: what is held, plus the worst micro-batch.

        The first batch finds no optimiser state yet; it counts in every later one.
        """
        first, later = self.batch_extremes(examples)
        peak = max(
            self.held_bytes(schedule, moments=False) + self._batch_bytes(schedule, first),
            self.held_bytes(schedule) + self._batch_bytes(schedule, later),
        )
        return peak + peak // MEMORY_MARGIN

    def batch_extremes(self, examples: int) -> tuple[int, int]:
        """Examples of the first batch of a round, and of the largest later one (0: none)."""
        first = min(examples, self.options.batch_size)
        return first, first if self.options.epochs > 1 else min(examples - first, first)

    def _batch_bytes(self, schedule: Schedule, batch: int) -> int:
        """Bytes of a batch of images and of its worst micro-batch."""
        if batch == 0:
            return 0
        worst = 0
        for slot, size in enumerate(slot_sizes(batch, schedule.slots)):
            if size and schedule.active[slot]:
                worst = max(worst, self.peak_bytes(schedule, slot, size))
        return worst + ELEMENT * batch * self.arch.input_elements

    # -- bytes -------------------------------------------------------------------------------

    def bytes_down(self, schedule: Schedule) -> int:
        """Bytes that travel to the client: its slices, their headers, the schedule."""
        return _wire(down_spec(self.arch, schedule)) + MESSAGE_HEADER + 2 * schedule.operations.size

    def bytes_up(self, schedule: Schedule) -> int:
        """Bytes that come back: trained slices and their headers."""
        return _wire(up_spec(self.arch, schedule)) + MESSAGE_HEADER

    # -- together ----------------------------------------------------------------------------

    def cost(self, schedule: Schedule, examples: int) -> Cost:
        """Everything one round costs a client. Sitting out costs nothing."""
        if schedule.sits_out or examples == 0:
            return Cost()
        return Cost(
            self.flops(schedule, examples),
            self.memory(schedule, examples),
            self.bytes_up(schedule),
            self.bytes_down(schedule),
        )

    def everything(self) -> Schedule:
        """Every subnet FULL in every slot."""
        return Schedule.filled(Operation.FULL, self.slots, self.arch.blocks, self.arch.heads)

    @lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the run's one cost model
    def full_cost(self, examples: int) -> Cost:
        """The cost of fully fine-tuning the model on this many examples: what 100 % means.

        Its memory is that of whole batches; slots would need less.
        """
        one_slot = CostModel(self.arch, self.options, slots=1)
        cost = self.cost(self.everything(), examples)
        return replace(cost, memory=one_slot.memory(one_slot.everything(), examples))


def _wire(spec: dict[str, tuple[int, ...]]) -> int:
    data = sum(ELEMENT * int(np.prod(shape)) for shape in spec.values())
    return data + TENSOR_HEADER * len(spec)
