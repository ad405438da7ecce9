"""What the slots of a batch ask of a branch: neighbours that ask the same are one segment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_fl.engine.grouping import Part, Status, groups
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.product import ProductFactors


@dataclass(frozen=True)
class Segment:
    """Neighbouring slots that ask the same of a branch.

    Attributes:
        slots: From which slot to before which.
        status: What they ask.
        through: Whether gradient is wanted at their input.
        alive: Head groups of FULL and FROZEN heads, in all of the slots: gradient passes through.
        silent: Head groups of FORWARD_ONLY heads.
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

    def head_group(part: Part, full: list[Part]) -> HeadGroup:
        start, stop, heads = part
        of_it = [f for f in full if set(f[2]) <= set(heads)]
        return HeadGroup(store, inward, outward, heads, (start, stop), of_it, factors)

    return [
        Segment(
            group.slots,
            group.status,
            group.through,
            [head_group(part, group.full) for part in group.alive],
            [head_group(part, []) for part in group.silent],
        )
        for group in groups(operations, through, store.order, bool(factors))
    ]
