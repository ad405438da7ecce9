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

Under LoRA of rank r the weights of a FULL subnet pay nothing; for each product with factors, p rows
of it the subnet's (3 d or f in, d or f out), on each example

    a subnet that is FULL in any slot    forward 2 T p r, through it 2 T p r, of its factor 2 T p r
    its block, besides                   forward 2 T D r, through it 2 T D r, of the other 2 T D r

the block once a slot and operation of such subnets. Gradients pass through a product in only where
something below trains: in the lowest branch that trains they end at its factors. Factors of subnets
that never are FULL are folded into their weights, 2 p D r once a round. A subnet with a rank r_h of
its own pays in proportion to that, and folds the rest in, 2 p D (r - r_h); its block pays by the
largest rank of the subnets that do an operation in a slot.

**Memory** is what is held, plus the worst pass: see :mod:`d2ft_fl.costs.memory`. **Bytes**
are those of tensors, and of headers at most: see :mod:`d2ft_fl.costs.communication`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy, TrainingOptions
from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.costs.communication import Communication
from d2ft_fl.costs.compensation import Extras
from d2ft_fl.costs.flops import BranchFlops
from d2ft_fl.costs.memory import MicroBatchMemory
from d2ft_fl.costs.parameter_counts import Parts
from d2ft_fl.costs.resources import MEMORY_MARGIN, RESOURCES, Cost
from d2ft_fl.engine.attention import fused_attention
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import (
    Operation,
    Schedule,
    micro_batches,
    residents,
    slot_sizes,
    slot_totals,
    trainees,
)
from d2ft_fl.wire.quantization import check_bits
from d2ft_fl.wire.sizes import ELEMENT

CHUNK = 128  # clients whose costs are worked out at once: more take memory, and not less time
MOST_KNOWN = 4096  # costs that are kept
MOMENTS = {"adamw": 2, "sgd": 1}  # tensors of optimiser state per trained tensor


