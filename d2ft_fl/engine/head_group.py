"""The products of a piece: heads that do the same in neighbouring slots.

Weights are views of packed slices (see :mod:`d2ft_fl.engine.packed_heads`), and the gradient of a
piece's weights is added into the gradient rows of its heads by the product that computes it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2ft_fl.engine.matmul import is_faster, times
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.packed_heads import PackedHeads, Run
from d2ft_fl.subnets.branches import BranchSpec, Trains

# Told (role, first row, gradient of a run of rows) instead of adding it up; see
# `whole.score_pass`.
Observer = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Lora:
    """How the engine reaches a product's factors: ``W + scaling * F G^T`` (LoRA's).

    Attributes:
        near: Role of F, which heads divide: [rows, rank].
        far: Role of G, the block's: [rank, dim] for products in, [dim, rank] for the product out.
        near_trains, far_trains: Which of them get gradients.
        scaling, dropout: See :class:`~d2ft_fl.subnets.architecture.Architecture`.
    """

    near: str
    far: str
    near_trains: bool
    far_trains: bool
    scaling: float
    dropout: float


def branch_loras(
    spec: BranchSpec,
    trains: Trains,
    targets: Iterable[str],
    scaling: float,
    dropout: float,
) -> dict[str, Lora]:
    """Product -> its factors, for those of a branch that have some."""
    inward, outward = spec.targets
    found = {}
    for index, (target, near, far) in enumerate([(inward, "B", "A"), (outward, "A", "B")]):
        if target in targets:
            found[target] = Lora(
                f"{target}.lora_{near}",
                f"{target}.lora_{far}",
                trains.near[index],
                trains.far[index],
                scaling,
                dropout,
            )
    return found


@dataclass(frozen=True)
class _View:
    """A run of a role's rows: views of weights, bias and their gradients, made once a round."""

    columns: slice
    weight: Tensor
    bias: Tensor | None
    near: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    near_grad: Tensor | None
    first_row: int


@dataclass
class _Product:
    """One product of a piece: its runs of rows, and its factors."""

    role: str
    views: list[_View]
    lora: Lora | None

    @property
    def width(self) -> int:
        """Columns."""
        return self.views[-1].columns.stop

    @property
    def factored(self) -> list[_View]:
        """Runs that have factors, those of the largest rank first."""
        return [view for view in self.views if view.near is not None]

    def far(self, shared: Mapping[str, Tensor]) -> Tensor:
        """The common factor as far as these runs need it: of the largest of their ranks."""
        assert self.lora is not None
        far, rank = shared[self.lora.far], self.rank
        return far[:rank] if self.lora.far.endswith("A") else far[:, :rank]

    @property
    def rank(self) -> int:
        """The largest of its runs' ranks."""
        near = self.factored[0].near
        assert near is not None
        return near.shape[1]


class SavedActivations(NamedTuple):
    """What a FULL piece keeps for the gradients of its weights; None where they need it not.

    Attributes:
        z: [rows, depth], what goes into the product out.
        u: [rows, rank], scaled: what A makes of the input of the product in.
        v: The same of the product out.
        y_dropped, z_dropped: What went into A where LoRA drops out.
        y_mask, z_mask: Where it did not.
    """

    z: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    y_dropped: Tensor | None = None
    y_mask: Tensor | None = None
    z_dropped: Tensor | None = None
    z_mask: Tensor | None = None


# role, gradient of a shared parameter.
Sink = Callable[[str, Tensor], None]


def no_sink(role: str, gradient: Tensor) -> None:
    """Of a piece that has no factors in common with others."""
    raise AssertionError(role)


