"""The products of a head group as nodes of autograd's graph; all else of a branch is torch's own.

Gradients of weights are written by the nodes where they add up, and none is made that no head
needs. So torch differentiates any norm, attention and activation, while products compute, save and
add up exactly what the schedule asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.head_group import FullPart, HeadGroup
from d2ft_fl.engine.product import rows_of
from d2ft_fl.engine.saved_activations import NOTHING_SAVED, SavedActivations

# Gradients of parameters that heads share, by role.
SharedGradients = dict[str, Tensor]


# Wants a gradient, which it never gets: what trains may be sliced parameters alone, whose gradients
# are written where they belong, and autograd is to come by all the same.
ANCHOR = torch.empty(0, requires_grad=True)


@dataclass(frozen=True)
class GroupRun:
    """One run of a head group on its examples.

    Attributes:
        branch: Whose group it is.
        head_group: The group.
        full: What of it is FULL, with its rows of the group's examples.
        graph: Whether gradient will come back.
    """

    branch: Branch
    head_group: HeadGroup
    full: list[tuple[FullPart, slice]]
    graph: bool = True

    @property
    def drops(self) -> bool:
        """Whether LoRA's dropout is drawn."""
        return self.graph and self.branch.training

    # -- products in -------------------------------------------------------------------------

    def inward(
        self, y: Tensor, shared: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], SavedActivations]:
        """Return what the products in make of y [rows, dim], and what to keep."""
        return self.head_group.inward.forward(y, shared, self.branch.numerics, self.drops)

    @property
    def keeps_y(self) -> bool:
        """Whether gradients need y as it is."""
        return bool(self.full) and self.branch.keeps_y

    def inward_gradients(
        self,
        saved: SavedActivations,
        y: Tensor | None,
        dhs: Sequence[Tensor],
        shared: Mapping[str, Tensor],
        through: bool,
    ) -> tuple[Tensor | None, SharedGradients]:
        """Add up gradients of the weights; return that of y, if wanted, and of what is shared."""
        branch, inward, grads = self.branch, self.head_group.inward, SharedGradients()
        error = inward.factor_error(dhs, branch.numerics, through)
        full = [(part.inward, rows, part.overwrite) for part, rows in self.full]
        if full:
            inward.weight_gradients(full, saved, y, dhs, error, grads.__setitem__, branch.observer)
        if not through:
            return None, grads
        dy = inward.input_gradient(dhs, error, saved.y_mask, shared, branch.numerics)
        return dy, grads

    # -- product out -------------------------------------------------------------------------

    def outward(
        self, z: Tensor, bias: Tensor | None, into: Tensor | None, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, SavedActivations]:
        """Return what the product out makes of z [rows, depth], added, and what to keep."""
        outward, numerics = self.head_group.outward, self.branch.numerics
        if bias is not None:
            bias = numerics.cast(bias)
        return outward.forward(z, bias, into, shared, numerics, self.drops)

    def outward_again(self, z: Tensor) -> SavedActivations:
        """Return what :meth:`outward` gave to keep, once more."""
        outward = self.head_group.outward
        factors, numerics = outward.product.factors, self.branch.numerics
        if not self.full or factors is None or not outward.product.factored:
            return NOTHING_SAVED
        drops = self.drops and bool(factors.dropout)
        if not (factors.far_trains or drops):
            return NOTHING_SAVED
        saved = outward.into_b(z, numerics, self.drops)
        keeps = drops and factors.near_trains
        return saved if keeps else saved._replace(z_dropped=None)

    def parts_of(self, z: Tensor, saved: SavedActivations) -> list[Tensor]:
        """Return what of z the gradients of weights need: of each run of FULL heads, its columns.

        Args:
            z: [rows, depth].
            saved: What :meth:`outward` gave to keep.
        """
        if not self.branch.trains.z or saved.z_dropped is not None:
            return []
        product = self.head_group.outward.product
        return [
            product.part(rows_of(z, rows), view)
            for part, rows in self.full
            for view in part.outward
        ]

    def kept_z(self, z: Tensor, saved: SavedActivations) -> list[Tensor]:
        """Return what of z to keep: copies, where all of it would otherwise stay for a part."""
        parts = self.parts_of(z, saved)
        copies = self.head_group.mixed and not self.branch.spec.saves_result
        return [part.clone() for part in parts] if copies else parts

    def outward_gradients(
        self,
        saved: SavedActivations,
        zs: Sequence[Tensor],
        g: Tensor,
        shared: Mapping[str, Tensor],
        deep: bool,
    ) -> tuple[Tensor | None, SharedGradients]:
        """Add up gradients of the weights; return that of z, if wanted, and of what is shared.

        Args:
            saved: What :meth:`outward` gave to keep.
            zs: What :meth:`parts_of` or :meth:`kept_z` gave.
            g: Gradient of the sum, [rows, dim], in the type of products.
            shared: Shared parameters of the block.
            deep: Whether the gradient of z is wanted.
        """
        branch, outward, grads = self.branch, self.head_group.outward, SharedGradients()
        error = outward.factor_error(g, shared, branch.numerics, deep)
        full = [(part.outward, rows, part.overwrite) for part, rows in self.full]
        if full:
            outward.weight_gradients(full, zs, saved, g, error, grads.__setitem__, branch.observer)
        return outward.input_gradient(
            g, error, saved.z_mask, branch.numerics
        ) if deep else None, grads


