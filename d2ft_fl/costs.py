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

**Saved for backward**, in a pass with N examples, n_l of them live in the block (something FULL or
FROZEN), n_t training in it (something FULL), with elements of c bytes (4, or 2 in bfloat16):

    a block's two branches, each   4 N T D + 8 n_l T + c n_t T D    x, statistics, y
                                   (+ c N T D with layer scale, where anything trains)
    a FULL or FROZEN subnet        c T (4 d + f) + 4 T              q, k, v, output; log-sum; hidden
    a FULL one besides             c T f                            activated hidden

which is 4 + 12 = 16 units of T D for a usual block with everything FULL, and 4 at least: that is
why opening a block is a charge of its own. Head norms, gates and dropout add what ``Saved`` says.
Checkpointed, only x stays. **Transients** come on top and count as a maximum over time: see
:meth:`CostModel.peak_bytes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.compensation import mean_spec, skip_spec
from d2ft_fl.pieces import cover, storage_order
from d2ft_fl.subnets import (
    Architecture,
    Kind,
    Operation,
    Schedule,
    down_spec,
    passes,
    slot_sizes,
    slot_totals,
    up_spec,
)
from d2ft_fl.timm_vit import fused_attention
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
    shared: np.ndarray  # int64 [blocks]
    embedding: int
    final: int

    @classmethod
    def of(cls, arch: Architecture) -> "Elements":
        """Counted from the parameters."""
        sliced = np.zeros((arch.blocks, arch.heads), dtype=np.int64)
        shared = np.zeros(arch.blocks, dtype=np.int64)
        for p in arch.of_kind(Kind.SLICED):
            elements = np.array([p.numel // p.shape[p.axis] * len(rows) for rows in p.rows])
            sliced[p.block] += elements
        for p in arch.of_kind(Kind.SHARED):
            shared[p.block] += p.numel
        embedding = sum(p.numel for p in arch.of_kind(Kind.EMBEDDING))
        final = sum(p.numel for p in arch.of_kind(Kind.FINAL))
        return cls(sliced, shared, embedding, final)


@dataclass(frozen=True)
class CostModel:
    """Costs of schedules of one model under one way of local training.

    Attributes:
        device: ``cpu`` or ``cuda``.
        compensated: Whether shortcuts are compensated: down, and held, 2 T D elements for every
            block and distinct set of heads that a slot skips.
        calibrating: Whether clients measure means in this round: up, and held, T (d + f) elements
            a resident subnet.
    """

    arch: Architecture
    options: LocalOptions
    slots: int
    device: str = "cpu"
    compensated: bool = False
    calibrating: bool = False

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
        effective = schedule.effective  # [slots, blocks, heads]
        heads = np.arange(self.arch.heads)
        per_slot = self.operation_flops[effective, heads].sum(axis=(1, 2))
        per_slot = per_slot + self.base_flops * schedule.active
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
    def saved(self) -> "Saved":
        """Bytes saved for backward, by what they belong to."""
        return Saved.of(self.arch, self.options, self.fused, self.device)

    def saved_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Bytes saved for backward by one pass when its forward pass is over.

        Args:
            sizes: Examples of each slot in the pass.
        """
        saved = _Pass.of(self, schedule, sizes).saved.sum()
        return int(saved) + sum(sizes) * self.saved.outer + self.saved.classifier

    def peak_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Peak bytes of one pass, beyond what is held before it.

        The largest of what is alive at these moments, with a stream for one tensor [N, T, D]:

        * forward in a branch: what lower branches saved, x, y, the sum, and for the piece at hand
          its products in and its z (saved or not);
        * backward in a branch: what it and lower ones saved, the gradient that arrives, the
          gradient of y, and for all FULL pieces, then all FROZEN ones, the gradients of z and of
          products in (of q, k, v twice, when they are put together);
        * after it: the gradient of x in place of the piece's;
        * the classifier, with everything saved; the embedding, with nothing.
        """
        return _Pass.of(self, schedule, sizes).peak()

    def held_bytes(self, schedule: Schedule, moments: bool = True) -> int:
        """Bytes of weights, gradients and (after the first step) optimiser state."""
        e, resident, trained = self.elements, schedule.resident, schedule.trained
        copies = 1 + (MOMENTS[self.options.optimizer] if moments else 0)
        elements = e.embedding + (1 + copies) * e.final
        elements += e.sliced[resident].sum() + copies * e.sliced[trained].sum()
        elements += e.shared[resident.any(axis=1)].sum()
        elements += copies * e.shared[trained.any(axis=1)].sum()
        return ELEMENT * int(elements) + sum(self._extra(schedule))

    def _extra(self, schedule: Schedule) -> tuple[int, int]:
        """Bytes of compensation, and of measured means."""
        skips = skip_spec(self.arch, schedule) if self.compensated else {}
        means = mean_spec(self.arch, schedule) if self.calibrating else {}
        return _data(skips), _data(means)

    def memory(self, schedule: Schedule, examples: int) -> int:
        """Peak bytes of one round: what is held, plus the worst pass.

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
        """Bytes of a batch of images and of its worst pass."""
        if batch == 0:
            return 0
        images = ELEMENT * batch * self.arch.input_elements
        running = sum(
            size
            for size, on in zip(slot_sizes(batch, schedule.slots), schedule.active, strict=True)
            if on
        )
        if running < batch:  # those that run are put together in a batch of their own
            images += ELEMENT * running * self.arch.input_elements
        return images + max(
            (self.peak_bytes(schedule, sizes) for sizes in self.passes(schedule, batch)), default=0
        )

    def passes(self, schedule: Schedule, batch: int) -> list[list[int]]:
        """Examples of each slot, for the passes that a batch of this size is run in."""
        sizes = slot_sizes(batch, schedule.slots)
        return passes(sizes, schedule.active.tolist(), self.options.accumulate)

    # -- bytes -------------------------------------------------------------------------------

    def bytes_down(self, schedule: Schedule) -> int:
        """Bytes that travel to the client: its slices, compensation, headers, the schedule."""
        spec = down_spec(self.arch, schedule)
        if self.compensated:
            spec |= skip_spec(self.arch, schedule)
        return _wire(spec) + MESSAGE_HEADER + 2 * schedule.operations.size

    def bytes_up(self, schedule: Schedule) -> int:
        """Bytes that come back: trained slices, means, and their headers."""
        spec = up_spec(self.arch, schedule)
        if self.calibrating:
            spec |= mean_spec(self.arch, schedule)
        return _wire(spec) + MESSAGE_HEADER

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


@dataclass(frozen=True)
class Saved:
    """Bytes that one example leaves for the backward pass, by what they belong to.

    Attributes:
        stream: One [tokens, dim] tensor in float32: the residual stream.
        narrow: The same in the type of products.
        statistics: Of one norm, per live example.
        normed: What a root mean square norm keeps besides, to train its weight.
        alive: Of a FULL or FROZEN subnet: int64 [2 branches, heads].
        full: Of a FULL one besides.
        hidden: What goes into a piece's middle, and what comes out: int64 [2, 2, heads].
        weights: Of a product in, in the type of products: int64 [2, heads]; not per example.
        outer: Of final norm, classifier and loss.
        classifier: Of the classifier's weight, once a pass, where it is cast.
        scaled: Whether a layer scale keeps the sum.
        mask: Of dropout on the sum, where there is one.
    """

    stream: int
    narrow: int
    statistics: int
    normed: int
    alive: np.ndarray
    full: np.ndarray
    hidden: np.ndarray
    weights: np.ndarray
    outer: int
    classifier: int
    scaled: bool
    mask: int

    @classmethod
    def of(cls, a: Architecture, options: LocalOptions, fused: bool, device: str) -> "Saved":
        """By architecture and precision; see the module's docstring."""
        c = 2 if options.precision == "bf16" else ELEMENT
        t, d, hidden = a.tokens, a.head_dim, np.array(a.hidden, dtype=np.int64)
        one = np.ones(a.heads, dtype=np.int64)
        attention = c * 4 * t * d + ELEMENT * t
        if not fused:  # scaled q and k, attention weights; with dropout their mask and product
            weights = (3 if a.attention_dropout else 1) * c * t * t
            attention = c * 6 * t * d + weights
        attention += a.head_norms * (c * t * d + 2 * ELEMENT * t)  # what was normed
        attention += 2 * c * t * d * a.gated  # before and behind the sigmoid
        mask = 1 if device == "cuda" else c  # bytes that dropout keeps of an element
        out = [attention * one, c * t * hidden + mask * t * hidden * bool(a.hidden_dropout)]
        # Normed heads lie otherwise in memory, so that the product out takes a copy.
        copies = a.gated + bool(a.head_norms) + a.rms * a.head_norms
        full = [c * t * d * copies * one, c * t * hidden]
        inward = [c * t * d * (4 if a.gated else 3) * one, c * t * hidden]
        drops = (2 if device == "cpu" else 1) * bool(a.hidden_dropout)  # mask and product
        extras = a.head_norms + bool(a.head_norms) + 2 * a.gated  # normed, copied; gate, product
        outward = [c * t * d * (1 + extras) * one, c * t * hidden * (1 + drops)]
        # Final norm: its input, and what the classifier's view of its output keeps alive.
        norm = ELEMENT * (a.dim * (1 + a.rms) + 2) * (1 if a.norm_pooled else t)
        norm += c * a.dim * (1 if a.norm_pooled or c < ELEMENT else t)
        return cls(
            stream=ELEMENT * t * a.dim,
            narrow=c * t * a.dim,
            statistics=2 * ELEMENT * t,
            normed=a.rms * ELEMENT * t * a.dim,
            alive=np.stack(out),
            full=np.stack(full),
            hidden=np.stack([np.stack(inward), np.stack(outward)], axis=1),
            weights=c * a.dim * np.stack([3 * d * one, hidden]),
            outer=norm + ELEMENT * (2 * a.classes + 2),
            classifier=c * a.dim * a.classes * (c < ELEMENT),
            scaled=a.layer_scale,
            mask=mask * t * a.dim * bool(a.output_dropout),
        )


@dataclass(frozen=True)
class _Pass:
    """Memory of one pass, branch by branch from the first: int64 [2 blocks] bytes each.

    Attributes:
        saved: Kept for backward.
        forward: On the way forward, at most, beside what lower branches saved.
        backward: On the way back, at most, beside what this and lower branches saved.
        outer: In the classifier, beside what all branches saved.
        embedding: In the embedding, at most.
    """

    saved: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    outer: int
    embedding: int

    @classmethod
    def of(cls, costs: CostModel, schedule: Schedule, sizes: Sequence[int]) -> "_Pass":
        """Work it out for some sizes of slots."""
        s, options = costs.saved, costs.options
        n = np.asarray(sizes, dtype=np.int64)
        total = int(n.sum())
        operations = schedule.effective
        full, frozen = operations == Operation.FULL, operations == Operation.FROZEN
        n_full = np.tensordot(n, full, axes=1)  # [blocks, heads]
        n_frozen = np.tensordot(n, frozen, axes=1)
        n_live = (n @ (full | frozen).any(axis=2))[:, None]  # [blocks, 1], as are the next
        n_trains = (n @ full.any(axis=2))[:, None]
        n_runs = (n @ (operations != Operation.SHORTCUT).any(axis=2))[:, None]
        cast = s.narrow != s.stream

        x = total * s.stream * (n_live > 0)
        norm = s.statistics * n_live + (s.narrow + s.normed) * n_trains
        summed = total * (s.narrow * s.scaled * (n_trains > 0) + s.mask * (n_live > 0))
        saved = np.repeat(x + summed, 2, axis=1)
        if not options.checkpointing:
            saved = saved + norm + (n_full + n_frozen) @ s.alive.T + n_full @ s.full.T

        def largest(
            operation: Operation, per_head: np.ndarray, together: bool = False
        ) -> np.ndarray:
            """Bytes [2, heads] an example and head, for the largest piece: [blocks, 2]."""
            return _largest(operations, operation, n, per_head, together)

        inward, outward = s.hidden[:, 0], s.hidden[:, 1]  # [2, heads]
        ahead = largest(Operation.FORWARD_ONLY, inward + outward)
        if options.checkpointing:
            for operation in (Operation.FULL, Operation.FROZEN):
                ahead = np.maximum(ahead, largest(operation, inward + outward))
        # The weights of a product are cast for as long as it takes.
        casts = cast * (schedule.resident @ s.weights.T)
        y = s.narrow * n_runs  # and for a moment, before it is cast, once more as it was
        ahead = np.maximum(ahead + casts, cast * s.stream * n_runs)
        stream = total * s.stream * (n_live == 0)  # where x is not saved it is there all the same
        forward = saved + ahead + stream + (n_runs > 0) * (y + total * s.narrow)

        # q, k and v get their gradients one by one and are then put together.
        back = inward * np.array([[2], [1]]) + outward
        again = back + s.alive if options.checkpointing else back
        middle = np.maximum(
            largest(Operation.FULL, again, together=True),
            largest(Operation.FROZEN, again, together=True),
        )
        if options.checkpointing:
            middle = middle + (s.statistics + s.narrow + s.normed) * n_live
        arriving = total * (s.stream * (1 + s.scaled) + s.narrow * cast)
        own = (s.narrow + s.stream * 3 * costs.arch.rms) * n_live
        backward = (n_live > 0) * (
            arriving + own + np.maximum(middle + casts, 2 * total * s.stream)
        )
        return cls(
            saved.reshape(-1),
            forward.reshape(-1),
            backward.reshape(-1),
            total * (s.outer + s.stream * (1 + 3 * costs.arch.rms)) + s.classifier,
            3 * total * s.stream,
        )

    def peak(self) -> int:
        """The most that is alive at once."""
        below = np.cumsum(self.saved) - self.saved
        moments = [below + self.forward, below + self.saved + self.backward]
        ends = [int(self.saved.sum()) + self.outer, self.embedding]
        return max(*(int(m.max(initial=0)) for m in moments), *ends)


def _largest(
    operations: np.ndarray,
    operation: Operation,
    n: np.ndarray,
    per_head: np.ndarray,
    together: bool,
) -> np.ndarray:
    """Bytes of an operation's largest piece, of each block and branch: int64 [blocks, 2].

    Args:
        operations: int8 [slots, blocks, heads]. n: Examples of each slot.
        per_head: Bytes of an example and head: int64 [2, heads].
        together: Take the pieces of a segment as one.
    """
    if len(n) == 1:  # one slot is one piece
        return n[0] * (operations[0] == operation) @ per_head.T
    found = np.zeros((operations.shape[1], 2), dtype=np.int64)
    for block in range(operations.shape[1]):
        column = np.ascontiguousarray(operations[:, block])
        for pieces in _pieces(column.tobytes(), len(n), operation):
            loads = [
                int(n[start:stop].sum()) * per_head[:, heads].sum(axis=1)
                for start, stop, heads in pieces
            ]
            load = np.sum(loads, axis=0) if together else np.max(loads, axis=0)
            found[block] = np.maximum(found[block], load)
    return found


@lru_cache(maxsize=1 << 16)
def _pieces(
    operations: bytes, slots: int, operation: Operation
) -> list[list[tuple[int, int, list[int]]]]:
    """The engine's pieces of one operation, segment by segment: of a block's [slots, heads]."""
    table = np.frombuffer(operations, dtype=np.int8).reshape(slots, -1)
    parts = cover(table, storage_order(table))
    return [part.pieces[operation] for part in parts if part.pieces[operation]]


def _data(spec: dict[str, tuple[int, ...]]) -> int:
    """Bytes of the tensors alone."""
    return sum(ELEMENT * int(np.prod(shape)) for shape in spec.values())


def _wire(spec: dict[str, tuple[int, ...]]) -> int:
    return _data(spec) + TENSOR_HEADER * len(spec)
