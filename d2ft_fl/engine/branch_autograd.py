"""The sum of a branch as one node of autograd's graph."""

from typing import Any

import torch
from torch import Tensor

from d2ft_fl.engine.branch_backward import SegmentBackward, SharedGradients
from d2ft_fl.engine.branch_forward import branch_sum
from d2ft_fl.engine.branch_run import BranchRun
from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.random_state import drawn_again


class BranchSum(torch.autograd.Function):
    """What a branch adds, as one node of the graph.

    Saved: x and the norm's statistics; y = norm(x) where something runs FULL; for a FULL or FROZEN
    head group what its middle saves, and for a FULL one z besides, where the middle has not saved
    it anyway; the sum, where a layer scale trains. With ``recompute`` x only (and the sum).

    ``anchor`` wants a gradient, which it never gets: what trains may be sliced parameters alone,
    whose gradients are written where they belong, and autograd is to come by all the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: BranchRun,
        roles: tuple[str, ...],
        anchor: Tensor,
        x: Tensor,
        *values: Tensor,
    ) -> Tensor:
        """Return the sum of what head groups add, scaled: [examples, tokens, dim].

        Args:
            ctx: autograd's.
            run: Which examples go through which branch.
            roles: Of the branch's shared parameters.
            anchor: An empty tensor that wants a gradient.
            x: The residual stream.
            values: Shared parameters, one a role.
        """
        branch = run.branch
        shared = dict(zip(roles, values, strict=True))
        wanted = dict(zip(("x", *roles), ctx.needs_input_grad[3:], strict=True))
        total, ctx.states = branch_sum(run, x, shared, wanted)
        ctx.run, ctx.roles, ctx.wanted = run, roles, wanted
        scale = shared.get(branch.spec.scale)
        keep_total = scale is not None and wanted[branch.spec.scale]
        # Big tensors go through autograd's own store, where hooks see them.
        big = [tensor for state in ctx.states for tensor in state.release()]
        ctx.save_for_backward(
            x if branch.numerics.recompute else None, total if keep_total else None, *values, *big
        )
        return run.scaled(total, shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of x and of shared parameters; those of slices go where they belong."""
        run, roles, branch = ctx.run, ctx.roles, ctx.run.branch
        x, total, *rest = ctx.saved_tensors
        shared = dict(zip(roles, rest[: len(roles)], strict=True))
        big = iter(rest[len(roles) :])
        grads, inputs = SharedGradients(ctx.wanted), list[tuple[slice, Tensor]]()
        scale = shared.get(branch.spec.scale)
        scaled = grad if scale is None else grad * scale
        live = [segment for segment in run.present if segment.alive]
        for segment, state in zip(live, ctx.states, strict=True):
            part = run.examples(segment)
            state.restore(big)
            if segment.status is Status.TRAINS:
                if total is not None:
                    product = grad[part] * total[part]
                    grads.add(branch.spec.scale, product.flatten(0, 1).sum(0))
                    del product
                if ctx.wanted.get(branch.spec.bias):
                    grads.add(branch.spec.bias, scaled[part].flatten(0, 1).sum(0))
            g = branch.numerics.cast(scaled[part]).flatten(0, 1)
            again = None if x is None else x[part]
            with drawn_again(grad.device, state.random_state):
                dx = SegmentBackward(run, segment, state, g, again, grads).input_gradient()
            if dx is not None:
                inputs.append((part, dx))
        if inputs:
            grads.sums["x"] = _assembled(inputs, grad)
        values = (grads.of(role, shared[role]) for role in roles)
        return None, None, None, grads.sums.get("x"), *values


def _assembled(parts: list[tuple[slice, Tensor]], like: Tensor) -> Tensor:
    """Return gradients of some examples as the gradient of all: zero for the others."""
    if len(parts) == 1 and len(parts[0][1]) == len(like):
        return parts[0][1]
    whole = like.new_zeros(like.shape, dtype=parts[0][1].dtype)
    for examples, part in parts:
        whole[examples] = part
    return whole
