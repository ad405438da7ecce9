"""The schedules that ``d2ft bench step`` measures."""

from itertools import pairwise

import numpy as np

from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation, Schedule


def grid(arch: Architecture, slots: int) -> dict[str, Schedule]:
    """Return the schedules of the benchmark, by name."""
    full, frozen, forward = Operation.FULL, Operation.FROZEN, Operation.FORWARD_ONLY
    cut = arch.blocks - max(1, arch.blocks // 3)
    upper = np.arange(arch.blocks)[:, None] >= cut  # the last third of the blocks
    schedules = {
        "all FULL": mixture(arch, slots, {full: 1.0}),
        "1/2 FULL, 1/2 FROZEN": mixture(arch, slots, {full: 1 / 2, frozen: 1 / 2}),
        "1/4 FULL, 3/4 FROZEN": mixture(arch, slots, {full: 1 / 4, frozen: 3 / 4}),
        "1/2 FULL, 1/2 FORWARD_ONLY": mixture(arch, slots, {full: 1 / 2, forward: 1 / 2}),
        "D2FT at 60 %: 1/2 FULL, 3/10 FORWARD_ONLY": mixture(
            arch, slots, {full: 0.5, forward: 0.3}
        ),
        "3/5 FULL, rest SHORTCUT": mixture(arch, slots, {full: 0.6}),
        "1/2 FULL, 1/2 SHORTCUT": mixture(arch, slots, {full: 1 / 2}),
        "1/4 FULL, 3/4 SHORTCUT": mixture(arch, slots, {full: 1 / 4}),
        "a quarter of each operation": mixture(
            arch, slots, {full: 1 / 4, frozen: 1 / 4, forward: 1 / 4}
        ),
        "last third FULL, below FORWARD_ONLY": Schedule(
            np.broadcast_to(
                np.where(upper, full, forward), (slots, arch.blocks, arch.heads)
            ).astype(np.int8)
        ),
    }
    if slots > 1:
        schedules["3/5 FULL, rest SHORTCUT, 1 slot"] = mixture(arch, 1, {full: 0.6})
    return schedules


def mixture(arch: Architecture, slots: int, shares: dict[Operation, float]) -> Schedule:
    """Return a schedule with shares of operations, evenly over blocks and slots, rest SHORTCUT.

    Which heads do what moves on by one from block to block, and from slot to slot by as many as
    it takes to go round once.
    """
    operations = np.zeros((slots, arch.blocks, arch.heads), dtype=np.int8)
    for index, (slot, block) in enumerate(np.ndindex(slots, arch.blocks)):
        ends = [0]
        for share in np.cumsum(list(shares.values())):
            whole = float(share) * arch.heads  # how many heads, carried over from index to index
            ends.append(round((index + 1) * whole) - round(index * whole))
        heads = (np.arange(arch.heads) + block + slot * arch.heads // slots) % arch.heads
        for operation, (start, stop) in zip(shares, pairwise(ends), strict=True):
            operations[slot, block, heads[start:stop]] = operation
    return Schedule(operations)
