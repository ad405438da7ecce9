"""How a block's heads and slots are grouped for execution: storage, segments, head groups.

Slots that ask the same of a branch, side by side, are a *segment*. Heads of it that run alike are a
*head group*, which the engine runs as one narrower branch: those that are FULL or FROZEN, through
which gradient passes, in all of the segment's slots; those that are FORWARD_ONLY in neighbouring
slots. Trained heads are stored first, alike ones side by side, so that a head group is a few runs
of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import pairwise

import numpy as np

from d2ft_fl.subnets.schedule import Operation

# Some heads in neighbouring slots: first slot, slot behind the last, heads.
Part = tuple[int, int, tuple[int, ...]]


def storage_order(operations: np.ndarray, ranks: Mapping[int, int] | None = None) -> list[int]:
    """Return the order in which a block's heads are stored: trained first, alike side by side.

    A path from head to head that changes as few operations as it can, nearest neighbour first, so
    that the heads of an operation in a slot lie in few runs; of one rank after another, the largest
    first.

    Args:
        operations: int8 [slots, heads].
        ranks: Trained heads -> the ranks of their factors, where these differ.
    """
    trained = np.flatnonzero((operations == Operation.FULL).any(axis=0)).tolist()
    resident = np.flatnonzero((operations != Operation.SHORTCUT).any(axis=0)).tolist()
    groups = [trained]
    if ranks is not None:
        by_rank = sorted(set(ranks.values()), reverse=True)
        groups = [[head for head, own in ranks.items() if own == rank] for rank in by_rank]
    order: list[int] = []
    for group in (*groups, [head for head in resident if head not in trained]):
        left = list(group)
        while left:
            # In how many slots one of a head and the last is alive and not the other; they differ.
            last = operations[:, order[-1:]] if order else Operation.FULL
            apart = ((operations >= Operation.FROZEN) != (last >= Operation.FROZEN)).sum(axis=0)
            differ = (operations != last).sum(axis=0)
            nearest = min(left, key=lambda h: (apart[h], differ[h], h))
            left.remove(nearest)
            order.append(nearest)
    return order


class Status(IntEnum):
    """What some neighbouring slots ask of a block, in ascending order."""

    IDLE = auto()  # nothing runs
    SILENT = auto()  # something runs, outside the graph
    ALIVE = auto()  # gradient passes through; nothing of the block trains
    TRAINS = auto()  # something runs FULL: shared parameters train


# Status that a single operation asks for, by its code.
_STATUS = np.array([Status.IDLE, Status.SILENT, Status.ALIVE, Status.TRAINS])


@dataclass(frozen=True)
class Group:
    """A segment, and how its work is divided.

    Attributes:
        slots: From which slot to before which.
        status: What the slots ask.
        through: Whether gradient is wanted at the segment's input.
        alive: Head groups that gradient passes through, each in all of the slots.
        full: What of these is FULL.
        silent: Head groups that run outside the graph.
    """

    slots: tuple[int, int]
    status: Status
    through: bool
    alive: list[Part]
    full: list[Part]
    silent: list[Part]


def groups(
    operations: np.ndarray, through: np.ndarray, order: Sequence[int], factored: bool
) -> list[Group]:
    """Divide a branch's slots into segments, and each segment's work into head groups.

    Args:
        operations: int8 [slots, heads], of
            :class:`~d2ft_fl.subnets.schedule.BranchOperations`.
        through: bool [slots], of ``BranchOperations`` too.
        order: Heads as they are stored.
        factored: Whether heads that train have LoRA's factors. Gradients of those that heads share
            are of FULL heads alone, so that a FROZEN head with factors is a head group of its own.
    """
    status = _STATUS[operations].max(axis=1)
    through = through & (status >= Status.ALIVE)
    full, alive = operations == Operation.FULL, operations >= Operation.FROZEN
    apart = alive & ~full & full.any(axis=0) & factored
    alike = np.concatenate([alive, full & factored], axis=1)
    asked = np.concatenate([status[:, None], through[:, None], alike], axis=1)
    return [
        Group(
            (start, stop),
            Status(int(status[start])),
            bool(through[start]),
            [
                part
                for chosen in (alive & ~apart, apart)
                for part in _parts(chosen, start, stop, order)
            ],
            list(_parts(full, start, stop, order)),
            list(_parts(operations == Operation.FORWARD_ONLY, start, stop, order)),
        )
        for start, stop in _equal_runs(asked)
    ]


def _parts(chosen: np.ndarray, start: int, stop: int, order: Sequence[int]) -> Iterator[Part]:
    """Yield heads that are chosen, bool [slots, heads], in neighbouring slots alike."""
    for a, b in _equal_runs(chosen[start:stop]):
        if heads := tuple(head for head in order if chosen[start + a, head]):
            yield start + a, start + b, heads


def _equal_runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of rows side by side that are equal."""
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    return pairwise([0, *changes.tolist(), len(rows)])
