"""What a schedule costs: FLOPs, peak memory, bytes down and up, as integers.

**FLOPs** follow torch's ``FlopCounterMode``: 2 for a multiply-add, products and attention only.
With T tokens, head width d, feed-forward slice f and model width D, one example of one subnet has

    products in   P_in  = T D (3 d + f)      (4 d + f with an attention gate)
    products out  P_out = T D (d + f)
    attention     A = 2 T^2 d, the FLOPs of one of its products

    forward                 2 (P_in + P_out) + 2 A
    gradient through it     2 (P_in + P_out) + 5 A   (4 A without fused attention, see `timm_vit`)
    gradient of its weights 2 (P_in + P_out)
    again, if checkpointed  2 P_in + 2 A             (neither norm nor product out is needed twice)

FORWARD_ONLY pays the first, FROZEN the first, second and fourth, FULL all. Strictly below the
lowest block that trains in a slot FROZEN is FORWARD_ONLY. The embedding runs forward, and the
classifier forward, through and for its weights: 6 D classes.

**Memory** is what is held, plus the worst pass: see :mod:`d2ft_fl.memory`. **Bytes** are those of
tensors, and of headers at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.compensation import mean_spec, skip_spec
from d2ft_fl.memory import ELEMENT, PassMemory, Saved
from d2ft_fl.subnets import (
    Architecture,
    Kind,
    Operation,
    Schedule,
    effective,
    passes,
    slot_sizes,
    slot_totals,
)
from d2ft_fl.timm_vit import fused_attention
from d2ft_fl.training import LocalOptions

RESOURCES = ("flops", "memory", "bytes_up", "bytes_down")
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
    shared: np.ndarray  # int64 [blocks]
    embedding: int
    final: int

    @classmethod
    def of(cls, arch: Architecture) -> "Elements":
        """Counted from the parameters."""
        shared = np.zeros(arch.blocks, dtype=np.int64)
        for p in arch.of_kind(Kind.SHARED):
            shared[p.block] += p.numel
        embedding = sum(p.numel for p in arch.of_kind(Kind.EMBEDDING))
        final = sum(p.numel for p in arch.of_kind(Kind.FINAL))
        return cls(arch.subnet_sizes, shared, embedding, final)


@dataclass(frozen=True)
class CostModel:
    """Costs of schedules of one model under one way of local training.

    Attributes:
        device: ``cpu`` or ``cuda``.
        compensated: Whether shortcuts are compensated: down, and held, 2 T D elements for every
            block and distinct set of heads that a slot skips.
        calibrating: Whether clients measure means in this round: up, and held, T (d + f) elements
            a resident subnet.
        score_kinds: How many kinds of scores a scoring pass measures: up, one tensor each.
    """

    arch: Architecture
    options: LocalOptions
    slots: int
    device: str = "cpu"
    compensated: bool = False
    calibrating: bool = False
    score_kinds: int = 1

    # -- FLOPs -------------------------------------------------------------------------------

    @cached_property
    def _products(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Multiply-adds of the products in and out, [heads] each; FLOPs of an attention product."""
        a = self.arch
        hidden = np.array(a.hidden, dtype=np.int64)
        inward = a.tokens * a.dim * ((4 if a.gated else 3) * a.head_dim + hidden)
        outward = a.tokens * a.dim * (a.head_dim + hidden)
        return inward, outward, 2 * a.tokens**2 * a.head_dim

    @cached_property
    def operation_flops(self) -> np.ndarray:
        """FLOPs of each operation of each head on one example: int64 [operations, heads]."""
        inward, outward, attention = self._products
        products = 2 * (inward + outward)
        forward = products + 2 * attention
        through = products + (5 if self.fused else 4) * attention
        again = (2 * inward + 2 * attention) * self.options.checkpointing
        out = np.zeros((len(Operation), self.arch.heads), dtype=np.int64)
        out[Operation.FORWARD_ONLY] = forward
        out[Operation.FROZEN] = forward + through + again
        out[Operation.FULL] = forward + through + again + products
        return out

    @property
    def fused(self) -> bool:
        """Whether attention is torch's fused one."""
        a = self.arch
        return fused_attention(self.device, a.head_dim, a.attention_dropout)

    @property
    def base_flops(self) -> int:
        """FLOPs of one example outside the blocks: embedding forward, classifier forth and back."""
        return self.arch.embed_flops + 6 * self.arch.dim * self.arch.classes

    def flops(self, schedule: Schedule, examples: int) -> int:
        """FLOPs of one round of local training on ``examples`` examples."""
        return int(self._flops(schedule.operations[None], np.array([examples]))[0])

    def _flops(self, operations: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """FLOPs of many clients' rounds: int64 [clients]."""
        heads = np.arange(self.arch.heads)
        per_slot = self.operation_flops[effective(operations), heads].sum(axis=(2, 3))
        per_slot = per_slot + self.base_flops * _active(operations)  # [clients, slots]
        full, rest = np.divmod(examples, self.options.batch_size)
        whole = np.array(slot_sizes(self.options.batch_size, self.slots))
        totals = full[:, None] * whole + _sizes(rest, self.slots)
        return self.options.epochs * (per_slot * totals).sum(axis=1)

    def slot_totals(self, examples: int) -> list[int]:
        """Examples each slot sees in one round."""
        return slot_totals(examples, self.options.batch_size, self.slots, self.options.epochs)

    # -- memory ------------------------------------------------------------------------------

    @cached_property
    def elements(self) -> "Elements":
        """Parameter counts of the model."""
        return Elements.of(self.arch)

    @cached_property
    def saved(self) -> "Saved":
        """Bytes saved for backward, by what they belong to."""
        return Saved.of(self.arch, self.options, self.fused, self.device)

    def saved_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Bytes saved for backward by one pass when its forward pass is over.

        Args:
            sizes: Examples of each slot in the pass.
        """
        saved = self._pass(schedule, sizes).saved.sum()
        return int(saved) + sum(sizes) * self.saved.outer + self.saved.classifier

    def peak_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Peak bytes of one pass, beyond what is held before it; see :mod:`d2ft_fl.memory`."""
        return int(self._pass(schedule, sizes).peak()[0])

    def _pass(self, schedule: Schedule, sizes: Sequence[int]) -> PassMemory:
        return self._passes(schedule.operations[None], np.array([sizes]))

    def _passes(self, operations: np.ndarray, sizes: np.ndarray) -> PassMemory:
        """Memory of passes [passes, slots, blocks, heads] over ``sizes`` [passes, slots]."""
        resident = (operations != Operation.SHORTCUT).any(axis=1)
        checkpointing = self.options.checkpointing
        return PassMemory.of(self.saved, checkpointing, effective(operations), resident, sizes)

    def _held(self, operations: np.ndarray, moments: bool = True) -> np.ndarray:
        """Bytes of weights, gradients and (after the first step) optimiser state: [clients]."""
        e = self.elements
        resident, trained = _resident(operations), _trained(operations)
        copies = 1 + (MOMENTS[self.options.optimizer] if moments else 0)
        elements = e.embedding + (1 + copies) * e.final
        elements = elements + ((resident + copies * trained) * e.sliced).sum(axis=(1, 2))
        elements += ((resident.any(axis=2) + copies * trained.any(axis=2)) * e.shared).sum(axis=1)
        return ELEMENT * elements + self._each(operations, lambda s: _data(self._extra(s)))

    def _extra(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """What is held for compensation, by name."""
        return self._skips(schedule) | self._means(schedule)

    def _each(self, operations: np.ndarray, what: Callable[[Schedule], int]) -> np.ndarray:
        """Something about compensation, which does not add up, of every client: int64 [clients]."""
        if not (self.compensated or self.calibrating):
            return np.zeros(len(operations), dtype=np.int64)
        return np.array([what(Schedule(one)) for one in operations], dtype=np.int64)

    def _skips(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """Compensation that comes down, by name."""
        return skip_spec(self.arch, schedule) if self.compensated else {}

    def _means(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """Means that go up, by name."""
        return mean_spec(self.arch, schedule) if self.calibrating else {}

    def memory(self, schedule: Schedule, examples: int) -> int:
        """Peak bytes of one round: what is held, plus the worst pass.

        The first batch finds no optimiser state yet; it counts in every later one.
        """
        return int(self.memories(schedule.operations[None], np.array([examples]))[0])

    def memories(self, operations: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Peak bytes of many clients' rounds: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads]. examples: int64 [clients].
        """
        first = np.minimum(examples, self.options.batch_size)
        rest = first if self.options.epochs > 1 else np.minimum(examples - first, first)
        at_first = self._batches(operations, first)
        later = at_first.copy()  # the same but where batches are not
        if (other := first != rest).any():
            later[other] = self._batches(operations[other], rest[other])
        peak = np.maximum(
            self._held(operations, moments=False) + at_first, self._held(operations) + later
        )
        return peak + peak // MEMORY_MARGIN

    def batch_extremes(self, examples: int) -> tuple[int, int]:
        """Examples of the first batch of a round, and of the largest later one (0: none)."""
        first = min(examples, self.options.batch_size)
        return first, first if self.options.epochs > 1 else min(examples - first, first)

    def _batches(self, operations: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Bytes of a batch of images and of its worst pass: int64 [clients]."""
        shares = _sizes(batch, self.slots)
        running = shares * _active(operations)  # [clients, slots]
        ends = np.cumsum(np.pad(running, [(0, 0), (1, 0)]), axis=1)
        total = ends[:, -1]
        images = batch + np.where(total < batch, total, 0)  # put together in a batch of their own
        parts = self.options.accumulate
        cuts = np.cumsum(np.pad(_sizes(total, parts), [(0, 0), (1, 0)]), axis=1)
        within = np.clip(ends[:, None], cuts[:, :-1, None], cuts[:, 1:, None])
        sizes = np.diff(within, axis=2)  # [clients, parts, slots], as of `subnets.passes`
        peaks = [
            np.where(one.any(axis=1), self._passes(operations, one).peak(), 0)
            for one in sizes.swapaxes(0, 1)
        ]
        return ELEMENT * self.arch.input_elements * images + np.max(peaks, axis=0)

    def passes(self, schedule: Schedule, batch: int) -> list[list[int]]:
        """Examples of each slot, for the passes that a batch of this size is run in."""
        sizes = slot_sizes(batch, schedule.slots)
        return passes(sizes, schedule.active.tolist(), self.options.accumulate)

    # -- bytes -------------------------------------------------------------------------------

    def bytes_down(self, schedule: Schedule) -> int:
        """Bytes that travel to the client: its slices, compensation, headers, the schedule."""
        return int(self._down(schedule.operations[None])[0])

    def bytes_up(self, schedule: Schedule) -> int:
        """Bytes that come back: trained slices, means, and their headers."""
        return int(self._up(schedule.operations[None])[0])

    @cached_property
    def block_tensors(self) -> np.ndarray:
        """Tensors of each block: int64 [blocks]."""
        blocks = [p.block for p in self.arch.parameters if p.block >= 0]
        return np.bincount(blocks, minlength=self.arch.blocks)

    def _slices(self, which: np.ndarray) -> np.ndarray:
        """Bytes of these subnets [clients, blocks, heads] and what they share: int64 [clients]."""
        shared = ELEMENT * self.elements.shared + TENSOR_HEADER * self.block_tensors
        sliced = ELEMENT * self.elements.sliced
        return (which * sliced).sum(axis=(1, 2)) + (which.any(axis=2) * shared).sum(axis=1)

    def _down(self, operations: np.ndarray) -> np.ndarray:
        e, outer = self.elements, (Kind.EMBEDDING, Kind.FINAL)
        count = sum(len(self.arch.of_kind(kind)) for kind in outer)
        fixed = ELEMENT * (e.embedding + e.final) + TENSOR_HEADER * count
        fixed += MESSAGE_HEADER + 2 * int(np.prod(operations.shape[1:]))
        skips = self._each(operations, lambda s: _wire(self._skips(s)))
        return fixed + self._slices(_resident(operations)) + skips

    def _up(self, operations: np.ndarray) -> np.ndarray:
        final = len(self.arch.of_kind(Kind.FINAL))
        fixed = ELEMENT * self.elements.final + TENSOR_HEADER * final + MESSAGE_HEADER
        means = self._each(operations, lambda s: _wire(self._means(s)))
        return fixed + self._slices(_trained(operations)) + means

    # -- together ----------------------------------------------------------------------------

    def cost(self, schedule: Schedule, examples: int) -> Cost:
        """Everything one round costs a client. Sitting out costs nothing."""
        return Cost(*self.costs(schedule.operations[None], np.array([examples]))[0].tolist())

    def costs(self, operations: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """The same of many clients: int64 [clients, 4], in the order of ``RESOURCES``.

        Args:
            operations: int8 [clients, slots, blocks, heads]. examples: int64 [clients].
        """
        parts = (
            self._flops(operations, examples),
            self.memories(operations, examples),
            self._up(operations),
            self._down(operations),
        )
        works = operations.any(axis=(1, 2, 3)) & (examples > 0)
        return np.stack(parts, axis=1) * works[:, None]

    def everything(self) -> Schedule:
        """Every subnet FULL in every slot."""
        return Schedule.filled(Operation.FULL, self.slots, self.arch.blocks, self.arch.heads)

    def plain(self) -> "CostModel":
        """The costs of whole batches, without what trades FLOPs or time for memory."""
        options = self.options.plain()
        return replace(self, slots=1, options=options, compensated=False, calibrating=False)

    @lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the run's one cost model
    def full_cost(self, examples: int) -> Cost:
        """The cost of fully fine-tuning the model on this many examples: what 100 % means.

        In whole batches and without checkpointing: both would need less memory.
        """
        plain = self.plain()
        cost = plain.cost(plain.everything(), examples)
        return replace(cost, bytes_down=self.bytes_down(self.everything())) if examples else cost


def _resident(operations: np.ndarray) -> np.ndarray:
    return (operations != Operation.SHORTCUT).any(axis=1)  # [clients, blocks, heads]


def _trained(operations: np.ndarray) -> np.ndarray:
    return (operations == Operation.FULL).any(axis=1)  # [clients, blocks, heads]


def _active(operations: np.ndarray) -> np.ndarray:
    return (operations != Operation.SHORTCUT).any(axis=(2, 3))  # [clients, slots]


def _sizes(batch: np.ndarray, slots: int) -> np.ndarray:
    """:func:`slot_sizes` of many batches: int64 [clients, slots]."""
    return batch[:, None] // slots + (np.arange(slots) < batch[:, None] % slots)


def _data(spec: dict[str, tuple[int, ...]]) -> int:
    """Bytes of the tensors alone."""
    return sum(ELEMENT * int(np.prod(shape)) for shape in spec.values())


def _wire(spec: dict[str, tuple[int, ...]]) -> int:
    return _data(spec) + TENSOR_HEADER * len(spec)


@lru_cache(maxsize=64)
def scoring_cost(costs: CostModel, examples: int) -> Cost:
    """Cost of a scoring pass: one example at a time, everything FULL, the whole model down.

    Up goes one float32 [blocks, heads] for each of ``costs.score_kinds``. Memory and FLOPs are the
    same for any number of kinds: all are taken from the one gradient at hand.
    """
    if examples == 0:
        return Cost()
    # Gradients of the likelihood, so without dropout.
    still = replace(costs.arch, attention_dropout=0.0, hidden_dropout=0.0, output_dropout=0.0)
    one = replace(costs.plain(), arch=still)
    everything = one.everything()
    a = costs.arch
    flops = one.flops(everything, 1) * examples
    held = sum(p.numel for p in a.parameters) + examples * a.input_elements
    widest = max(p.numel for p in a.of_kind(Kind.SLICED))
    memory = ELEMENT * (held + 2 * widest) + one.peak_bytes(everything, [1])
    return Cost(
        flops,
        memory + memory // MEMORY_MARGIN,
        costs.score_kinds * (ELEMENT * a.blocks * a.heads + TENSOR_HEADER),
        costs.bytes_down(costs.everything()),
    )


def with_scoring(cost: Cost, scoring: Cost) -> Cost:
    """A round's cost with a scoring pass before it, for which everything has come down already."""
    return Cost(
        cost.flops + scoring.flops,
        max(cost.memory, scoring.memory),
        cost.bytes_up + scoring.bytes_up,
        scoring.bytes_down,
    )


def round_cost(costs: CostModel, schedule: Schedule, examples: int, score_examples: int) -> Cost:
    """Cost of a round, with the scoring pass before it, if any.

    The pass needs the whole model, of which the schedule then keeps its part, uncompensated.
    """
    if not score_examples:
        return costs.cost(schedule, examples)
    cost = replace(costs, compensated=False).cost(schedule, examples)
    return with_scoring(cost, scoring_cost(costs, score_examples))


def workload_variance(flops: Sequence[int]) -> float:
    """Variance over clients of their FLOPs, in units of the mean's square.

    D2FT (arXiv 2504.12471) reports the variance of the work of devices; 0 is an even load.
    """
    mean = float(np.mean(flops)) if len(flops) else 0.0
    return float(np.var(flops)) / mean**2 if mean else 0.0