class In(torch.autograd.Function):
    """The products in: y [rows, dim] to what each of them makes, [rows, width]."""

    @staticmethod
    def forward(
        ctx: Any, run: GroupRun, anchor: Tensor, y: Tensor, far: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Multiply y by the weights; ``far`` is the LoRA factor that heads share."""
        hs, saved = run.inward(y, _shared(run, 0, far))
        ctx.run = run
        ctx.plain = saved is NOTHING_SAVED
        ctx.save_for_backward(y if run.keeps_y else None, far, *(() if ctx.plain else saved))
        return tuple(hs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of y and of the shared factor."""
        y, far, *saved = ctx.saved_tensors
        shared = _shared(ctx.run, 0, far)
        kept = NOTHING_SAVED if ctx.plain else SavedActivations(*saved)
        dy, grads = ctx.run.inward_gradients(kept, y, dhs, shared, ctx.needs_input_grad[2])
        return None, None, dy, _of_far(grads, far)


class Out(torch.autograd.Function):
    """The product out: z [rows, depth] to the sum [rows, dim], with what else is added."""

    @staticmethod
    def forward(
        ctx: Any,
        run: GroupRun,
        anchor: Tensor,
        z: Tensor,
        bias: Tensor | None,
        into: Tensor | None,
        far: Tensor | None,
    ) -> Tensor:
        """Multiply z by the weights; ``into``, which may be overwritten, wants no gradient."""
        total, saved = run.outward(z, bias, into, _shared(run, 1, far))
        zs = run.kept_z(z, saved)
        ctx.run, ctx.bias_type = run, None if bias is None else bias.dtype
        ctx.plain = saved is NOTHING_SAVED
        ctx.save_for_backward(far, *(() if ctx.plain else saved), *zs)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of z, of the bias and of the shared factor."""
        far, *rest = ctx.saved_tensors
        fields = 0 if ctx.plain else len(SavedActivations._fields)
        saved = SavedActivations(*rest[:fields]) if fields else NOTHING_SAVED
        zs = rest[fields:]
        shared = _shared(ctx.run, 1, far)
        dz, grads = ctx.run.outward_gradients(saved, zs, g, shared, ctx.needs_input_grad[2])
        db = g.sum(0, dtype=ctx.bias_type) if ctx.needs_input_grad[3] else None
        return None, None, dz, db, None, _of_far(grads, far)


def _shared(run: GroupRun, product: int, far: Tensor | None) -> dict[str, Tensor]:
    """Return the shared LoRA factor of the product in (0) or out (1), by its role."""
    return {} if far is None else {run.branch.spec.far_roles[product]: far}


def _of_far(grads: SharedGradients, far: Tensor | None) -> Tensor | None:
    """Return the gradient of a shared factor as large as it is, or None where there is none."""
    if far is None or not grads:
        return None
    (gradient,) = grads.values()
    return wide(gradient, far)


def wide(gradient: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of a LoRA factor of which fewer ranks train here, as large as all."""
    if gradient.shape == like.shape:
        return gradient
    whole = gradient.new_zeros(like.shape)
    whole[tuple(slice(n) for n in gradient.shape)] = gradient
    return whole