@dataclass(frozen=True)
class CostModel:
    """Costs of schedules of one model under one way of local training.

    Attributes:
        device: ``cpu`` or ``cuda``.
        compensated: Whether shortcuts are compensated: down, and held, 2 T D elements for every
            block and distinct set of heads that a slot skips.
        calibrating: Whether clients measure means in this round: up, and held, T (d + f) elements
            a resident subnet.
        tokens: T, of an example, that blocks see in training; 0 for all.
        bits_up, bits_down: Of numbers that travel; see :mod:`d2ft_fl.wire.quantization`. With fewer
            up than 32 the client keeps what it began with, as it came.
    """

    arch: Architecture
    options: TrainingOptions
    slots: int
    device: str = "cpu"
    compensated: bool = False
    calibrating: bool = False
    tokens: int = 0
    bits_up: int = PLAIN_BITS
    bits_down: int = PLAIN_BITS

    def under(self, policy: ExecutionPolicy) -> "CostModel":
        """The costs of going about it in some way; compensation is for tokens in their places.

        Raises:
            ConfigError: When fewer tokens are to be compensated, or there are not so many; for bits
                in which nothing can travel; for a batch that leaves slots without examples.
        """
        if policy == DEFAULT_POLICY:
            return self
        tokens, most = policy.tokens or 0, self.arch.tokens
        up, down = policy.bits_up or self.bits_up, policy.bits_down or self.bits_down
        check_bits(up, down)
        if tokens and not self.arch.prefix < tokens <= most:
            raise ConfigError(
                f"tokens = {tokens} of an example must be {self.arch.prefix + 1} to {most}"
            )
        if 0 < tokens < most and (self.compensated or self.calibrating):
            raise ConfigError(
                f"compensation adds a mean to each of {most} tokens, and cannot go with "
                f"tokens = {tokens}"
            )
        options = self.options.under(policy)
        if policy.batch is not None and policy.batch < self.slots:
            raise ConfigError(
                f"a batch of {policy.batch} has no example for each of {self.slots} slots"
            )
        return replace(self, options=options, tokens=tokens, bits_up=up, bits_down=down)

    @cached_property
    def seen(self) -> Architecture:
        """The architecture with as many tokens as blocks see."""
        return replace(self.arch, tokens=self.tokens) if self.tokens else self.arch

    # -- FLOPs -------------------------------------------------------------------------------

    @cached_property
    def branch_flops(self) -> "BranchFlops":
        """FLOPs of operations, by branch."""
        return BranchFlops.of(self.seen, self.fused, self.options.checkpointing)

    @cached_property
    def operation_flops(self) -> np.ndarray:
        """Most FLOPs of each operation of each head on one example: int64 [operations, heads].

        The most there can be: of a FULL subnet that has something that trains below it. What a
        block pays besides is in :attr:`block_flops`.
        """
        flops = self.branch_flops
        total = flops.base[:, 1].sum(axis=1)
        total[Operation.FULL] += self.arch.rank * flops.near[Operation.FULL, 1].sum(axis=0)
        return total

    @cached_property
    def block_flops(self) -> np.ndarray:
        """What a block pays besides where subnets that train do an operation: int64 [operations].

        Zero but under LoRA; on one example, at most, and by each of the largest rank.
        """
        return self.branch_flops.far[:, 1].sum(axis=1)

    @property
    def fused(self) -> bool:
        """Whether attention is torch's fused one."""
        attention = self.arch.attention
        return fused_attention(self.device, attention.head_width, attention.dropout)

    @property
    def base_flops(self) -> int:
        """FLOPs of one example outside the blocks: embedding forward, classifier forth and back."""
        return self.arch.embed_flops + 6 * self.arch.dim * self.arch.classes

    @cached_property
    def merge_flops(self) -> np.ndarray:
        """FLOPs of folding a subnet's factors into its weights, by rank: int64 [blocks, heads]."""
        weights = [
            p.role for p in self.arch.parameters if p.role.split(".")[0] in self.arch.targets
        ]
        roles = {role for role in weights if role.endswith(".weight")}
        sizes = self.arch.sliced_sizes(lambda p: p.role in roles and not p.factor)
        return 2 * sizes

    def flops(self, schedule: Schedule, examples: int) -> int:
        """FLOPs of one round of local training on ``examples`` examples."""
        ranks = self.ranks(schedule.operations[None], _one(schedule.ranks))
        return int(self._flops(schedule.operations[None], np.array([examples]), ranks)[0])

    def ranks(self, operations: np.ndarray, ranks: np.ndarray | None) -> np.ndarray:
        """At what rank subnets train, 0 for those that do not: int64 [clients, blocks, heads].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            ranks: Those of schedules; None for the architecture's.

        Raises:
            ConfigError: When subnets are to train at ranks that there are not.
        """
        trained, most = trainees(operations), self.arch.rank
        if ranks is None:
            return trained * np.int64(most)
        own = ranks[trained]
        if len(own) and not 1 <= own.min() <= own.max() <= most:
            raise ConfigError(
                f"subnets train at ranks 1 to {most}, not {own.min()} to {own.max()}"
                if most
                else "only LoRA has ranks: leave those of a schedule at None"
            )
        return trained * ranks

    def _flops(self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """FLOPs of many clients' rounds: int64 [clients]."""
        per_slot = self.branch_flops.per_slot(operations, self.arch.trains, ranks)
        per_slot += self.base_flops * _active(operations)  # [clients, slots]
        full, rest = np.divmod(examples, self.options.batch_size)
        whole = np.array(slot_sizes(self.options.batch_size, self.slots))
        totals = full[:, None] * whole + _sizes(rest, self.slots)
        flops = self.options.epochs * (per_slot * totals).sum(axis=1)
        if self.arch.rank:
            folded = residents(operations) * (self.arch.rank - ranks)
            flops += (folded * self.merge_flops).sum(axis=(1, 2))
        return flops

    def slot_totals(self, examples: int) -> list[int]:
        """Examples each slot sees in one round."""
        return slot_totals(examples, self.options.batch_size, self.slots, self.options.epochs)

    # -- memory ------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> Parts:
        """How much of the model there is of what."""
        return Parts(self.arch)

    @cached_property
    def extras(self) -> Extras:
        """What comes besides for compensation."""
        return Extras(self.arch, self.compensated, self.calibrating)

    @cached_property
    def activations(self) -> ActivationBytes:
        """Bytes of the activations of an example, by what they belong to."""
        return ActivationBytes.of(
            self.seen, self.options, self.fused, self.device, self.arch.tokens
        )

    def saved_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Bytes saved for backward by one pass when its forward pass is over.

        Args:
            sizes: Examples of each slot in the pass.
        """
        saved = self._micro_batch(schedule, sizes).saved.sum()
        return int(saved) + sum(sizes) * self.activations.outer + self.activations.classifier

    def peak_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Peak bytes of one pass beyond what is held before; see :mod:`d2ft_fl.costs.memory`."""
        return int(self._micro_batch(schedule, sizes).peak()[0])

    def _micro_batch(self, schedule: Schedule, sizes: Sequence[int]) -> MicroBatchMemory:
        ranks = self.ranks(schedule.operations[None], _one(schedule.ranks))
        return self._micro_batches(schedule.operations[None], np.array([sizes]), ranks)

    def _micro_batches(
        self, operations: np.ndarray, sizes: np.ndarray, ranks: np.ndarray
    ) -> MicroBatchMemory:
        """Memory of passes [passes, slots, blocks, heads] over ``sizes`` [passes, slots]."""
        checkpointing = self.options.checkpointing
        return MicroBatchMemory.of(self.activations, checkpointing, operations, sizes, ranks)

    def _held(self, operations: np.ndarray, ranks: np.ndarray, moments: bool = True) -> np.ndarray:
        """Bytes of weights, gradients and (after the first step) optimiser state: [clients]."""
        resident, trained = residents(operations), trainees(operations)
        copies = self.copies(moments)
        parts = self.parts
        elements = parts.base.outer + copies * parts.trained.outer + parts.base.elements(resident)
        elements = elements + copies * parts.whole.elements(trained)
        if self.arch.rank:
            elements += parts.factors.elements(ranks) + copies * parts.ranked.elements(ranks)
        kept = (trained * self.communication.kept).sum(axis=(1, 2))
        return ELEMENT * elements + kept + self.extras.held(operations)

    def copies(self, moments: bool) -> int:
        """Tensors held beside each that trains: gradient, optimiser state, where FedProx began.

        Args:
            moments: Whether there is optimiser state, as after the first step.
        """
        state = MOMENTS[self.options.optimizer] if moments else 0
        return 1 + state + (self.options.proximal > 0)

    def memory(self, schedule: Schedule, examples: int) -> int:
        """Peak bytes of one round: what is held, plus the worst pass.

        The first batch finds no optimiser state yet; it counts in every later one.
        """
        ranks = _one(schedule.ranks)
        return int(self.memories(schedule.operations[None], np.array([examples]), ranks)[0])

    def memories(
        self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray | None = None
    ) -> np.ndarray:
        """Peak bytes of many clients' rounds: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads]. examples: int64 [clients].
            ranks: See :meth:`ranks`.
        """
        own = self.ranks(operations, ranks)
        first = np.minimum(examples, self.options.batch_size)
        rest = first if self.options.epochs > 1 else np.minimum(examples - first, first)
        at_first = self._batches(operations, first, own)
        later = at_first.copy()  # the same but where batches are not
        if (other := first != rest).any():
            later[other] = self._batches(operations[other], rest[other], own[other])
        held = self._held(operations, own, moments=False)
        peak = np.maximum(held + at_first, self._held(operations, own) + later)
        return peak + peak // MEMORY_MARGIN

    def batch_extremes(self, examples: int) -> tuple[int, int]:
        """Examples of the first batch of a round, and of the largest later one (0: none)."""
        first = min(examples, self.options.batch_size)
        return first, first if self.options.epochs > 1 else min(examples - first, first)

    def _batches(self, operations: np.ndarray, batch: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Bytes of a batch of images and of its worst pass: int64 [clients]."""
        shares = _sizes(batch, self.slots)
        running = shares * _active(operations)  # [clients, slots]
        ends = np.cumsum(np.pad(running, [(0, 0), (1, 0)]), axis=1)
        total = ends[:, -1]
        images = batch + np.where(total < batch, total, 0)  # put together in a batch of their own
        parts = self.options.micro_batches
        cuts = np.cumsum(np.pad(_sizes(total, parts), [(0, 0), (1, 0)]), axis=1)
        within = np.clip(ends[:, None], cuts[:, :-1, None], cuts[:, 1:, None])
        sizes = np.diff(within, axis=2)  # [clients, parts, slots], as of `subnets.passes`
        if self.slots == 1:
            sizes = sizes[:, :1]  # the first is no smaller than any other
        peaks = [
            np.where(one.any(axis=1), self._micro_batches(operations, one, ranks).peak(), 0)
            for one in sizes.swapaxes(0, 1)
        ]
        return ELEMENT * self.arch.input_elements * images + np.max(peaks, axis=0)

    def micro_batches(self, schedule: Schedule, batch: int) -> list[list[int]]:
        """Examples of each slot, for the passes that a batch of this size is run in."""
        sizes = slot_sizes(batch, schedule.slots)
        return micro_batches(sizes, schedule.active.tolist(), self.options.micro_batches)

    # -- bytes -------------------------------------------------------------------------------

    @cached_property
    def communication(self) -> Communication:
        """Bytes that travel."""
        return Communication(self.parts, self.extras, self.slots, self.bits_up, self.bits_down)

    def bytes_down(self, schedule: Schedule) -> int:
        """Bytes that travel to a client that has nothing: slices, compensation, headers."""
        return int(
            self.communication.down(schedule.operations[None], None, _one(schedule.ranks))[0]
        )

    def bytes_up(self, schedule: Schedule) -> int:
        """Bytes that come back: trained slices, means, and their headers."""
        ranks = self.ranks(schedule.operations[None], _one(schedule.ranks))
        return int(self.communication.up(schedule.operations[None], ranks)[0])

    # -- together ----------------------------------------------------------------------------

    def cost(self, schedule: Schedule, examples: int, cached: np.ndarray | None = None) -> Cost:
        """Everything one round costs a client. Sitting out costs nothing.

        Args:
            holds: bool [blocks, heads], subnets whose fixed parameters the client has.
        """
        operations, ranks = schedule.operations[None], _one(schedule.ranks)
        tables = [None if t is None else t.tobytes() for t in (operations, ranks, cached)]

        def found() -> Cost:
            of_one = self.costs(operations, np.array([examples]), _one(cached), ranks)
            return Cost(*of_one[0].tolist())

        # Many clients do the same where a strategy has all do all.
        return self.known((operations.shape, examples, *tables), found)

    def known(self, key: Hashable, find: Callable[[], Cost]) -> Cost:
        """What ``find`` gives, which this model keeps by ``key``."""
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = find()
        return self._known[key]

    @cached_property
    def _known(self) -> dict[Hashable, Cost]:
        return {}

    def costs(
        self,
        operations: np.ndarray,
        examples: np.ndarray,
        cached: np.ndarray | None = None,
        ranks: np.ndarray | None = None,
    ) -> np.ndarray:
        """The same of many clients: int64 [clients, 4], in the order of ``RESOURCES``.

        Args:
            operations: int8 [clients, slots, blocks, heads]. examples: int64 [clients].
            holds: bool [clients, blocks, heads]; None for nothing.
            ranks: See :meth:`ranks`.
        """
        found = np.zeros((len(operations), len(RESOURCES)), dtype=np.int64)
        for start in range(0, len(operations), CHUNK):
            part = slice(start, start + CHUNK)
            cut = [None if table is None else table[part] for table in (cached, ranks)]
            found[part] = self._costs(operations[part], examples[part], *cut)
        return found

    def _costs(
        self,
        operations: np.ndarray,
        examples: np.ndarray,
        cached: np.ndarray | None,
        ranks: np.ndarray | None,
    ) -> np.ndarray:
        own = self.ranks(operations, ranks)
        parts = (
            self._flops(operations, examples, own),
            self.memories(operations, examples, ranks),
            self.communication.up(operations, own),
            self.communication.down(operations, cached, ranks),
        )
        works = operations.any(axis=(1, 2, 3)) & (examples > 0)
        return np.stack(parts, axis=1) * works[:, None]

    def everything(self) -> Schedule:
        """Every subnet FULL in every slot."""
        return Schedule.filled(Operation.FULL, self.slots, self.arch.blocks, self.arch.heads)

    def plain(self) -> "CostModel":
        """The costs of whole batches and examples, without what trades FLOPs or time for memory."""
        options = self.options.plain()
        one = replace(self.unquantized(), slots=1, options=options, tokens=0)
        return replace(one, compensated=False, calibrating=False)

    def unquantized(self) -> "CostModel":
        """The costs where numbers travel as they are."""
        return replace(self, bits_up=PLAIN_BITS, bits_down=PLAIN_BITS)

    def full_cost(self, examples: int) -> Cost:
        """The cost of training everything on this many examples: what 100 % means.

        In whole batches and without checkpointing: both would need less memory. Only the
        federation's own costs say it: the batch of a way is not undone.
        """
        return self.known(("full", examples), lambda: self._full_cost(examples))

    def _full_cost(self, examples: int) -> Cost:
        plain = self.plain()
        cost = plain.cost(plain.everything(), examples)
        down = self.unquantized().bytes_down(self.everything())
        return replace(cost, bytes_down=down) if examples else cost


def _one(own: np.ndarray | None) -> np.ndarray | None:
    """Something of one client as of all clients."""
    return None if own is None else own[None]


def _active(operations: np.ndarray) -> np.ndarray:
    return (operations != Operation.SHORTCUT).any(axis=(2, 3))  # [clients, slots]


def _sizes(batch: np.ndarray, slots: int) -> np.ndarray:
    """:func:`slot_sizes` of many batches: int64 [clients, slots]."""
    return batch[:, None] // slots + (np.arange(slots) < batch[:, None] % slots)
