"""Compensated shortcuts: what a skipped subnet adds on average, added in its place.

A subnet adds ``z W_out`` to the residual stream, where z [tokens, width] lies between the products
of a branch. Its mean over examples is ``mean(z) W_out``: clients that run a subnet measure mean(z),
one row a token position; the server averages them weighted by examples and multiplies by the
weights of the day. So a shortcut removes a subnet's variation, not its mean, and what a block skips
costs the client one tensor [tokens, dim] a branch, however many subnets it stands for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.amounts import TENSOR_HEADER
from d2ft_fl.errors import ReplyError
from d2ft_fl.memory import ELEMENT
from d2ft_fl.subnets import Architecture, Operation, Schedule

if TYPE_CHECKING:  # the cost model comes by here, and need not bring the engine in
    from d2ft_fl.partial import Offsets, PartialModel
    from d2ft_fl.pieces import Piece

OUTWARD = ("proj.weight", "fc2.weight")  # the product out of each branch, by role
BIASES = ("proj.bias", "fc2.bias")
SCALES = ("ls1.gamma", "ls2.gamma")
FRACTION_BITS = 32
LIMIT = 2.0**29  # of the mean of an activation times all examples


def mean_name(block: int, branch: int) -> str:
    """Under which name a block's means travel up: float32 [tokens, width of resident heads]."""
    return f"d2ft.mean.{block}.{branch}"


def skip_name(block: int) -> str:
    """Under which name compensation travels down: float32 [sets, 2, tokens, dim]."""
    return f"d2ft.skip.{block}"


def mean_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the means that a calibrating client sends up."""
    spec: dict[str, tuple[int, ...]] = {}
    for block in range(arch.blocks):
        if heads := schedule.heads(schedule.resident, block):
            for branch in range(2):
                width = sum(arch.widths[branch][h] for h in heads)
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
            spec[skip_name(block)] = (count, 2, arch.tokens, arch.dim)
    return spec


@dataclass(frozen=True)
class Extras:
    """What compensation adds to a client's round, in bytes: it does not add up over subnets.

    Attributes:
        compensated: Whether shortcuts are compensated. calibrating: Whether means are measured.
    """

    arch: Architecture
    compensated: bool
    calibrating: bool

    def down(self, operations: np.ndarray) -> np.ndarray:
        """On the wire to clients: int64 [clients], of int8 [clients, slots, blocks, heads]."""
        return self._each(operations, self.compensated, lambda s: _wire(skip_spec(self.arch, s)))

    def up(self, operations: np.ndarray) -> np.ndarray:
        """On the wire back."""
        return self._each(operations, self.calibrating, lambda s: _wire(mean_spec(self.arch, s)))

    def held(self, operations: np.ndarray) -> np.ndarray:
        """Held while training."""
        skips = self._each(operations, self.compensated, lambda s: _data(skip_spec(self.arch, s)))
        means = self._each(operations, self.calibrating, lambda s: _data(mean_spec(self.arch, s)))
        return skips + means

    def _each(
        self, operations: np.ndarray, there: bool, what: Callable[[Schedule], int]
    ) -> np.ndarray:
        if not there:
            return np.zeros(len(operations), dtype=np.int64)
        return np.array([what(Schedule(one)) for one in operations], dtype=np.int64)


def _data(spec: dict[str, tuple[int, ...]]) -> int:
    """Bytes of the tensors alone."""
    return sum(ELEMENT * int(np.prod(shape)) for shape in spec.values())


def _wire(spec: dict[str, tuple[int, ...]]) -> int:
    return _data(spec) + TENSOR_HEADER * len(spec)


class MeanTally:
    """A client's means of z over the examples that it runs, in one round."""

    def __init__(self, model: "PartialModel"):
        self.model = model
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.counts: dict[tuple[int, int], dict[int, int]] = {}
        for index, block in model.blocks.items():
            for branch, role in enumerate(OUTWARD):
                if role not in block.store.weights:
                    continue
                rows = len(block.store.weights[role])
                total = torch.zeros(model.arch.tokens, rows, device=model.device)
                self.sums[index, branch] = total
                self.counts[index, branch] = dict.fromkeys(block.store.order, 0)
                block.branches[branch].tally = self._tally(index, branch)

    def _tally(self, index: int, branch: int) -> "_Add":
        places = self.model.blocks[index].store
        return _Add(
            self.sums[index, branch], self.counts[index, branch], places.rows[OUTWARD[branch]]
        )

    def held(self) -> list[Tensor]:
        """The running sums."""
        return list(self.sums.values())

    def finish(self) -> dict[str, Tensor]:
        """The means, by name, heads ascending; nothing is measured from here on."""
        found = {}
        for (index, branch), total in self.sums.items():
            block = self.model.blocks[index]
            block.branches[branch].tally = None
            counts, rows = self.counts[index, branch], block.store.rows[OUTWARD[branch]]
            columns = [
                total[:, rows[head].start : rows[head].stop] / max(1, counts[head])
                for head in sorted(block.store.order)
            ]
            found[mean_name(index, branch)] = torch.cat(columns, dim=1).cpu()
        return found


@dataclass(frozen=True)
class _Add:
    """Adds one piece's z to the running sums of its heads."""

    total: Tensor
    counts: dict[int, int]
    rows: Mapping[int, range]

    def __call__(self, piece: "Piece", z: Tensor) -> None:
        summed = z.sum(dim=0, dtype=torch.float32)  # [tokens, depth]
        start = 0
        for head in piece.heads:
            own = self.rows[head]
            self.total[:, own.start : own.stop] += summed[:, start : start + len(own)]
            self.counts[head] += len(z)
            start += len(own)


