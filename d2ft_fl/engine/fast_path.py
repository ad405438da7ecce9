"""A branch in which one piece runs FULL and nothing else runs: torch's own graph but for products.

What :mod:`d2ft_fl.engine.branch_autograd` does for any schedule costs Python and calls of autograd
within autograd, half a millisecond a branch. Here only the two products are nodes of our own, so
that gradients of weights are written where they belong, and none is added up that need not be.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.head_group import HeadGroup, SavedActivations, no_sink
from d2ft_fl.engine.matmul import times
from d2ft_fl.engine.model_adapter import Context

if TYPE_CHECKING:
    from d2ft_fl.engine.branch import Branch


def only_group(branch: "Branch") -> HeadGroup | None:
    """The piece that is all of a branch, if there is one that :func:`run` can do."""
    if branch.numerics.mixed or branch.numerics.recompute or branch.loras:
        return None
    if len(branch.segments) != 1 or any(offset is not None for offset in branch.offsets):
        return None
    (segment,) = branch.segments
    if segment.status is not Status.TRAINS or not segment.through or not branch.trains.norm:
        return None
    if len(segment.alive) != 1 or segment.silent or not segment.alive[0].full:
        return None
    head_group = segment.alive[0]
    products = (*head_group.inward, head_group.outward)
    return head_group if len(products) == 2 and all(len(p.views) == 1 for p in products) else None


def run(branch: "Branch", head_group: HeadGroup, x: Tensor, context: Context) -> Tensor:
    """What the branch adds to x [examples, tokens, dim]."""
    shared = branch.shared
    y = branch.normed(x, shared).flatten(0, 1)
    z = branch.middle([_In.apply(y, head_group)], x.shape[1], shared, context)
    out = _Out.apply(z, shared.get(branch.spec.bias), head_group).view(x.shape)
    scale = shared.get(branch.spec.scale)
    return out if scale is None else out * scale


class _In(torch.autograd.Function):
    """y [rows, dim] times the weights of the product in, plus their biases."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, head_group: HeadGroup) -> Tensor:
        view = head_group.inward[0].views[0]
        ctx.head_group = head_group
        ctx.save_for_backward(y if view.weight_grad is not None else None)
        return times(y, view.weight.t(), view.bias)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        ctx.head_group.gradients_in(SavedActivations(), y, [dh], None, no_sink, None)
        return times(dh, ctx.head_group.inward[0].views[0].weight), None


class _Out(torch.autograd.Function):
    """z [rows, depth] times the weights of the product out, plus its bias [dim]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, head_group: HeadGroup) -> Tensor:
        view = head_group.outward.views[0]
        ctx.head_group = head_group
        ctx.save_for_backward(z if view.weight_grad is not None else None)
        return times(z, view.weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (z,) = ctx.saved_tensors
        ctx.head_group.gradients_out(SavedActivations(z=z), g, None, no_sink, None)
        dz = times(g, ctx.head_group.outward.views[0].weight.t())
        return dz, g.sum(0) if ctx.needs_input_grad[1] else None, None
