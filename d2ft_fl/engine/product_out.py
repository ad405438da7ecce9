"""The product out of a head group: z [rows, depth] times each head's weights, and back.

Rows are examples x tokens. With LoRA it has factors, ``z (W + s B A)^T``, of which B is common to
the block and A divided over heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.product import (
    Product,
    add_narrower,
    add_product,
    beside_each_other,
    dropped,
    first_columns,
)
from d2ft_fl.engine.saved_activations import NOTHING_SAVED, Observer, SavedActivations, Sink


class ProductOut:
    """The product out of some heads.

    Args:
        product: Its rows and factors.
    """

    def __init__(self, product: Product):
        self.product, self.gradients = product, product.gradients

    def forward(
        self,
        z: Tensor,
        total: Tensor,
        shared: Mapping[str, Tensor],
        numerics: Numerics,
        start: Tensor | None,
        drop: bool,
    ) -> SavedActivations:
        """Write ``start`` plus z times the weights into ``total`` [rows, dim]; return what to keep.

        Args:
            z: [rows, depth].
            total: It is overwritten.
            shared: Shared parameters of the block.
            numerics: How arithmetic is done.
            start: What to add to: ``total`` itself, a bias [dim], or None for nothing.
            drop: Whether LoRA's dropout is drawn.
        """
        product, factors = self.product, self.product.factors
        for view in product.views:
            part, weight = product.part(z, view), numerics.cast(view.weight)
            if start is None:
                torch.mm(part, weight, out=total)
            else:
                torch.addmm(start, part, weight, out=total)
            start = total
        if not factors or not product.factored:
            return NOTHING_SAVED
        saved = self.into_b(z, numerics, drop)
        assert saved.v is not None
        add_product(total, saved.v, numerics.cast(product.far(shared)).t())
        if not self.gradients.wanted:
            return NOTHING_SAVED
        kept = saved.z_dropped if saved.z_mask is not None and factors.near_trains else None
        v = saved.v if factors.far_trains else None
        return SavedActivations(v=v, z_dropped=kept, z_mask=saved.z_mask)

    def into_b(self, z: Tensor, numerics: Numerics, drop: bool) -> SavedActivations:
        """Return what A makes of z, as ``v``, with what went into A.

        Args:
            z: [rows, depth].
            numerics: How arithmetic is done.
            drop: Whether LoRA's dropout is drawn.
        """
        product, factors = self.product, self.product.factors
        assert factors is not None
        into_a, mask = z, None
        if drop and self.gradients.wanted and factors.dropout:
            into_a, mask = torch.native_dropout(z, factors.dropout, True)
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
        if not deep and not (self.gradients.wanted and factors.near_trains):
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
        weights = [(view.columns, numerics.cast(view.weight).t(), None) for view in product.views]
        dz = beside_each_other(g, weights)
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
        saved: SavedActivations,
        g: Tensor,
        error: Tensor | None,
        sink: Sink,
        observer: Observer | None,
    ) -> None:
        """Add up gradients of weights and factors, in the rows of the heads.

        Args:
            saved: What :meth:`forward` gave to keep, and z.
            g: Gradient of the sum, [rows, dim].
            error: See :meth:`factor_error`.
            sink: Takes the gradient of B.
            observer: Takes gradients of weights instead, if there is one.
        """
        product, name = self.product, f"{self.product.role}.weight"
        for view in product.views:
            if view.weight_grad is not None or observer is not None:
                assert saved.z is not None
                part = product.part(saved.z, view)
                product.take_gradient(name, view, view.weight_grad, part, g, observer)
        factors = product.factors
        if factors is None or observer is not None:
            return
        into_a = saved.z_dropped if saved.z_dropped is not None else saved.z
        for view in product.views:
            if view.near_grad is not None:
                assert into_a is not None
                assert error is not None
                part, errors = product.part(into_a, view), first_columns(error, view.near_grad)
                product.take_gradient(factors.near, view, view.near_grad, part, errors, None)
        if factors.far_trains:
            assert saved.v is not None
            sink(factors.far, torch.mm(g.t(), saved.v))
