"""Names and shapes in which compensation travels."""

from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation, Schedule


def mean_name(block: int, branch: int) -> str:
    """Under which name a block's means travel up: float32 [tokens, width of resident heads]."""
    return f"d2ft.mean.{block}.{branch}"


def skip_name(block: int) -> str:
    """Under which name compensation travels down: float32 [sets, branches, tokens, dim]."""
    return f"d2ft.skip.{block}"


def mean_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the means that a calibrating client sends up."""
    spec: dict[str, tuple[int, ...]] = {}
    for block in range(arch.blocks):
        if heads := schedule.heads(schedule.resident, block):
            for branch, widths in enumerate(arch.widths):
                width = sum(widths[h] for h in heads)
                spec[mean_name(block, branch)] = (arch.tokens, width)
    return spec


def skip_sets(schedule: Schedule, block: int) -> list[int]:
    """Per slot, which of the block's distinct sets of skipped heads it has; -1 for none."""
    sets: dict[bytes, int] = {}
    found = []
    for slot in range(schedule.slots):
        skipped = schedule.operations[slot, block] == Operation.SHORTCUT
        if not schedule.active[slot] or not skipped.any():
            found.append(-1)
        else:
            found.append(sets.setdefault(skipped.tobytes(), len(sets)))
    return found


def skip_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what compensates a client's shortcuts."""
    spec: dict[str, tuple[int, ...]] = {}
    for block in range(arch.blocks):
        if count := max(skip_sets(schedule, block)) + 1:
            spec[skip_name(block)] = (count, len(arch.branches), arch.tokens, arch.dim)
    return spec
