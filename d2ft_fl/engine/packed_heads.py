"""Slices of a block's heads as a client holds them: packed by head, in storage order.

The order makes a head group a few runs of rows (see :mod:`d2ft_fl.engine.grouping`), so that every
product reads and writes views: no weight is copied to choose heads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2ft_fl.subnets.architecture import Parameter
from d2ft_fl.subnets.packing import Take, row_ranges, rows_of


@dataclass(frozen=True)
class Run:
    """Rows of the storage that lie side by side, and their place among a head group's columns."""

    rows: slice
    columns: slice

    def cut(self, row: int) -> "list[Run]":
        """Return the run in two parts where ``row`` lies within it, else as it is."""
        if not self.rows.start < row < self.rows.stop:
            return [self]
        column = self.columns.start + row - self.rows.start
        return [
            Run(slice(self.rows.start, row), slice(self.columns.start, column)),
            Run(slice(row, self.rows.stop), slice(column, self.columns.stop)),
        ]


class PackedHeads:
    """Slices of some heads of one block: role -> rows grouped by head, in storage order.

    Args:
        order: Heads as stored.
        trained: How many heads, from the first, train.
        take: Makes their rows.
        specs: Role -> parameter, of those that heads divide.
        gradients: Whether to hold gradients of what trains.
        ranks: Trained heads -> the columns of their factors that train, where it is not all. These
            are then stored as vectors, whose rows are single elements; see :meth:`merge`.
    """

    def __init__(
        self,
        order: Sequence[int],
        trained: int,
        take: Take,
        specs: Mapping[str, Parameter],
        gradients: bool = True,
        ranks: Mapping[int, int] | None = None,
    ):
        self.ranks, self.specs, self.gradients = ranks, specs, gradients
        self.order = tuple(order)
        self.trained = self.order[:trained]
        self.rows: dict[str, dict[int, range]] = {}
        self.weights: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        for role, spec in specs.items() if self.order else ():
            self.rows[role] = row_ranges(spec, self.order)
            self.weights[role] = take(spec, self.order)
            if ranks is None or not spec.factor:
                self._hold_gradient(role)

    def _hold_gradient(self, role: str) -> None:
        if self.trained and self.gradients and self.specs[role].trains:
            self.grads[role] = torch.zeros_like(self.weights[role][: self.count(role)])

    def merge(self, target: str, near: str, far: Tensor, scaling: float) -> None:
        """Add to a product's weights what its factors add, but for the part of factors that trains.

        Of head h the first r_h columns of the factor are kept.

        Args:
            target: Module of the product.
            near: Role of the factor that heads divide.
            far: The factor that heads share, [dim, rank].
            scaling: What the product of factors is multiplied by.
        """
        weight, factor = f"{target}.weight", self.weights[near]
        count = self.count(near)
        if count < len(factor):
            rest = self.weights[weight][count:]
            torch.addmm(rest, factor[count:], far.t(), alpha=scaling, out=rest)
            self.weights[near] = factor[:count].clone()
        if self.ranks is not None and self.trained:
            self._narrow(weight, near, far, scaling)

    def _narrow(self, weight: str, near: str, far: Tensor, scaling: float) -> None:
        """Add to the weights columns of trained heads' factors that do not train; drop these."""
        factor, kept, start = self.weights[near], [], 0
        for rows, rank in self.stretches(near):
            if rank < far.shape[1]:
                base = self.weights[weight][rows]
                torch.addmm(base, factor[rows, rank:], far[:, rank:].t(), alpha=scaling, out=base)
            kept.append(factor[rows, :rank].flatten())
        self.weights[near] = torch.cat(kept)
        assert self.ranks is not None
        for head in self.trained:
            size = len(self.rows[near][head]) * self.ranks[head]
            self.rows[near][head], start = range(start, start + size), start + size
        self._hold_gradient(near)

    def stretches(self, role: str) -> list[tuple[slice, int]]:
        """Return runs of trained heads of one rank, with that rank; 0 where all are alike.

        Args:
            role: Of a product's weights, or of a factor before it is narrowed.
        """
        if self.ranks is None:
            return [(slice(0, self.count(role)), 0)] if self.trained else []
        stretches: list[tuple[slice, int]] = []
        for head in self.trained:
            rows, rank = self.rows[role][head], self.ranks[head]
            first = rows.start
            if stretches and stretches[-1][1] == rank:
                first = stretches.pop()[0].start
            stretches.append((slice(first, rows.stop), rank))
        return stretches

    def factor(self, of: Mapping[str, Tensor], weight: str, near: str, rows: slice) -> Tensor:
        """Return the rows of a factor, or of its gradient, for some rows of a product's weights.

        Args:
            of: :attr:`weights` or :attr:`grads`.
            weight: Role of the product's weights.
            near: Role of the factor.
            rows: Within one of :meth:`stretches`.

        Returns:
            A view [rows, rank].
        """
        start = 0
        for whole, rank in self.stretches(weight):
            if not rank:
                break
            if rows.start < whole.stop:
                first = start + (rows.start - whole.start) * rank
                size = (rows.stop - rows.start) * rank
                return of[near][first : first + size].view(-1, rank)
            start += (whole.stop - whole.start) * rank
        return of[near][rows]

    def count(self, role: str) -> int:
        """Return how many rows of a role train."""
        return sum(len(self.rows[role][head]) for head in self.trained)

    def ascending(self, role: str) -> Tensor:
        """Return trained rows as they travel, heads ascending; a view where they are stored so."""
        if self.trained == tuple(sorted(self.trained)):
            return self.weights[role][: self.count(role)]
        return rows_of(self.weights[role], self.rows[role], sorted(self.trained), self.trained)

    def runs(
        self, role: str, heads: Iterable[int], among: Iterable[int] | None = None
    ) -> list[Run]:
        """Return the rows of heads, neighbours joined; columns count from 0 in storage order.

        Args:
            role: Of what is stored.
            heads: Whose rows.
            among: Heads whose columns are counted; None for ``heads`` alone.
        """
        chosen = set(heads)
        counted = chosen if among is None else set(among)
        runs, column = list[Run](), 0
        for head in self.order:
            if head not in counted:
                continue
            rows = self.rows[role][head]
            columns = slice(column, column + len(rows))
            column = columns.stop
            if head not in chosen:
                continue
            last = runs[-1] if runs else None
            if last and (last.rows.stop, last.columns.stop) == (rows.start, columns.start):
                first = runs.pop()
                rows = range(first.rows.start, rows.stop)
                columns = slice(first.columns.start, column)
            runs.append(Run(slice(rows.start, rows.stop), columns))
        return runs
