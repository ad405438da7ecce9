"""Elements and bytes of clients, added up parameter by parameter and head by head."""

from collections.abc import Callable

import numpy as np

from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build

HEADER, MESSAGE = 160, 2048  # bytes beside elements of a tensor, and of a message
# Two blocks of three heads, whose slices of 34 hidden units are uneven.
UNEVEN = build(depth=2, num_heads=3, mlp_ratio=34 / 24, init_values=0.1)[1]
# One factor of a product is never sent, one never trains, and one product has none.
ADAPTED = with_lora(
    UNEVEN,
    Lora(rank=4, targets=("qkv", "proj", "fc2")),
    frozen=[("qkv", "A"), ("proj", "A")],
    fixed=[("proj", "A")],
)
ARCHITECTURES = {"all trains": UNEVEN, "LoRA": ADAPTED}


def schedule_of(arch: Architecture, slots: int, seed: int) -> Schedule:
    """A schedule with all operations, one slot that may run nothing, and ranks under LoRA."""
    draw = np.random.default_rng(seed)
    operations = draw.integers(0, 4, (slots, arch.blocks, arch.heads)).astype(np.int8)
    operations[:, seed % arch.blocks, seed % arch.heads] = Operation.SHORTCUT
    if slots > 1 and seed % 2:
        operations[-1] = Operation.SHORTCUT
    if not arch.rank:
        return Schedule(operations)
    return Schedule(operations, draw.integers(1, arch.rank + 1, operations.shape[1:]))


def added(
    arch: Architecture,
    which: Callable[[Parameter], bool],
    times: np.ndarray,
    outer: int,
    each: Callable[[Parameter], int] = lambda p: p.row_width,
) -> int:
    """Add up rows of parameters.

    Args:
        arch: The architecture.
        which: Which parameters count.
        times: How often a subnet counts: [blocks, heads]; what a block shares, as the largest.
        outer: How often what is of no block counts.
        each: What a row counts; of what is shared, elements count.
    """
    total = 0
    for p in filter(which, arch.parameters):
        if p.block < 0:
            total += outer * int(np.prod(p.shape))
        elif p.kind is Kind.SHARED:
            total += max(times[p.block]) * int(np.prod(p.shape))
        else:
            for head, rows in enumerate(p.rows):
                total += times[p.block][head] * len(rows) * each(p)
    return int(total)


def tensors(arch: Architecture, which: Callable[[Parameter], bool], blocks: np.ndarray) -> int:
    """Count tensors of some blocks, bool [blocks], and of what is of no block."""
    return sum(p.block < 0 or bool(blocks[p.block]) for p in filter(which, arch.parameters))


def ranked(arch: Architecture, schedule: Schedule) -> np.ndarray:
    """The share of their ranks that subnets train, else 0: float [blocks, heads]."""
    ranks = arch.rank if schedule.ranks is None else schedule.ranks
    return np.where(schedule.trained, ranks, 0) / max(1, arch.rank)


def sent_up(arch: Architecture, schedule: Schedule, bits: int) -> int:
    """Bytes of a reply."""

    def row(p: Parameter) -> int:
        return bytes_of_row(p, bits)

    trained = schedule.trained.astype(int)
    sliced, rest = (
        [p for p in arch.parameters if p.trains and not p.factor and (p.kind is Kind.SLICED) == s]
        for s in (True, False)
    )
    total = added(arch, sliced.__contains__, trained, 1, row)
    total += 4 * added(arch, rest.__contains__, trained, 1)
    total += 4 * added(arch, lambda p: p.trains and bool(p.factor), ranked(arch, schedule), 1)
    return total + HEADER * tensors(arch, lambda p: p.trains, trained.any(axis=1)) + MESSAGE


def bytes_of_row(p: Parameter, bits: int) -> int:
    """Bytes of a row of a subnet's slice: quantized if it is of a matrix that changes."""
    matrix = len(p.shape) == 2 and not p.factor and not p.fixed
    return 4 + -(-bits * p.row_width // 8) if matrix and bits < 32 else 4 * p.row_width


def sent_down(
    arch: Architecture, schedule: Schedule, bits: int, cached: np.ndarray | None = None
) -> int:
    """Bytes of what a client is sent that has the fixed parameters of some subnets."""
    resident = schedule.resident.astype(int)
    has = np.zeros_like(resident, dtype=bool) if cached is None else cached
    grid = arch.blocks * arch.heads
    total = MESSAGE + 2 * schedule.slots * grid
    if any(p.fixed for p in arch.parameters):
        total += 20 * (grid + arch.blocks + 1)
    if schedule.ranks is not None:
        total += 4 * grid
    for p in arch.parameters:
        if p.block < 0:
            total += (HEADER + 4 * int(np.prod(p.shape))) * (not p.fixed or not has.any())
            continue
        of_block, new = resident[p.block], resident[p.block] * ~has[p.block]
        heads = new if p.fixed else of_block
        total += HEADER * bool(heads.any())
        if p.kind is Kind.SHARED:
            needs = of_block.any() and not (p.fixed and has[p.block].any())
            total += 4 * int(np.prod(p.shape)) * bool(needs)
        else:
            width = bytes_of_row(p, bits)
            total += sum(len(rows) * width for rows, on in zip(p.rows, heads, strict=True) if on)
    return int(total)


def held(arch: Architecture, schedule: Schedule, copies: int, bits_up: int, bits_down: int) -> int:
    """Bytes of weights, of ``copies`` of what trains, and of weights as sent."""
    resident, trained = schedule.resident.astype(int), schedule.trained.astype(int)
    share = ranked(arch, schedule)
    total = added(arch, lambda p: not p.factor, resident, 1)
    total += copies * added(arch, lambda p: p.trains and not p.factor, trained, 1)
    total += added(arch, lambda p: bool(p.factor), share, 1)
    total += copies * added(arch, lambda p: p.trains and bool(p.factor), share, 1)
    kept = 0
    if bits_up < 32:
        matrices = [
            p
            for p in arch.of_kind(Kind.SLICED)
            if p.trains and not p.fixed and not p.factor and len(p.shape) == 2
        ]
        kept = added(arch, matrices.__contains__, trained, 0, lambda p: bytes_of_row(p, bits_down))
    return 4 * total + kept