class HeadGroup:
    """Heads that do the same in some neighbouring slots, in one branch: one narrower branch.

    Args:
        store: The block's slices.
        inward, outward: Roles of the products, without ``.weight``.
        heads: Which heads. slots: From which slot to before which.
        full: Whether what trains of their weights gets gradients.
        loras: Product -> its factors.
    """

    def __init__(
        self,
        store: PackedHeads,
        inward: Sequence[str],
        outward: str,
        heads: Iterable[int],
        slots: tuple[int, int],
        full: bool,
        loras: Mapping[str, Lora] | None = None,
    ):
        chosen = set(heads)
        loras = loras or {}
        self.heads = tuple(h for h in store.order if h in chosen)
        self.slots, self.full = slots, full
        self.overwrites = False  # set where nothing has to be added to: see `Branch.settle`
        self.inward = [self._product(store, role, loras.get(role)) for role in inward]
        self.outward = self._product(store, outward, loras.get(outward))
        self.depth = self.outward.width

    def _product(self, store: PackedHeads, role: str, lora: Lora | None) -> _Product:
        weight, bias = f"{role}.weight", f"{role}.bias"
        near = lora.near if lora else ""
        trained = store.count(weight)

        def factor(of: Mapping[str, Tensor], rows: slice) -> Tensor | None:
            own = near in of and rows.stop <= trained
            return store.factor(of, weight, near, rows) if own else None

        def view(run: Run) -> _View:
            return _View(
                run.columns,
                store.weights[weight][run.rows],
                store.weights[bias][run.rows] if bias in store.weights else None,
                factor(store.weights, run.rows),
                _rows(store.grads.get(weight), run) if self.full else None,
                _rows(store.grads.get(bias), run) if self.full else None,
                factor(store.grads, run.rows) if self.full else None,
                run.rows.start,
            )

        runs = store.runs(weight, self.heads)
        if lora:  # heads that train have factors of their own, the others' are folded in
            for rows, _ in store.stretches(weight):
                runs = [part for run in runs for part in run.cut(rows.stop)]
        return _Product(role, [view(run) for run in runs], lora)

    def products_in(
        self, y: Tensor, shared: Mapping[str, Tensor], numerics: Numerics, drop: bool
    ) -> tuple[list[Tensor], SavedActivations]:
        """``y`` [rows, dim] times the weights of each role in: [rows, width] each.

        Args:
            shared: Shared parameters of the block. drop: Whether LoRA's dropout is drawn.
        """
        out, saved = [], SavedActivations()
        for product in self.inward:
            h = _beside_each_other(
                y,
                [
                    (
                        view.columns,
                        numerics.cast(view.weight).t(),
                        None if view.bias is None else numerics.cast(view.bias),
                    )
                    for view in product.views
                ],
            )
            if product.lora and product.factored:
                lora, dropped, mask = product.lora, y, None
                if drop and self.full and lora.dropout:
                    dropped, mask = torch.native_dropout(y, lora.dropout, True)
                u = torch.mm(dropped, numerics.cast(product.far(shared)).t()).mul_(lora.scaling)
                for view in product.factored:
                    assert view.near is not None
                    into, own = _part(h, view, product.views), _first(u, view.near)
                    _add_product(into, own, numerics.cast(view.near).t())
                if self.full:
                    saved = SavedActivations(
                        u=u if lora.near_trains else None,
                        y_dropped=dropped if mask is not None and lora.far_trains else None,
                        y_mask=mask,
                    )
            out.append(h)
        return out, saved

    def product_out(
        self,
        z: Tensor,
        total: Tensor,
        shared: Mapping[str, Tensor],
        numerics: Numerics,
        start: Tensor | None,
        drop: bool,
    ) -> SavedActivations:
        """``total`` [rows, dim] becomes ``start`` plus z W_out, for z [rows, depth].

        Args:
            start: What to add to: ``total`` itself, a bias [dim], or None for nothing.
            shared, drop: See :meth:`products_in`.
        """
        product = self.outward
        for view in product.views:
            part, weight = _part(z, view, product.views), numerics.cast(view.weight)
            if start is None:
                torch.mm(part, weight, out=total)
            else:
                torch.addmm(start, part, weight, out=total)
            start = total
        if not product.lora or not product.factored:
            return SavedActivations()
        saved = self.mixed_out(z, numerics, drop)
        assert saved.v is not None
        _add_product(total, saved.v, numerics.cast(product.far(shared)).t())
        if not self.full:
            return SavedActivations()
        kept = saved.z_dropped if saved.z_mask is not None and product.lora.near_trains else None
        v = saved.v if product.lora.far_trains else None
        return SavedActivations(v=v, z_dropped=kept, z_mask=saved.z_mask)

    def mixed_out(self, z: Tensor, numerics: Numerics, drop: bool) -> SavedActivations:
        """What the near factor of the product out makes of z, as ``v``."""
        product = self.outward
        assert product.lora is not None
        dropped, mask = z, None
        if drop and self.full and product.lora.dropout:
            dropped, mask = torch.native_dropout(z, product.lora.dropout, True)
        v: Tensor | None = None
        for view in product.factored:
            assert view.near is not None
            part, near = _part(dropped, view, product.views), numerics.cast(view.near)
            v = torch.mm(part, near) if v is None else _add_narrower(v, part, near)
        assert v is not None
        return SavedActivations(v=v.mul_(product.lora.scaling), z_dropped=dropped, z_mask=mask)

    def error_out(
        self, g: Tensor, shared: Mapping[str, Tensor], numerics: Numerics, deep: bool
    ) -> Tensor | None:
        """Gradient [rows, rank] of what goes into the far factor of the product out, if needed.

        Args:
            g: Of the sum, [rows, dim]. deep: Whether the gradient of z is wanted.
        """
        lora = self.outward.lora
        if lora is None or not self.outward.factored:
            return None
        if not deep and not (self.full and lora.near_trains):
            return None
        return torch.mm(g, numerics.cast(self.outward.far(shared))).mul_(lora.scaling)

    def through_out(
        self, g: Tensor, error: Tensor | None, mask: Tensor | None, numerics: Numerics
    ) -> Tensor:
        """Gradient of z: ``g`` [rows, dim] times W_out transposed, [rows, depth].

        Args:
            error: Of :meth:`error_out`. mask: Of :class:`SavedActivations`.
        """
        product = self.outward
        weights = [(view.columns, numerics.cast(view.weight).t(), None) for view in product.views]
        dz = _beside_each_other(g, weights)
        for view in product.factored if error is not None and mask is None else ():
            assert view.near is not None
            assert error is not None
            into = _part(dz, view, product.views)
            _add_product(into, _first(error, view.near), numerics.cast(view.near).t())
        if mask is not None and error is not None:
            assert product.lora is not None
            for view in product.factored:
                assert view.near is not None
                back = torch.mm(_first(error, view.near), numerics.cast(view.near).t())
                own = _part(mask, view, product.views)
                into = _part(dz, view, product.views)
                into.add_(_dropped(back, own, product.lora))
        return dz

    def errors_in(self, dhs: Sequence[Tensor], numerics: Numerics, through: bool) -> Tensor | None:
        """Gradient [rows, rank] of what the far factor of a product in makes, if it is needed.

        Args:
            dhs: Of what the products in make. through: Whether the gradient of y is wanted.
        """
        for product, dh in zip(self.inward, dhs, strict=True):
            lora = product.lora
            if lora is None or not product.factored:
                continue
            if not through and not (self.full and lora.far_trains):
                continue
            du: Tensor | None = None
            for view in product.factored:
                assert view.near is not None
                part, near = _part(dh, view, product.views), numerics.cast(view.near)
                du = torch.mm(part, near) if du is None else _add_narrower(du, part, near)
            assert du is not None
            return du.mul_(lora.scaling)
        return None

    def through_in(
        self,
        dhs: Sequence[Tensor],
        error: Tensor | None,
        mask: Tensor | None,
        dy: Tensor,
        shared: Mapping[str, Tensor],
        numerics: Numerics,
        add: bool,
    ) -> None:
        """``dy`` [rows, dim] becomes, or is added, each dh times its W_in.

        Args:
            error: Of :meth:`errors_in`. mask: Of :class:`SavedActivations`.
        """
        for product, dh in zip(self.inward, dhs, strict=True):
            for view in product.views:
                weight, part = numerics.cast(view.weight), _part(dh, view, product.views)
                torch.addmm(dy, part, weight, beta=int(add), out=dy)
                add = True
            if product.lora and error is not None:
                far = numerics.cast(product.far(shared))
                if mask is None:
                    _add_product(dy, error, far)
                else:
                    dy.add_(_dropped(torch.mm(error, far), mask, product.lora))

    def gradients_out(
        self,
        saved: SavedActivations,
        g: Tensor,
        error: Tensor | None,
        sink: Sink,
        observer: Observer | None,
    ) -> None:
        """Gradients of the product out: z transposed times g, into the rows of the heads."""
        product, name = self.outward, f"{self.outward.role}.weight"
        for view in product.views:
            if view.weight_grad is not None or observer is not None:
                assert saved.z is not None
                part = _part(saved.z, view, product.views)
                self._take(name, view, view.weight_grad, part, g, observer)
        lora = product.lora
        if lora is None or observer is not None:
            return
        into = saved.z_dropped if saved.z_dropped is not None else saved.z
        for view in product.views:
            if view.near_grad is not None:
                assert into is not None
                assert error is not None
                part, own = _part(into, view, product.views), _first(error, view.near_grad)
                self._take(lora.near, view, view.near_grad, part, own, None)
        if lora.far_trains:
            assert saved.v is not None
            sink(lora.far, torch.mm(g.t(), saved.v))

    def gradients_in(
        self,
        saved: SavedActivations,
        y: Tensor | None,
        dhs: Sequence[Tensor],
        error: Tensor | None,
        sink: Sink,
        observer: Observer | None,
    ) -> None:
        """Gradients of the products in and their biases, into the rows of the heads."""
        for product, dh in zip(self.inward, dhs, strict=True):
            lora = product.lora
            for view in product.views:
                part = _part(dh, view, product.views)
                if view.weight_grad is not None or observer is not None:
                    assert y is not None
                    name = f"{product.role}.weight"
                    self._take(name, view, view.weight_grad, part, y, observer)
                if view.bias is not None and (view.bias_grad is not None or observer is not None):
                    name = f"{product.role}.bias"
                    self._take(name, view, view.bias_grad, part, None, observer)
                if view.near_grad is not None and observer is None:
                    assert lora is not None
                    assert saved.u is not None
                    own = _first(saved.u, view.near_grad)
                    self._take(lora.near, view, view.near_grad, part, own, None)
            if lora and lora.far_trains and observer is None:
                into = saved.y_dropped if saved.y_dropped is not None else y
                assert error is not None
                assert into is not None
                sink(lora.far, torch.mm(error.t(), into))

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
        # What oneDNN makes has room where gradients of as many rows will be, or were.
        new = right is not None and len(right) >= right.shape[1] and is_faster(left.t(), right)
        if observer is None and right is not None and kind is left.dtype and not new:
            assert grad is not None
            torch.addmm(grad, left.t(), right, beta=0 if self.overwrites else 1, out=grad)
            return
        value = left.sum(0, dtype=kind) if right is None else times(left.t(), right)
        if observer is not None:
            observer(name, view.first_row, value.to(kind))
            return
        assert grad is not None
        if self.overwrites:
            grad.copy_(value)
        else:
            grad.add_(value)


