"""What each subnet does in a round."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise

import numpy as np

from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.branches import Trains


class Operation(IntEnum):
    """What a subnet does for the examples of one slot, in ascending cost.

    D2FT's p_s, p_o and p_f, and FROZEN: gradient passes through it, but its weights get none.
    """

    SHORTCUT = 0
    FORWARD_ONLY = 1
    FROZEN = 2
    FULL = 3


@dataclass(frozen=True)
class BranchOperations:
    """Schedules as branches run them.

    Attributes:
        operations: int8 [..., slots, blocks, branches, heads]: FROZEN only where gradient passes,
            FULL only where something trains.
        through: bool [..., slots, blocks, branches]: whether gradient is wanted at the branch's
            input.
    """

    operations: np.ndarray
    through: np.ndarray

    @classmethod
    def of(cls, operations: np.ndarray, trains: Sequence[Trains]) -> "BranchOperations":
        """Divide schedules, int8 [..., slots, blocks, heads], over branches.

        Args:
            operations: The schedules.
            trains: What of each branch trains.
        """
        anything = np.array([t.anything for t in trains])
        norm = np.array([t.norm for t in trains])
        each = np.repeat(operations[..., None, :], len(trains), axis=-2)
        full = (each == Operation.FULL) & anything[:, None]
        trains_here = full.any(axis=-1)  # [..., slots, blocks, branches]
        flat = trains_here.reshape(*trains_here.shape[:-2], -1)
        begun = np.logical_or.accumulate(flat, axis=-1)
        below = np.zeros_like(begun)
        below[..., 1:] = begun[..., :-1]
        through = below.reshape(trains_here.shape) | (trains_here & norm)
        live = (each >= Operation.FROZEN) & ~full
        # What is live and trains nothing runs so:
        runs_as = np.where(through[..., None], Operation.FROZEN, Operation.FORWARD_ONLY)
        return cls(np.where(live, runs_as, each).astype(np.int8), through)


@dataclass(frozen=True, eq=False)
class Schedule:
    """One client's operations for a round: int8 ``[slots, blocks, heads]`` of ``Operation``.

    Attributes:
        operations: What each subnet does in each slot.
        ranks: int64 [blocks, heads], the rank at which trained subnets train LoRA's factors; None
            for the architecture's own. Of subnets that do not train it means nothing.
    """

    operations: np.ndarray
    ranks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.operations.ndim != 3 or self.operations.dtype != np.int8:
            raise ConfigError(
                f"a schedule is int8 [slots, blocks, heads], not {self.operations.dtype} "
                f"{list(self.operations.shape)}"
            )
        low, high = int(self.operations.min(initial=0)), int(self.operations.max(initial=0))
        if low < 0 or high > max(Operation):
            raise ConfigError(f"operations are 0 to {max(Operation)}, not {low} to {high}")
        if self.ranks is not None and (
            self.ranks.dtype != np.int64 or self.ranks.shape != self.operations.shape[1:]
        ):
            raise ConfigError(
                f"ranks are int64 [blocks, heads], not {self.ranks.dtype} {list(self.ranks.shape)}"
            )

    @classmethod
    def filled(cls, operation: Operation, slots: int, blocks: int, heads: int) -> "Schedule":
        """Return a schedule in which every subnet does the same in every slot."""
        return cls(np.full((slots, blocks, heads), operation, dtype=np.int8))

    @property
    def slots(self) -> int:
        """Micro-batches of a batch."""
        return int(self.operations.shape[0])

    @cached_property
    def resident(self) -> np.ndarray:
        """Subnets that any slot runs: bool [blocks, heads]. Only these travel down."""
        return (self.operations != Operation.SHORTCUT).any(axis=0)

    @cached_property
    def trained(self) -> np.ndarray:
        """Subnets that any slot runs FULL: bool [blocks, heads]. Only these travel up."""
        return (self.operations == Operation.FULL).any(axis=0)

    @cached_property
    def active(self) -> np.ndarray:
        """Slots that run anything: bool [slots]. The others are skipped whole."""
        return (self.operations != Operation.SHORTCUT).any(axis=(1, 2))

    @property
    def sits_out(self) -> bool:
        """True when the client runs nothing at all in this round."""
        return not bool(self.active.any())

    @cached_property
    def effective(self) -> np.ndarray:
        """Operations as they run; see :func:`effective`."""
        return effective(self.operations)

    def heads(self, what: np.ndarray, block: int) -> tuple[int, ...]:
        """Return heads of ``block`` that are set in ``what`` [blocks, heads], ascending."""
        return tuple(what[block].nonzero()[0].tolist())

    def trained_ranks(self, block: int) -> dict[int, int] | None:
        """Return trained heads of a block, ascending -> their ranks; None where ranks are equal."""
        if self.ranks is None:
            return None
        return {head: int(self.ranks[block, head]) for head in self.heads(self.trained, block)}

    def mean_rank(self, rank: int = 0) -> float | None:
        """Return the mean rank of trained subnets; None where nothing trains, or has none.

        Args:
            rank: Of a schedule that says nothing of ranks; 0 for none.
        """
        if not self.trained.any():
            return None
        if self.ranks is None:
            return float(rank) or None
        return float(self.ranks[self.trained].mean())

    def examples_trained(self, slot_examples: Sequence[int]) -> np.ndarray:
        """Return examples n_cs on which each subnet ran FULL: int64 [blocks, heads]."""
        full = self.operations == Operation.FULL
        return np.tensordot(np.asarray(slot_examples, dtype=np.int64), full, axes=1)

    def block_examples_trained(self, slot_examples: Sequence[int]) -> np.ndarray:
        """Return examples on which any subnet of a block ran FULL: int64 [blocks]."""
        full = (self.operations == Operation.FULL).any(axis=2)
        return np.asarray(slot_examples, dtype=np.int64) @ full


def residents(operations: np.ndarray) -> np.ndarray:
    """Return which subnets any slot runs: bool [clients, blocks, heads].

    Args:
        operations: int8 [clients, slots, blocks, heads].
    """
    return (operations != Operation.SHORTCUT).any(axis=1)


def trainees(operations: np.ndarray) -> np.ndarray:
    """Return which subnets any slot runs FULL: bool [clients, blocks, heads].

    Args:
        operations: int8 [clients, slots, blocks, heads].
    """
    return (operations == Operation.FULL).any(axis=1)


def trained_ranks(operations: np.ndarray, ranks: np.ndarray | None, largest: int) -> np.ndarray:
    """Return the ranks at which subnets train, else 0: int64 [clients, blocks, heads].

    Args:
        operations: int8 [clients, slots, blocks, heads].
        ranks: Those of schedules, int64 [clients, blocks, heads]; None for the largest.
        largest: Rank of LoRA's factors in the model; 0 without LoRA.

    Raises:
        ConfigError: When a rank is not between 1 and the largest.
    """
    trained = trainees(operations)
    if ranks is None:
        return trained * np.int64(largest)
    used = ranks[trained]
    if len(used) and not 1 <= used.min() <= used.max() <= largest:
        raise ConfigError(
            f"subnets train at ranks 1 to {largest}, not {used.min()} to {used.max()}"
            if largest
            else "only LoRA has ranks: leave those of a schedule at None"
        )
    return trained * ranks


def effective(operations: np.ndarray) -> np.ndarray:
    """Return operations as they run: FROZEN is FORWARD_ONLY below all that trains in its slot.

    Args:
        operations: int8 [..., slots, blocks, heads].
    """
    full = (operations == Operation.FULL).any(axis=-1)  # [..., slots, blocks]
    below = ~np.logical_or.accumulate(full, axis=-1)
    silent = (operations == Operation.FROZEN) & below[..., None]
    return np.where(silent, np.int8(Operation.FORWARD_ONLY), operations)


def slot_sizes(examples: int, slots: int) -> list[int]:
    """Divide a batch over slots as evenly as possible, the larger first."""
    base, extra = divmod(examples, slots)
    return [base + (slot < extra) for slot in range(slots)]


def micro_batches(sizes: Sequence[int], active: Sequence[bool], parts: int) -> list[list[int]]:
    """Cut a batch into micro-batches that run one after another: examples of each slot in each.

    Examples of inactive slots are not run at all; the others, slot by slot, are divided as evenly
    as possible into at most ``parts`` micro-batches.

    Args:
        sizes: Examples of each slot.
        active: Which slots run anything.
        parts: Micro-batches, at most.
    """
    run = [size if on else 0 for size, on in zip(sizes, active, strict=True)]
    ends = np.cumsum([0, *run])
    cuts = np.cumsum([0, *slot_sizes(int(ends[-1]), parts)])
    sizes_of_each = []
    for start, stop in pairwise(cuts.tolist()):
        if start < stop:
            sizes_of_each.append(np.diff(ends.clip(start, stop)).tolist())
    return sizes_of_each


def slot_totals(examples: int, batch_size: int, slots: int, epochs: int) -> list[int]:
    """Return examples that each slot sees in a round of ``epochs`` in batches of ``batch_size``."""
    full, rest = divmod(examples, batch_size)
    whole, last = slot_sizes(batch_size, slots), slot_sizes(rest, slots)
    return [epochs * (full * w + r) for w, r in zip(whole, last, strict=True)]
