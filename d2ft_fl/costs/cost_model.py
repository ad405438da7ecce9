"""What a schedule costs: FLOPs, peak memory, bytes down and up, as integers.

**FLOPs** are products and attention: see :mod:`d2ft_fl.costs.flops`. **Memory** is what is resident
all the time, plus the worst micro-batch: see :mod:`d2ft_fl.costs.round_memory` and
:mod:`d2ft_fl.costs.memory`. **Bytes** are those of tensors, and of headers at most: see
:mod:`d2ft_fl.costs.communication`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy, TrainingOptions
from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.costs.communication import Communication, communication_of
from d2ft_fl.costs.compensation import Extras
from d2ft_fl.costs.machine_speed import MachineSpeed, standard
from d2ft_fl.costs.memory import MicroBatchMemory
from d2ft_fl.costs.parameter_counts import Parts, parts_of
from d2ft_fl.costs.resources import RESOURCES, Cost, costs_from
from d2ft_fl.costs.round_flops import RoundFlops
from d2ft_fl.costs.round_memory import RoundMemory
from d2ft_fl.costs.seconds import RoundSeconds
from d2ft_fl.engine.attention import fused_attention
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import (
    Operation,
    Schedule,
    micro_batches,
    slot_sizes,
    slot_totals,
    trained_ranks,
)
from d2ft_fl.wire.quantization import check_bits, is_quantized

CHUNK = 128  # clients whose costs are computed at once: more take memory, and not less time
MOST_KNOWN = 4096  # costs that are kept


@dataclass(frozen=True)
class CostModel:
    """Costs of schedules of one model under fixed options of local training.

    Attributes:
        arch: The model's architecture.
        options: Options of local training.
        slots: Slots of schedules.
        device: ``cpu`` or ``cuda``.
        compensated: Whether shortcuts are compensated: 2 T D elements for every block and distinct
            set of heads that a slot skips travel down, and stay in memory.
        calibrating: Whether clients measure means in this round: T (d + f) elements a resident
            subnet are in memory, and travel up.
        tokens: T, of an example, that blocks see in training; 0 for all.
        bits_up: Of a number on its way up; see :mod:`d2ft_fl.wire.quantization`. Below 32 the
            client keeps what it began with, as it was sent.
        bits_down: Of a number on its way down.
        machine: How fast the machine is that seconds are counted on; None for the one that comes
            with the package.
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
    machine: MachineSpeed | None = None

    def under(self, policy: ExecutionPolicy) -> "CostModel":
        """Return the cost model under an execution policy.

        Compensation is possible only where all tokens are in their places.

        Args:
            policy: What differs from the options of local training.

        Raises:
            ConfigError: When fewer tokens are to be compensated, or there are not so many; for bits
                in which nothing can travel; for a batch that leaves slots without examples.
        """
        if policy == DEFAULT_POLICY:
            return self
        tokens, all_tokens = policy.tokens or 0, self.arch.tokens
        up, down = policy.bits_up or self.bits_up, policy.bits_down or self.bits_down
        check_bits(up, down)
        if tokens and not self.arch.prefix < tokens <= all_tokens:
            raise ConfigError(
                f"tokens = {tokens} of an example must be {self.arch.prefix + 1} to {all_tokens}"
            )
        if 0 < tokens < all_tokens and (self.compensated or self.calibrating):
            raise ConfigError(
                f"compensation adds a mean to each of {all_tokens} tokens, and cannot go with "
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
    def round_flops(self) -> RoundFlops:
        """FLOPs of rounds."""
        return RoundFlops(self.seen, self.options, self.slots, self.fused)

    @property
    def fused(self) -> bool:
        """Whether attention is torch's fused one."""
        attention = self.arch.attention
        return fused_attention(self.device, attention.head_width, attention.dropout)

    def flops(self, schedule: Schedule, examples: int) -> int:
        """Return the FLOPs of one round of local training on ``examples`` examples."""
        operations = schedule.operations[None]
        ranks = self.ranks(operations, _one(schedule.ranks))
        return self.round_flops.of(operations, np.array([examples]), ranks).item()

    def ranks(self, operations: np.ndarray, ranks: np.ndarray | None) -> np.ndarray:
        """Return the ranks at which subnets train, else 0: int64 [clients, blocks, heads].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            ranks: Those of schedules; None for the architecture's.
        """
        return trained_ranks(operations, ranks, self.arch.rank)

    def slot_totals(self, examples: int) -> list[int]:
        """Return how many examples each slot sees in one round."""
        return slot_totals(examples, self.options.batch_size, self.slots, self.options.epochs)

    # -- seconds -----------------------------------------------------------------------------

    @cached_property
    def round_seconds(self) -> RoundSeconds:
        """Seconds of rounds on the machine."""
        return RoundSeconds(
            self.round_flops,
            self.parts,
            self.arch.sliced_sizes(lambda p: is_quantized(p, self.bits_up)),
            self.machine or standard(self.options.precision),
        )

    def on(self, machine: MachineSpeed | None) -> "CostModel":
        """Return the cost model that counts seconds on another machine."""
        return self if machine == self.machine else replace(self, machine=machine)

    def work(
        self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray | None = None
    ) -> np.ndarray:
        """Return how long clients compute, as ``Cost.work`` has it: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Those of schedules; see :meth:`ranks`.
        """
        return self.round_seconds.work(operations, examples, self.ranks(operations, ranks))

    # -- memory ------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> Parts:
        """Parameter counts of the model, by what happens to parameters."""
        return parts_of(self.arch)

    @cached_property
    def extras(self) -> Extras:
        """What compensation adds to memory and communication."""
        return Extras(self.arch, self.compensated, self.calibrating)

    @cached_property
    def activations(self) -> ActivationBytes:
        """Bytes of the activations of an example, by what they belong to."""
        return ActivationBytes.of(
            self.seen, self.options, self.fused, self.device, self.arch.tokens
        )

    @cached_property
    def round_memory(self) -> RoundMemory:
        """Memory of rounds, in bytes."""
        return RoundMemory(
            self.options,
            self.slots,
            self.parts,
            self.extras,
            self.activations,
            self.communication.kept,
        )

    def saved_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Return the bytes saved for backward by one micro-batch, once its forward pass is over.

        Args:
            schedule: What runs.
            sizes: Examples of each slot in the micro-batch.
        """
        saved = self._micro_batch(schedule, sizes).saved.sum()
        b = self.activations
        return int(saved) + sum(sizes) * (b.outer + b.scores) + b.classifier

    def peak_bytes(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """Return the peak bytes of one micro-batch, beyond what is resident before it.

        Args:
            schedule: What runs.
            sizes: Examples of each slot in the micro-batch.
        """
        return self._micro_batch(schedule, sizes).peak().item()

    def _micro_batch(self, schedule: Schedule, sizes: Sequence[int]) -> MicroBatchMemory:
        operations = schedule.operations[None]
        ranks = self.ranks(operations, _one(schedule.ranks))
        return self.round_memory.micro_batches(operations, np.array([sizes]), ranks)

    def memory(self, schedule: Schedule, examples: int) -> int:
        """Return the peak bytes of one round: what is resident, plus the worst micro-batch."""
        ranks = _one(schedule.ranks)
        return self.memories(schedule.operations[None], np.array([examples]), ranks).item()

    def memories(
        self,
        operations: np.ndarray,
        examples: np.ndarray,
        ranks: np.ndarray | None = None,
        parts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the peak bytes of many clients' rounds: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Those of schedules; see :meth:`ranks`.
            parts: Micro-batches of a batch: int64 [clients]; None for as configured.
        """
        return self.round_memory.peak(operations, examples, self.ranks(operations, ranks), parts)

    def micro_batches(self, schedule: Schedule, batch: int) -> list[list[int]]:
        """Return the examples of each slot in each micro-batch of a batch."""
        sizes = slot_sizes(batch, schedule.slots)
        return micro_batches(sizes, schedule.active.tolist(), self.options.micro_batches)

    # -- bytes -------------------------------------------------------------------------------

    @cached_property
    def communication(self) -> Communication:
        """Bytes that travel."""
        return communication_of(self.extras, self.slots, self.bits_up, self.bits_down)

    def bytes_down(self, schedule: Schedule) -> int:
        """Return the bytes that travel to a client with an empty cache, headers included."""
        operations, ranks = schedule.operations[None], _one(schedule.ranks)
        return self.communication.down(operations, None, ranks).item()

    def bytes_up(self, schedule: Schedule) -> int:
        """Return the bytes that come back: trained slices, means, and their headers."""
        ranks = self.ranks(schedule.operations[None], _one(schedule.ranks))
        return self.communication.up(schedule.operations[None], ranks).item()

    # -- together ----------------------------------------------------------------------------

    def cost(
        self,
        schedule: Schedule,
        examples: int,
        cached: np.ndarray | None = None,
        timed: bool = True,
    ) -> Cost:
        """Return what one round costs a client; sitting out costs nothing.

        Args:
            schedule: What the client runs.
            examples: On which it trains.
            cached: Subnets whose fixed parameters it has: bool [blocks, heads]; None for none.
            timed: Whether to say how long it computes, which takes as long as all else.
        """
        operations, ranks = schedule.operations[None], _one(schedule.ranks)
        count = np.array([examples])
        tables = [None if t is None else t.tobytes() for t in (operations, ranks, cached)]

        def amounts() -> Cost:
            of_one = self.costs(operations, count, _one(cached), ranks)
            (cost,) = costs_from(of_one, np.zeros(1, dtype=np.int64))
            return cost

        # Many clients do the same where a strategy has all do all.
        key = operations.shape, examples, *tables
        cost = self.known(key, amounts)
        if not timed:
            return cost

        def with_work() -> Cost:
            return replace(cost, work=self.work(operations, count, ranks).item())

        return self.known((*key, timed), with_work)

    def known(self, key: Hashable, compute: Callable[[], Cost]) -> Cost:
        """Return what ``compute`` returns, which this model keeps by ``key``."""
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = compute()
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
        """Return what rounds cost many clients, in the order of ``RESOURCES``: int64 [clients, 4].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            cached: Subnets whose fixed parameters clients have: bool [clients, blocks, heads]; None
                for none.
            ranks: Those of schedules; see :meth:`ranks`.
        """
        costs = np.zeros((len(operations), len(RESOURCES)), dtype=np.int64)
        for start in range(0, len(operations), CHUNK):
            part = slice(start, start + CHUNK)
            cut = [None if table is None else table[part] for table in (cached, ranks)]
            costs[part] = self._costs(operations[part], examples[part], *cut)
        return costs

    def _costs(
        self,
        operations: np.ndarray,
        examples: np.ndarray,
        cached: np.ndarray | None,
        ranks: np.ndarray | None,
    ) -> np.ndarray:
        used_ranks = self.ranks(operations, ranks)
        parts = (
            self.round_flops.of(operations, examples, used_ranks),
            self.memories(operations, examples, ranks),
            self.communication.up(operations, used_ranks),
            self.communication.down(operations, cached, ranks),
        )
        works = operations.any(axis=(1, 2, 3)) & (examples > 0)
        return np.stack(parts, axis=1) * works[:, None]

    def everything(self) -> Schedule:
        """Return the schedule with every subnet FULL in every slot."""
        return Schedule.filled(Operation.FULL, self.slots, self.arch.blocks, self.arch.heads)

    def plain(self) -> "CostModel":
        """Return the cost model of whole batches and examples, without checkpointing."""
        options = self.options.plain()
        one = replace(self.unquantized(), slots=1, options=options, tokens=0)
        return replace(one, compensated=False, calibrating=False)

    @cached_property
    def uncompensated(self) -> "CostModel":
        """The cost model where shortcuts are not compensated."""
        return replace(self, compensated=False) if self.compensated else self

    def unquantized(self) -> "CostModel":
        """Return the cost model where numbers travel unquantized."""
        return replace(self, bits_up=PLAIN_BITS, bits_down=PLAIN_BITS)

    def full_cost(self, examples: int) -> Cost:
        """Return the cost of training everything on so many examples: what 100 % means.

        Batches are whole and nothing is checkpointed: both would need less memory. Ask the
        federation's cost model, not that of an execution policy, whose batch size would count.
        """
        return self.known(("full", examples), lambda: self._full_cost(examples))

    def _full_cost(self, examples: int) -> Cost:
        plain = self.plain()
        cost = plain.cost(plain.everything(), examples)
        down = self.unquantized().bytes_down(self.everything())
        return replace(cost, bytes_down=down) if examples else cost


def _one(table: np.ndarray | None) -> np.ndarray | None:
    """Add a dimension of clients to an array of one client."""
    return None if table is None else table[None]
