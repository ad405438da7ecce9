"""The products in of a head group: the norm y [rows, dim] times each head's weights, and back.

Rows are examples x tokens. With LoRA the first product has factors, ``y (W + s B A)^T``, of which
A is common to the block and B divided over heads.
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


class ProductsIn:
    """The products in of some heads.

    Args:
        products: In the order in which the middle takes what they make.
        trains: Whether any of the heads is FULL.
    """

    def __init__(self, products: list[Product], trains: bool):
        self.products, self.trains = products, trains

    def forward(
        self, y: Tensor, shared: Mapping[str, Tensor], numerics: Numerics, drop: bool
    ) -> tuple[list[Tensor], SavedActivations]:
        """Return what each product makes of ``y`` [rows, dim], [rows, width], and what to keep.

        Args:
            y: In the type of products.
            shared: Shared parameters of the block.
            numerics: How arithmetic is done.
            drop: Whether LoRA's dropout is drawn.
        """
        out, saved = [], NOTHING_SAVED
        for product in self.products:
            h = product.side_by_side(
                y,
                [
                    (
                        numerics.cast(view.weight).t(),
                        None if view.bias is None else numerics.cast(view.bias),
                    )
                    for view in product.views
                ],
            )
            if product.factors and product.factored:
                saved = self._add_factors(h, product, y, shared, numerics, drop)
            out.append(h)
        return out, saved

    def _add_factors(
        self,
        h: Tensor,
        product: Product,
        y: Tensor,
        shared: Mapping[str, Tensor],
        numerics: Numerics,
        drop: bool,
    ) -> SavedActivations:
        """Add what the factors make of y into ``h`` [rows, width]; return what to keep."""
        factors, into_a, mask = product.factors, y, None
        assert factors is not None
        if drop and self.trains and factors.dropout:
            into_a, mask = torch.native_dropout(y, factors.dropout, True)
        u = torch.mm(into_a, numerics.cast(product.far(shared)).t()).mul_(factors.scaling)
        for view in product.factored:
            assert view.near is not None
            add_product(
                product.part(h, view), first_columns(u, view.near), numerics.cast(view.near).t()
            )
        if not self.trains:
            return NOTHING_SAVED
        return SavedActivations(
            u=u if factors.near_trains else None,
            y_dropped=into_a if mask is not None and factors.far_trains else None,
            y_mask=mask,
        )

    def factor_error(
        self, dhs: Sequence[Tensor], numerics: Numerics, through: bool
    ) -> Tensor | None:
        """Return the gradient [rows, rank] of what A makes, or None where nothing needs it.

        Args:
            dhs: Gradients of what the products make.
            numerics: How arithmetic is done.
            through: Whether the gradient of y is wanted.
        """
        for product, dh in zip(self.products, dhs, strict=True):
            factors = product.factors
            if factors is None or not product.factored:
                continue
            if not through and not (self.trains and factors.far_trains):
                continue
            du: Tensor | None = None
            for view in product.factored:
                assert view.near is not None
                part, near = product.part(dh, view), numerics.cast(view.near)
                du = torch.mm(part, near) if du is None else add_narrower(du, part, near)
            assert du is not None
            return du.mul_(factors.scaling)
        return None

    def input_gradient(
        self,
        dhs: Sequence[Tensor],
        error: Tensor | None,
        mask: Tensor | None,
        shared: Mapping[str, Tensor],
        numerics: Numerics,
    ) -> Tensor:
        """Return the gradient of y, [rows, dim]: each dh times its weights.

        Args:
            dhs: Gradients of what the products make.
            error: See :meth:`factor_error`.
            mask: Where LoRA's dropout left y, if it was drawn.
            shared: Shared parameters of the block.
            numerics: How arithmetic is done.
        """
        dy: Tensor | None = None
        for product, dh in zip(self.products, dhs, strict=True):
            for view in product.views:
                dy = times(product.part(dh, view), numerics.cast(view.weight), into=dy)
            if product.factors and error is not None:
                far = numerics.cast(product.far(shared))
                if mask is None:
                    dy = times(error, far, into=dy)
                else:
                    assert dy is not None
                    dy.add_(dropped(times(error, far), mask, product.factors))
        assert dy is not None
        return dy

    def weight_gradients(
        self,
        full: Sequence[tuple[list[list[View]], slice, bool]],
        saved: SavedActivations,
        y: Tensor | None,
        dhs: Sequence[Tensor],
        error: Tensor | None,
        sink: Sink,
        observer: Observer | None,
    ) -> None:
        """Add up gradients of weights, biases and factors, in the rows of the heads.

        Args:
            full: What is FULL: runs of each product, rows, and whether gradients overwrite.
            saved: What :meth:`forward` gave to keep.
            y: What went in, where anything needs it.
            dhs: Gradients of what the products make.
            error: See :meth:`factor_error`.
            sink: Takes the gradient of A.
            observer: Takes gradients of weights and biases instead, if there is one.
        """
        for index, (product, dh) in enumerate(zip(self.products, dhs, strict=True)):
            factors = product.factors
            for runs, rows, overwrite in full:
                for view in runs[index]:
                    into = Gradients(view, overwrite, observer)
                    part = product.part(rows_of(dh, rows), view)
                    if view.weight_grad is not None or observer is not None:
                        assert y is not None
                        into.add(f"{product.role}.weight", view.weight_grad, part, rows_of(y, rows))
                    if view.bias is not None and (view.bias_grad is not None or observer):
                        into.add(f"{product.role}.bias", view.bias_grad, part, None)
                    if view.near_grad is not None and observer is None:
                        assert factors is not None
                        assert saved.u is not None
                        u = first_columns(saved.u[rows], view.near_grad)
                        into.add(factors.near, view.near_grad, part, u)
            if factors and factors.far_trains and observer is None:
                into_a = saved.y_dropped if saved.y_dropped is not None else y
                assert error is not None
                assert into_a is not None
                sink(factors.far, torch.mm(error.t(), into_a))
