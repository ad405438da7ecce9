"""Names and shapes in which compensation travels."""

from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation, Schedule

MEAN_PREFIX = "d2ft.mean."  # of the names of means


def mean_name(block: int, branch: int) -> str:
    """Return the name of a block's means: float32 [tokens, width of resident heads]."""
    return f"{MEAN_PREFIX}{block}.{branch}"


def skip_name(block: int) -> str:
    """Return the name of a block's compensation: float32 [sets, branches, tokens, dim]."""
    return f"d2ft.skip.{block}"


def mean_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the means that a calibrating client sends up."""
    spec: dict[str, tuple[int, ...]] = {}
    for block in range(arch.blocks):
        if heads := schedule.heads(schedule.resident, block):
            for branch, widths in enumerate(arch.widths):
                width = sum(widths[h] for h in heads)
                spec[mean_name(block, branch)] = (arch.tokens, width)
    return spec


def skip_sets(schedule: Schedule, block: int) -> list[int]:
    """Return for each slot the number of its set of skipped heads in a block; -1 for none."""
    sets: dict[bytes, int] = {}
    set_of_slot = []
    for slot in range(schedule.slots):
        skipped = schedule.operations[slot, block] == Operation.SHORTCUT
        if not schedule.active[slot] or not skipped.any():
            set_of_slot.append(-1)
        else:
            set_of_slot.append(sets.setdefault(skipped.tobytes(), len(sets)))
    return set_of_slot


def skip_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what compensates a client's shortcuts."""
    spec: dict[str, tuple[int, ...]] = {}
    for block in range(arch.blocks):
        if count := max(skip_sets(schedule, block)) + 1:
            spec[skip_name(block)] = (count, len(arch.branches), arch.tokens, arch.dim)
    return spec
