"""A branch in which one head group runs FULL and nothing else runs: torch's graph but for products.

What :mod:`d2ft_fl.engine.branch_autograd` does for any schedule costs Python and calls of autograd
within autograd, half a millisecond a branch. Here only the two products are nodes of our own, so
that gradients of weights are written where they belong, and none is added up that need not be.
"""

from typing import Any

import torch
from torch import Tensor

from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.matmul import times
from d2ft_fl.engine.model_adapter import Context
from d2ft_fl.engine.saved_activations import NOTHING_SAVED, SavedActivations, no_sink


def run(branch: Branch, head_group: HeadGroup, x: Tensor, context: Context) -> Tensor:
    """Return what the branch adds to x, [examples, tokens, dim].

    Args:
        branch: Whose ``only_group`` is not None.
        head_group: That group.
        x: The residual stream.
        context: Of all examples.
    """
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
        view = head_group.products[0].views[0]
        ctx.head_group = head_group
        ctx.save_for_backward(y if view.weight_grad is not None else None)
        return times(y, view.weight.t(), view.bias)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        ctx.head_group.inward.weight_gradients(NOTHING_SAVED, y, [dh], None, no_sink, None)
        return times(dh, ctx.head_group.products[0].views[0].weight), None


class _Out(torch.autograd.Function):
    """z [rows, depth] times the weights of the product out, plus its bias [dim]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, head_group: HeadGroup) -> Tensor:
        view = head_group.products[1].views[0]
        ctx.head_group = head_group
        ctx.save_for_backward(z if view.weight_grad is not None else None)
        return times(z, view.weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (z,) = ctx.saved_tensors
        saved = SavedActivations(z=z)
        ctx.head_group.outward.weight_gradients(saved, g, None, no_sink, None)
        dz = times(g, ctx.head_group.products[1].views[0].weight.t())
        return dz, g.sum(0) if ctx.needs_input_grad[1] else None, None