@dataclass(frozen=True)
class MeanBook:
    """What is known of subnets' means: (block, branch) -> float32 [tokens, width of all heads].

    Attributes:
        means: Zero where nothing is known.
        known: bool [blocks, heads]; None before anything was measured.
    """

    means: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    known: np.ndarray | None = None

    def offsets(
        self, arch: Architecture, weights: Mapping[str, Tensor], schedule: Schedule
    ) -> dict[str, Tensor]:
        """What compensates a client's shortcuts, under the server's present weights.

        A set of skipped heads adds ``sum_h mean_h W_out[h]``; where a block runs nothing, its bias
        and layer scale are in it as well. What was never measured adds nothing.
        """
        if self.known is None:
            return {}
        found = {}
        for name, shape in skip_spec(arch, schedule).items():
            block = int(name.rsplit(".", 1)[1])
            tensor = torch.zeros(shape)
            for slot, place in enumerate(skip_sets(schedule, block)):
                if place >= 0:
                    skipped = schedule.operations[slot, block] == Operation.SHORTCUT
                    tensor[place] = self._sum(arch, weights, block, skipped)
            found[name] = tensor
        return found

    def _sum(
        self, arch: Architecture, weights: Mapping[str, Tensor], block: int, skipped: np.ndarray
    ) -> Tensor:
        """float32 [2, tokens, dim]."""
        assert self.known is not None
        out = torch.zeros(2, arch.tokens, arch.dim)
        heads = [int(h) for h in np.flatnonzero(skipped & self.known[block])]
        if not heads:
            return out
        own = {p.role: p for p in arch.parameters if p.block == block}
        for branch, role in enumerate(OUTWARD):
            p = own[role]
            columns = p.index(heads)  # a weight's input columns are z's
            packed = p.pack(weights[p.name], heads)  # [width, dim]
            out[branch] = self.means[block, branch][:, columns] @ packed
            if skipped.all():
                if BIASES[branch] in own:
                    out[branch] += weights[own[BIASES[branch]].name]
                if SCALES[branch] in own:
                    out[branch] *= weights[own[SCALES[branch]].name]
        return out


def received(schedule: Schedule, tensors: Mapping[str, Tensor]) -> "dict[int, Offsets]":
    """Compensation as it came down, per block and slot: see ``PartialModel.reset``."""
    found: dict[int, Offsets] = {}
    for block in range(schedule.operations.shape[1]):
        if (tensor := tensors.get(skip_name(block))) is not None:
            sets = skip_sets(schedule, block)
            found[block] = [None if place < 0 else tensor[place] for place in sets]
    return found


@dataclass
class MeanSums:
    """Folds clients' means in, weighted by examples; the order of replies does not matter."""

    arch: Architecture
    examples: int
    _sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _counts: np.ndarray | None = None

    def check(self, schedule: Schedule, tensors: Mapping[str, Tensor]) -> None:
        """Raises ReplyError unless these are the means that were asked for."""
        spec = mean_spec(self.arch, schedule)
        for name, shape in spec.items():
            if name not in tensors:
                raise ReplyError(f"{name!r} is missing")
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype is not torch.float32:
                raise ReplyError(f"{name!r} is not float32 {list(shape)}")
            if not bool((tensor.abs().double() * max(1, self.examples) < LIMIT).all()):
                raise ReplyError(f"{name!r} holds values that are not finite, or too large")

    def add(
        self, schedule: Schedule, slot_examples: list[int], tensors: Mapping[str, Tensor]
    ) -> None:
        """Add one client's checked means."""
        ran = (schedule.operations != Operation.SHORTCUT).astype(np.int64)
        counts = np.tensordot(np.asarray(slot_examples, dtype=np.int64), ran, axes=1)
        for block in range(self.arch.blocks):
            heads = schedule.heads(schedule.resident, block)
            for branch in range(2 if heads else 0):
                widths = self.arch.widths[branch]
                total = self._sums.setdefault(
                    (block, branch), torch.zeros(self.arch.tokens, sum(widths), dtype=torch.long)
                )
                means = tensors[mean_name(block, branch)].double()
                start = 0
                for head in heads:
                    part = means[:, start : start + widths[head]] * float(counts[block, head])
                    start += widths[head]
                    first = sum(widths[:head])
                    fixed = torch.round(part * 2.0**FRACTION_BITS).long()
                    total[:, first : first + widths[head]] += fixed
        self._counts = counts if self._counts is None else self._counts + counts

    def apply(self, book: MeanBook) -> MeanBook:
        """The book with what was measured in place of what was known of it."""
        if self._counts is None:
            return book
        measured = self._counts > 0
        means = dict(book.means)
        for (block, branch), total in self._sums.items():
            old = means.get((block, branch))
            new = torch.zeros(total.shape) if old is None else old.clone()
            start = 0
            for head, width in enumerate(self.arch.widths[branch]):
                own = slice(start, start + width)
                start += width
                if measured[block, head]:
                    fixed = total[:, own].double() / 2.0**FRACTION_BITS
                    new[:, own] = (fixed / float(self._counts[block, head])).float()
            means[block, branch] = new
        known = measured if book.known is None else book.known | measured
        return MeanBook(means, known)
