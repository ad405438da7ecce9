"""Compensated shortcuts: what a skipped subnet adds on average, added in its place.

A subnet adds ``z W_out`` to the residual stream, where z [tokens, width] lies between the products
of a branch. Its mean over examples is ``mean(z) W_out``: clients that run a subnet measure mean(z),
one row a token position; the server averages them weighted by examples and multiplies by the
present weights. So a shortcut removes a subnet's variation, not its mean, and what a block skips
costs the client one tensor [tokens, dim] a branch, however many subnets it stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.compensation import mean_name, mean_spec, skip_sets, skip_spec

FRACTION_BITS = 32
LIMIT = 2.0**29  # the mean of an activation times all examples is below it


@dataclass(frozen=True)
class MeanBook:
    """What is known of subnets' means.

    Attributes:
        means: (block, branch) -> float32 [tokens, width of all heads]; zero where nothing is known.
        known: Subnets that were ever measured: bool [blocks, heads]; None before the first.
    """

    means: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    known: np.ndarray | None = None

    def offsets(
        self, arch: Architecture, weights: Mapping[str, Tensor], schedule: Schedule
    ) -> dict[str, Tensor]:
        """Return what compensates a client's shortcuts, under the server's present weights.

        A set of skipped heads adds ``sum_h mean_h W_out[h]``; where a block runs nothing, its bias
        and layer scale are in it as well. What was never measured adds nothing.

        Args:
            arch: The model's architecture.
            weights: The model's weights, by name.
            schedule: What the client runs.

        Returns:
            Name of an offset -> float32 [skip sets, branches, tokens, dim].
        """
        if self.known is None:
            return {}
        offsets = {}
        for name, shape in skip_spec(arch, schedule).items():
            block = int(name.rsplit(".", 1)[1])
            tensor = torch.zeros(shape)
            for slot, place in enumerate(skip_sets(schedule, block)):
                if place >= 0:
                    skipped = schedule.operations[slot, block] == Operation.SHORTCUT
                    tensor[place] = self._sum(arch, weights, block, skipped)
            offsets[name] = tensor
        return offsets

    def _sum(
        self, arch: Architecture, weights: Mapping[str, Tensor], block: int, skipped: np.ndarray
    ) -> Tensor:
        """Return what a block's skipped heads add on average: float32 [branches, tokens, dim]."""
        assert self.known is not None
        out = torch.zeros(len(arch.branches), arch.tokens, arch.dim)
        heads = [int(h) for h in np.flatnonzero(skipped & self.known[block])]
        if not heads:
            return out
        by_role = {p.role: p for p in arch.parameters if p.block == block}
        for branch, spec in enumerate(arch.branches):
            p = by_role[spec.outward_weight]
            columns = p.index(heads)  # a weight's input columns are z's
            packed = p.pack(weights[p.name], heads)  # [width, dim]
            out[branch] = self.means[block, branch][:, columns] @ packed
            if skipped.all():
                if spec.bias in by_role:
                    out[branch] += weights[by_role[spec.bias].name]
                if spec.scale in by_role:
                    out[branch] *= weights[by_role[spec.scale].name]
        return out


@dataclass
class MeanSums:
    """Aggregates clients' means, weighted by examples; the order of replies does not matter.

    Attributes:
        arch: The model's architecture.
        examples: Examples that all replies together can count.
    """

    arch: Architecture
    examples: int
    _sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _counts: np.ndarray | None = None

    def check(self, schedule: Schedule, tensors: Mapping[str, Tensor]) -> None:
        """Check that a reply has the means that its schedule asks for.

        Args:
            schedule: What the client was assigned.
            tensors: The means that it sent, by name.

        Raises:
            ReplyError: With the first thing that is wrong.
        """
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
        """Add one client's means, which :meth:`check` has accepted.

        Args:
            schedule: What the client was assigned.
            slot_examples: Examples that it ran in each slot.
            tensors: The means that it sent, by name.
        """
        ran = (schedule.operations != Operation.SHORTCUT).astype(np.int64)
        counts = np.tensordot(np.asarray(slot_examples, dtype=np.int64), ran, axes=1)
        for block in range(self.arch.blocks):
            heads = schedule.heads(schedule.resident, block)
            if not heads:
                continue
            for branch, widths in enumerate(self.arch.widths):
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
        """Return the book, in which what was measured replaces what was known.

        Args:
            book: What was known before the round.
        """
        if self._counts is None:
            return book
        measured = self._counts > 0
        means = dict(book.means)
        for (block, branch), total in self._sums.items():
            old = means.get((block, branch))
            new = torch.zeros(total.shape) if old is None else old.clone()
            start = 0
            for head, width in enumerate(self.arch.widths[branch]):
                columns = slice(start, start + width)
                start += width
                if measured[block, head]:
                    fixed = total[:, columns].double() / 2.0**FRACTION_BITS
                    new[:, columns] = (fixed / float(self._counts[block, head])).float()
            means[block, branch] = new
        known = measured if book.known is None else book.known | measured
        return MeanBook(means, known)
