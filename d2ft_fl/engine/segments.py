"""What the slots of a batch ask of a branch: neighbours that ask the same are one segment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_fl.engine.grouping import Group, Status, groups
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.product import ProductFactors
from d2ft_fl.subnets.schedule import Operation


@dataclass(frozen=True)
class Segment:
    """Neighbouring slots that ask the same of a block.

    Attributes:
        slots: From which slot to before which.
        status: What they ask.
        through: Whether gradient is wanted at their input.
        alive: FULL and FROZEN head groups: gradient passes through them.
        silent: FORWARD_ONLY head groups.
    """

    slots: tuple[int, int]
    status: Status
    through: bool
    alive: list[HeadGroup]
    silent: list[HeadGroup]


def segments(
    store: PackedHeads,
    inward: Sequence[str],
    outward: str,
    operations: np.ndarray,
    through: np.ndarray,
    factors: Mapping[str, ProductFactors],
) -> list[Segment]:
    """Return a branch's segments; see :func:`d2ft_fl.engine.grouping.groups`.

    Args:
        store: The block's slices.
        inward: Modules of the branch's products in.
        outward: Module of its product out.
        operations: What heads do, int8 [slots, heads].
        through: Whether gradient is wanted at the branch's input, bool [slots].
        factors: Product -> its LoRA factors.
    """

    def head_groups(part: Group, operation: Operation) -> list[HeadGroup]:
        full = operation is Operation.FULL
        return [
            HeadGroup(store, inward, outward, heads, (start, stop), full, factors)
            for start, stop, heads in part.head_groups[operation]
        ]

    return [
        Segment(
            part.slots,
            part.status,
            part.through,
            head_groups(part, Operation.FULL) + head_groups(part, Operation.FROZEN),
            head_groups(part, Operation.FORWARD_ONLY),
        )
        for part in groups(operations, through, store.order)
    ]