def _beside_each_other(
    left: Tensor, rights: Sequence[tuple[slice, Tensor, Tensor | None]]
) -> Tensor:
    """``left`` times several matrices, plus a bias each, in the columns that they say."""
    if len(rights) == 1:
        return times(left, *rights[0][1:])
    wide = left.new_empty(len(left), rights[-1][0].stop)
    for columns, right, bias in rights:
        if bias is None:
            torch.mm(left, right, out=wide[:, columns])
        else:
            torch.addmm(bias, left, right, out=wide[:, columns])
    return wide


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total += left @ right``. Not by ``addmm_``, which torch's FLOP counter does not know."""
    return torch.addmm(total, left, right, out=total)


def _add_narrower(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same into as many of the first columns of ``total`` as the product has."""
    _add_product(_first(total, right), left, right)
    return total


def _first(wide: Tensor, like: Tensor) -> Tensor:
    """As many of the first columns as another has."""
    return wide if wide.shape[1] == like.shape[1] else wide[:, : like.shape[1]]


def _dropped(back: Tensor, mask: Tensor, lora: Lora) -> Tensor:
    """The gradient of what was dropped out, from that of what was left, in place."""
    return back.mul_(mask).div_(1 - lora.dropout)


def _rows(grads: Tensor | None, run: Run) -> Tensor | None:
    return None if grads is None else grads[run.rows]


def _part(wide: Tensor, view: _View, views: Sequence[_View]) -> Tensor:
    """A view's columns of a piece's wide tensor."""
    return wide if len(views) == 1 else wide[:, view.columns]
