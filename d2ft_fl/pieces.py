"""Packed slices, and the products of a piece: heads that do the same in neighbouring slots.

Slices are packed by head, in an order that makes a piece a few runs of rows (see
:mod:`d2ft_fl.grouping`), so that every product reads and writes views: no weight is copied to
choose heads, and the gradient of a piece's weights is added into the gradient rows of its heads by
the product that computes it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.grouping import Group, Status, groups
from d2ft_fl.subnets import Operation, Parameter


@dataclass(frozen=True)
class Numerics:
    """How arithmetic is done.

    Attributes:
        dtype: Of products and middles; sums, norms, weights and gradients keep their own.
        recompute: Activation checkpointing: keep a branch's input only, and compute what its
            backward pass needs once more.
    """

    dtype: torch.dtype = torch.float32
    recompute: bool = False

    @property
    def mixed(self) -> bool:
        """Whether products are done in another type than weights have."""
        return self.dtype is torch.bfloat16

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor as products take it."""
        return tensor.to(self.dtype) if self.mixed else tensor


@dataclass(frozen=True)
class Run:
    """Rows of the storage that lie side by side, and their place among a piece's columns."""

    rows: slice
    columns: slice


class PackedHeads:
    """Slices of some heads of one block: role -> rows grouped by head, in storage order.

    Args:
        order: Heads as stored. trained: How many of them, from the first, train.
        packed: role -> rows of the same heads in ascending order, as they travel.
        specs: role -> parameter.
        gradients: Whether to hold gradients of what trains.
    """

    def __init__(
        self,
        order: Sequence[int],
        trained: int,
        packed: Mapping[str, Tensor],
        specs: Mapping[str, Parameter],
        gradients: bool = True,
    ):
        self.order = tuple(order)
        self.trained = self.order[:trained]
        self.rows: dict[str, dict[int, range]] = {}
        self.weights: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        arrives = tuple(sorted(self.order))
        for role, tensor in packed.items():
            places = _places(specs[role], arrives)
            self.rows[role] = _places(specs[role], self.order)
            self.weights[role] = _pick(tensor, places, self.order, arrives)
            if self.trained and gradients:
                self.grads[role] = torch.zeros_like(self.weights[role][: self.count(role)])

    def count(self, role: str) -> int:
        """Rows that train."""
        return sum(len(self.rows[role][head]) for head in self.trained)

    def ascending(self, role: str) -> Tensor:
        """The trained rows as they travel: heads in ascending order."""
        return _pick(self.weights[role], self.rows[role], sorted(self.trained), self.trained)

    def runs(self, role: str, heads: Iterable[int]) -> list[Run]:
        """The heads' rows, neighbours joined; columns count from 0 in storage order."""
        chosen, runs, column = set(heads), list[Run](), 0
        for head in self.order:
            if head not in chosen:
                continue
            rows = self.rows[role][head]
            columns = slice(column, column + len(rows))
            column = columns.stop
            if runs and runs[-1].rows.stop == rows.start:
                runs[-1] = Run(
                    slice(runs[-1].rows.start, rows.stop), slice(runs[-1].columns.start, column)
                )
            else:
                runs.append(Run(slice(rows.start, rows.stop), columns))
        return runs


def _places(spec: Parameter, order: Sequence[int]) -> dict[int, range]:
    start, places = 0, {}
    for head in order:
        places[head] = range(start, start + len(spec.rows[head]))
        start = places[head].stop
    return places


def _pick(
    tensor: Tensor, places: Mapping[int, range], heads: Sequence[int], all_heads: Sequence[int]
) -> Tensor:
    """A copy of the rows of ``heads``, in their order, out of rows stored by ``all_heads``."""
    if tuple(heads) == tuple(all_heads):
        return tensor[: sum(len(places[h]) for h in heads)].clone()
    rows = [row for head in heads for row in places[head]]
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.long, device=tensor.device))


# Told (role, first row, gradient of a run of rows) instead of adding it up; see
# `training.score_pass`.
Observer = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class _View:
    """A run of a role's rows: views of weights, bias and their gradients, made once a round."""

    columns: slice
    weight: Tensor
    bias: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    first_row: int


