"""The options of a subnet in a round: in how many slots it does which operation, at which rank.

Which slots those are rotates from subnet to subnet, so that the work of a slot is even.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation


@dataclass(frozen=True)
class Patterns:
    """The options of a subnet, and the slots that each means.

    Attributes:
        full: Slots in which each option is FULL: int64 [options].
        frozen: Slots in which each option is FROZEN: int64 [options].
        forward: Slots in which each option is FORWARD_ONLY: int64 [options].
        rank: At which an option trains, 0 where it does not: int64 [options].
        ranks: All ranks that are offered, ascending.
        below: Whether an option is FORWARD_ONLY below the lowest trained block, where it has the
            utility of FROZEN: bool [options].
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
        """Enumerate the counts of slots of each operation; the first option does nothing.

        Args:
            slots: Slots of the round.
            active: How many of them may run anything.
            frozen: Whether FROZEN is offered.
            ranks: Ranks to train at, ascending; 0 alone without LoRA.
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
        """What a block has to be open to, for each option: int64 [options].

        Levels are: nothing, resident, live (where FROZEN is offered), then trained at each rank
        that is offered, in ascending order.
        """
        live = 2 * (self.frozen > 0)
        first = 3 if self.below.any() else 2
        trained = (first + np.searchsorted(self.ranks, self.rank)) * (self.full > 0)
        return np.maximum(np.maximum(live, trained), self.runs > 0).astype(np.int64)


def pattern_starts(arch: Architecture, active: int, rotation: int) -> np.ndarray:
    """Return the slot in which each subnet's pattern starts: int64 [subnets].

    Args:
        arch: The architecture.
        active: Slots that may run anything.
        rotation: By how much all starts are shifted, for example the round.
    """
    block, head = np.divmod(np.arange(arch.blocks * arch.heads), arch.heads)
    return (block + head + rotation) % active
