"""One product of a head group: the rows of its heads' weights, and their LoRA factors.

Weights are views of packed slices (see :mod:`d2ft_fl.engine.packed_heads`). The gradient of a
group's weights is added into the gradient rows of its heads by the product that computes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from d2ft_fl.engine.matmul import (
    add_product,
    is_transposed_faster,
    times,
    transposed_times,
    write_product,
)
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.saved_activations import Observer
from d2ft_fl.subnets.branches import BranchSpec, Trains


@dataclass(frozen=True)
class ProductFactors:
    """How the engine reaches a product's LoRA factors: ``W + scaling * F G^T``.

    Attributes:
        near: Role of F, which heads divide: [rows, rank].
        far: Role of G, the block's: [rank, dim] for products in, [dim, rank] for the product out.
        near_trains: Whether F gets gradients.
        far_trains: Whether G gets gradients.
        scaling: What F G^T is multiplied by.
        dropout: Probability of dropout on what goes into A.
    """

    near: str
    far: str
    near_trains: bool
    far_trains: bool
    scaling: float
    dropout: float


def branch_factors(
    spec: BranchSpec, trains: Trains, targets: Iterable[str], scaling: float, dropout: float
) -> dict[str, ProductFactors]:
    """Return product -> its factors, for those products of a branch that have some."""
    inward, outward = spec.targets
    factors = {}
    for index, (target, near, far) in enumerate([(inward, "B", "A"), (outward, "A", "B")]):
        if target in targets:
            factors[target] = ProductFactors(
                f"{target}.lora_{near}",
                f"{target}.lora_{far}",
                trains.near[index],
                trains.far[index],
                scaling,
                dropout,
            )
    return factors


@dataclass(frozen=True)
class View:
    """A run of rows of a product's weights: views of all that belongs to them, made once a round.

    Attributes:
        columns: Where the run lies among the columns of what the product makes, or takes.
        weight: [rows, dim].
        bias: [rows], or None.
        near: Their rows of the factor F, [rows, rank], or None.
        weight_grad: Where the gradient of ``weight`` adds up; None where it does not train.
        bias_grad: Where the gradient of ``bias`` adds up, or None.
        near_grad: Where the gradient of ``near`` adds up, or None.
        first_row: The first of the rows in storage.
    """

    columns: slice
    weight: Tensor
    bias: Tensor | None
    near: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    near_grad: Tensor | None
    first_row: int


@dataclass
class Product:
    """One product of a head group.

    Attributes:
        role: Module of its weights.
        views: Its runs of rows, in storage order.
        factored: Runs that have factors: the first rows, those of the largest rank before others.
        factors: Its LoRA factors, or None.
    """

    role: str
    views: list[View]
    factored: list[View]
    factors: ProductFactors | None

    @cached_property
    def width(self) -> int:
        """Columns of what a product in makes, or of what the product out takes."""
        return self.views[-1].columns.stop

    @cached_property
    def factored_width(self) -> int:
        """Columns of the runs that have factors, which come first."""
        return self.factored[-1].columns.stop

    def far(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Return the common factor as far as these runs need it: of the largest of their ranks."""
        assert self.factors is not None
        far, near = shared[self.factors.far], self.factored[0].near
        assert near is not None
        rank = near.shape[1]
        return far[:rank] if self.factors.far.endswith("A") else far[:, :rank]

    def part(self, wide: Tensor, view: View) -> Tensor:
        """Return a run's columns of a tensor that has those of all runs."""
        columns = view.columns
        whole = columns.stop - columns.start == wide.shape[1]
        return wide if whole else wide[:, columns]

    def side_by_side(self, left: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return ``left`` times a matrix a run, plus its bias: the columns of all runs."""
        if len(weights) == 1:
            return times(left, *weights[0])
        wide = left.new_empty(len(left), self.width)
        for view, (right, bias) in zip(self.views, weights, strict=True):
            write_product(wide[:, view.columns], left, right, bias)
        return wide


def views_of(
    store: PackedHeads,
    role: str,
    heads: Sequence[int],
    among: Sequence[int],
    factors: ProductFactors | None,
) -> list[View]:
    """Return the runs of some heads' rows.

    Args:
        store: The block's slices.
        role: Module of the weights.
        heads: Whose rows.
        among: Heads whose columns are side by side, these among them.
        factors: The product's LoRA factors, or None.
    """
    weight, bias = f"{role}.weight", f"{role}.bias"
    near = factors.near if factors else ""
    trained = store.count(weight)

    def factor(of: Mapping[str, Tensor], rows: slice) -> Tensor | None:
        present = near in of and rows.stop <= trained
        return store.factor(of, weight, near, rows) if present else None

    def gradient(name: str, rows: slice) -> Tensor | None:
        return store.grads[name][rows] if name in store.grads and rows.stop <= trained else None

    runs = store.runs(weight, heads, among)
    if factors:  # heads that train have factors; those of the others are part of their weights
        for rows, _ in store.stretches(weight):
            runs = [part for run in runs for part in run.cut(rows.stop)]
    return [
        View(
            run.columns,
            store.weights[weight][run.rows],
            store.weights[bias][run.rows] if bias in store.weights else None,
            factor(store.weights, run.rows),
            gradient(weight, run.rows),
            gradient(bias, run.rows),
            factor(store.grads, run.rows),
            run.rows.start,
        )
        for run in runs
    ]


@dataclass(frozen=True)
class Gradients:
    """Where gradients of one run of rows go.

    Attributes:
        view: The run.
        overwrite: Whether they replace those that are there; see ``Branch.settle``.
        observer: Takes them instead, if there is one.
    """

    view: View
    overwrite: bool
    observer: Observer | None

    def add(self, name: str, grad: Tensor | None, left: Tensor, right: Tensor | None) -> None:
        """Add up a gradient: left transposed times right.

        Args:
            name: Role of the parameter, for the observer.
            grad: Where to add it up.
            left: [examples x tokens, rows].
            right: [examples x tokens, columns]; None for a bias, whose gradient sums ``left``.
        """
        kind = self.view.weight.dtype
        # What oneDNN makes has room where gradients of as many rows will be, or were.
        new = (
            right is not None and len(right) >= right.shape[1] and is_transposed_faster(left, right)
        )
        if self.observer is None and right is not None and kind is left.dtype and not new:
            assert grad is not None
            torch.addmm(grad, left.t(), right, beta=0 if self.overwrite else 1, out=grad)
            return
        if right is None and self.observer is None and self.overwrite and grad is not None:
            torch.sum(left, 0, dtype=kind, out=grad)
            return
        value = left.sum(0, dtype=kind) if right is None else transposed_times(left, right)
        if self.observer is not None:
            self.observer(name, self.view.first_row, value.to(kind))
            return
        assert grad is not None
        if self.overwrite:
            grad.copy_(value)
        else:
            grad.add_(value)


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Return some rows of a tensor; all of them are the tensor, which spares torch a view."""
    return tensor if rows.stop - rows.start == len(tensor) else tensor[rows]


def add_narrower(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add a product into as many of the first columns of ``total`` as the product has."""
    add_product(first_columns(total, right), left, right)
    return total


def first_columns(wide: Tensor, like: Tensor) -> Tensor:
    """Return as many of the first columns as another tensor has."""
    return wide if wide.shape[1] == like.shape[1] else wide[:, : like.shape[1]]


def dropped(back: Tensor, mask: Tensor, factors: ProductFactors) -> Tensor:
    """Return the gradient of what was dropped out, from that of what was left, in place."""
    return back.mul_(mask).div_(1 - factors.dropout)