class Piece:
    """Heads that do the same in some neighbouring slots, in one branch: one narrower branch.

    Args:
        store: The block's slices.
        inward, outward: Roles of the products, without ``.weight``.
        heads: Which heads. slots: From which slot to before which.
        full: Whether their weights get gradients.
    """

    def __init__(
        self,
        store: PackedHeads,
        inward: Sequence[str],
        outward: str,
        heads: Iterable[int],
        slots: tuple[int, int],
        full: bool,
    ):
        chosen = set(heads)
        self.heads = tuple(h for h in store.order if h in chosen)
        self.slots, self.full = slots, full
        self.overwrites = False  # set where nothing has to be added to: see `Branch.settle`
        self.inward = [(role, self._views(store, role)) for role in inward]
        self.outward_role = outward
        self.outward = self._views(store, outward)
        self.widths = [views[-1].columns.stop for _, views in self.inward]
        self.depth = self.outward[-1].columns.stop

    def _views(self, store: PackedHeads, role: str) -> list[_View]:
        weight, bias = f"{role}.weight", f"{role}.bias"
        biased = bias in store.weights
        return [
            _View(
                run.columns,
                store.weights[weight][run.rows],
                store.weights[bias][run.rows] if biased else None,
                _rows(store.grads.get(weight), run) if self.full else None,
                _rows(store.grads.get(bias), run) if self.full else None,
                run.rows.start,
            )
            for run in store.runs(weight, self.heads)
        ]

    def products_in(self, y: Tensor, numerics: Numerics) -> list[Tensor]:
        """``y`` [rows, dim] times the weights of each role in: [rows, width] each."""
        out = []
        for (_, views), width in zip(self.inward, self.widths, strict=True):
            h = y.new_empty(len(y), width)
            for view in views:
                into = _part(h, view, views)
                if view.bias is None:
                    torch.mm(y, numerics.cast(view.weight).t(), out=into)
                else:
                    bias, weight = numerics.cast(view.bias), numerics.cast(view.weight)
                    torch.addmm(bias, y, weight.t(), out=into)
            out.append(h)
        return out

    def product_out(
        self, z: Tensor, total: Tensor, numerics: Numerics, start: Tensor | None
    ) -> None:
        """``total`` [rows, dim] becomes ``start`` plus z W_out, for z [rows, depth].

        Args:
            start: What to add to: ``total`` itself, a bias [dim], or None for nothing.
        """
        for view in self.outward:
            part, weight = _part(z, view, self.outward), numerics.cast(view.weight)
            if start is None:
                torch.mm(part, weight, out=total)
            else:
                torch.addmm(start, part, weight, out=total)
            start = total

    def through_out(self, g: Tensor, numerics: Numerics) -> Tensor:
        """Gradient of z: ``g`` [rows, dim] times W_out transposed, [rows, depth]."""
        dz = g.new_empty(len(g), self.depth)
        for view in self.outward:
            weight = numerics.cast(view.weight)
            torch.mm(g, weight.t(), out=_part(dz, view, self.outward))
        return dz

    def through_in(self, dhs: Sequence[Tensor], dy: Tensor, numerics: Numerics, add: bool) -> None:
        """``dy`` [rows, dim] becomes, or is added, each dh times its W_in."""
        for (_, views), dh in zip(self.inward, dhs, strict=True):
            for view in views:
                weight, part = numerics.cast(view.weight), _part(dh, view, views)
                torch.addmm(dy, part, weight, beta=int(add), out=dy)
                add = True

    def gradients_out(self, z: Tensor, g: Tensor, observer: Observer | None) -> None:
        """Gradient of W_out, into the rows of the heads: z transposed times g."""
        name = f"{self.outward_role}.weight"
        for view in self.outward:
            self._take(name, view, view.weight_grad, _part(z, view, self.outward), g, observer)

    def gradients_in(self, y: Tensor, dhs: Sequence[Tensor], observer: Observer | None) -> None:
        """Gradients of W_in and its bias, into the rows of the heads."""
        for (role, views), dh in zip(self.inward, dhs, strict=True):
            for view in views:
                part = _part(dh, view, views)
                self._take(f"{role}.weight", view, view.weight_grad, part, y, observer)
                if view.bias is not None:
                    self._take(f"{role}.bias", view, view.bias_grad, part, None, observer)

    def _take(
        self,
        name: str,
        view: _View,
        grad: Tensor | None,
        left: Tensor,
        right: Tensor | None,
        observer: Observer | None,
    ) -> None:
        """Left transposed times right (for a bias: summed rows) is the gradient of some rows."""
        kind = view.weight.dtype
        if observer is None and right is not None and kind is left.dtype:
            assert grad is not None
            torch.addmm(grad, left.t(), right, beta=0 if self.overwrites else 1, out=grad)
            return
        value = left.sum(0, dtype=kind) if right is None else torch.mm(left.t(), right)
        if observer is not None:
            observer(name, view.first_row, value.to(kind))
            return
        assert grad is not None
        if self.overwrites:
            grad.copy_(value)
        else:
            grad.add_(value)


def _rows(grads: Tensor | None, run: Run) -> Tensor | None:
    return None if grads is None else grads[run.rows]


def _part(wide: Tensor, view: _View, views: Sequence[_View]) -> Tensor:
    """A view's columns of a piece's wide tensor."""
    return wide if len(views) == 1 else wide[:, view.columns]


@dataclass(frozen=True)
class Segment:
    """Neighbouring slots that ask the same of a block.

    Attributes:
        slots: From which slot to before which.
        status: What they ask.
        alive: FULL and FROZEN pieces: gradient passes through them.
        silent: FORWARD_ONLY pieces.
    """

    slots: tuple[int, int]
    status: Status
    alive: list[Piece]
    silent: list[Piece]


def segments(
    store: PackedHeads, inward: Sequence[str], outward: str, operations: np.ndarray
) -> list[Segment]:
    """A branch's segments; see :func:`d2ft_fl.grouping.groups`.

    Args:
        store: The block's slices.
        inward, outward: Roles of the branch's products.
        operations: int8 [slots, heads], FROZEN only where gradient passes.
    """

    def pieces(part: Group, operation: Operation) -> list[Piece]:
        full = operation is Operation.FULL
        return [
            Piece(store, inward, outward, heads, (start, stop), full)
            for start, stop, heads in part.pieces[operation]
        ]

    return [
        Segment(
            part.slots,
            part.status,
            pieces(part, Operation.FULL) + pieces(part, Operation.FROZEN),
            pieces(part, Operation.FORWARD_ONLY),
        )
        for part in groups(operations, store.order)
    ]
