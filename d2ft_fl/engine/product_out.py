"""The product out of a head group: z [rows, depth] times each head's weights, and back.

Rows are examples x tokens. With LoRA it has factors, ``z (W + s B A)^T``, of which B is common to
the block and A divided over heads.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2ft_fl.engine.matmul import add_product, times
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.product import (
    Gradients,
    Product,
    View,
    add_narrower,
    dropped,
    first_columns,
    rows_of,
)
from d2ft_fl.engine.saved_activations import NOTHING_SAVED, Observer, SavedActivations, Sink


class ProductOut:
    """The product out of some heads.

    Args:
        product: Its rows and factors.
        trains: Whether any of the heads is FULL.
    """

    def __init__(self, product: Product, trains: bool):
        self.product, self.trains = product, trains

    def forward(
        self,
        z: Tensor,
        bias: Tensor | None,
        into: Tensor | None,
        shared: Mapping[str, Tensor],
        numerics: Numerics,
        drop: bool,
    ) -> tuple[Tensor, SavedActivations]:
        """Return z times the weights, plus ``bias`` and ``into``: [rows, dim]; and what to keep.

        Args:
            z: [rows, depth].
            bias: [dim], or None.
            into: [rows, dim], or None. It may be overwritten.
            shared: Shared parameters of the block.
            numerics: How arithmetic is done.
            drop: Whether LoRA's dropout is drawn.
        """
        product, factors, total = self.product, self.product.factors, into
        for view in product.views:
            total = times(product.part(z, view), numerics.cast(view.weight), bias, total)
            bias = None
        assert total is not None
        if not factors or not product.factored:
            return total, NOTHING_SAVED
        saved = self.into_b(z, numerics, drop)
        assert saved.v is not None
        total = times(saved.v, numerics.cast(product.far(shared)).t(), into=total)
        if not self.trains:
            return total, NOTHING_SAVED
        kept = saved.z_dropped if saved.z_mask is not None and factors.near_trains else None
        v = saved.v if factors.far_trains else None
        return total, SavedActivations(v=v, z_dropped=kept, z_mask=saved.z_mask)

    def into_b(self, z: Tensor, numerics: Numerics, drop: bool) -> SavedActivations:
        """Return what A makes of z, as ``v``, with what went into A, as ``z_dropped``.

        Heads with factors come first in storage order; the others' columns do not go into A.

        Args:
            z: [rows, depth].
            numerics: How arithmetic is done.
            drop: Whether LoRA's dropout is drawn.
        """
        product, factors = self.product, self.product.factors
        assert factors is not None
        into_a, mask = z[:, : product.factored_width], None
        if drop and self.trains and factors.dropout:
            into_a, mask = torch.native_dropout(into_a, factors.dropout, True)
        v: Tensor | None = None
        for view in product.factored:
            assert view.near is not None
            part, near = product.part(into_a, view), numerics.cast(view.near)
            v = torch.mm(part, near) if v is None else add_narrower(v, part, near)
        assert v is not None
        return SavedActivations(v=v.mul_(factors.scaling), z_dropped=into_a, z_mask=mask)

    def factor_error(
        self, g: Tensor, shared: Mapping[str, Tensor], numerics: Numerics, deep: bool
    ) -> Tensor | None:
        """Return the gradient [rows, rank] of what goes into B, or None where nothing needs it.

        Args:
            g: Gradient of the sum, [rows, dim].
            shared: Shared parameters of the block.
            numerics: How arithmetic is done.
            deep: Whether the gradient of z is wanted.
        """
        product, factors = self.product, self.product.factors
        if factors is None or not product.factored:
            return None
        if not deep and not (self.trains and factors.near_trains):
            return None
        return torch.mm(g, numerics.cast(product.far(shared))).mul_(factors.scaling)

    def input_gradient(
        self, g: Tensor, error: Tensor | None, mask: Tensor | None, numerics: Numerics
    ) -> Tensor:
        """Return the gradient of z, [rows, depth]: ``g`` times the weights transposed.

        Args:
            g: Gradient of the sum, [rows, dim].
            error: See :meth:`factor_error`.
            mask: Where LoRA's dropout left z, if it was drawn.
            numerics: How arithmetic is done.
        """
        product, factors = self.product, self.product.factors
        weights = [(numerics.cast(view.weight).t(), None) for view in product.views]
        dz = product.side_by_side(g, weights)
        if error is None:
            return dz
        assert factors is not None
        for view in product.factored:
            assert view.near is not None
            into, part = product.part(dz, view), first_columns(error, view.near)
            near = numerics.cast(view.near).t()
            if mask is None:
                add_product(into, part, near)
            else:
                into.add_(dropped(torch.mm(part, near), product.part(mask, view), factors))
        return dz

    def weight_gradients(
        self,
        full: Sequence[tuple[list[View], slice, bool]],
        zs: Sequence[Tensor],
        saved: SavedActivations,
        g: Tensor,
        error: Tensor | None,
        sink: Sink,
        observer: Observer | None,
    ) -> None:
        """Add up gradients of weights and factors, in the rows of the heads.

        Args:
            full: What is FULL: runs, rows, and whether gradients overwrite.
            zs: Of each of these runs, what of z it took, [rows, columns]; where needed.
            saved: What :meth:`forward` gave to keep.
            g: Gradient of the sum, [rows, dim].
            error: See :meth:`factor_error`.
            sink: Takes the gradient of B.
            observer: Takes gradients of weights instead, if there is one.
        """
        product, factors, given = self.product, self.product.factors, iter(zs)
        for runs, rows, overwrite in full:
            for view in runs:
                into, z = Gradients(view, overwrite, observer), next(given, None)
                if view.weight_grad is not None or observer is not None:
                    assert z is not None
                    into.add(f"{product.role}.weight", view.weight_grad, z, rows_of(g, rows))
                if view.near_grad is not None and observer is None:
                    assert factors is not None
                    assert error is not None
                    if saved.z_dropped is not None:
                        z = product.part(saved.z_dropped[rows], view)
                    assert z is not None
                    errors = first_columns(error[rows], view.near_grad)
                    into.add(factors.near, view.near_grad, z, errors)
        if factors is not None and factors.far_trains and observer is None:
            assert saved.v is not None
            sink(factors.far, torch.mm(g.t(), saved.v))
