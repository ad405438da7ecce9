"""Runs a residual branch: x plus what the branch adds to it, by the cheapest way that does it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl.engine import fast_path
from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.branch_autograd import BranchSum
from d2ft_fl.engine.branch_forward import branch_sum
from d2ft_fl.engine.branch_run import BranchRun
from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.model_adapter import Context


def run_branch(branch: Branch, x: Tensor, bounds: Sequence[int], context: Context) -> Tensor:
    """Return x [examples, tokens, dim] plus what the branch adds, as large.

    Args:
        branch: What to run.
        x: The residual stream.
        bounds: Slot s has the examples ``bounds[s]`` to before ``bounds[s + 1]``.
        context: Of all examples; see :data:`~d2ft_fl.engine.model_adapter.Context`.
    """
    present = [s for s in branch.segments if bounds[s.slots[0]] < bounds[s.slots[1]]]
    if all(s.status is Status.IDLE for s in present) and not any(
        o is not None and bounds[slot] < bounds[slot + 1] for slot, o in enumerate(branch.offsets)
    ):
        return x
    graph = torch.is_grad_enabled() and any(s.alive for s in present)
    only = branch.only_group if graph else None
    if only is not None and branch.observer is None and branch.tally is None:
        out = fast_path.run(branch, only, x, context)
    else:
        run = BranchRun(branch, present, tuple(bounds), x.shape[1], context)
        out = _with_graph(run, x) if graph else _without_graph(run, x)
    if branch.training and branch.traits.output_dropout:
        out = F.dropout(out, branch.traits.output_dropout)
    if branch.training and branch.traits.drop_path:
        out = _drop_path(out, branch.traits.drop_path)
    return x + out


def _with_graph(run: BranchRun, x: Tensor) -> Tensor:
    branch = run.branch
    anchor = x.new_empty(0, requires_grad=True)
    values = (branch.shared[role] for role in branch.shared_roles)
    return BranchSum.apply(run, branch.shared_roles, anchor, x, *values)


@torch.no_grad()
def _without_graph(run: BranchRun, x: Tensor) -> Tensor:
    shared = run.branch.shared
    return run.scaled(branch_sum(run, x.detach(), shared, None)[0], shared)


def _drop_path(branch: Tensor, probability: float) -> Tensor:
    """Drop what a branch adds for some examples (stochastic depth, Huang et al., arXiv 1603.09382).

    Args:
        branch: [examples, tokens, dim].
        probability: Of an example to go without; the others are scaled by 1 / (1 - probability).
    """
    kept = 1 - probability
    mask = branch.new_empty((len(branch), 1, 1)).bernoulli_(kept)
    if kept > 0:
        mask.div_(kept)
    return branch * mask
