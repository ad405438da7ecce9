"""Runs a residual branch: x plus what the branch adds to it.

The sum of a branch is made segment by segment: first the norm of each and its head groups outside
the graph, while nothing is saved yet; then those that gradient passes through, whose products out
add to what is there. With checkpointing a segment keeps its input alone, and its backward pass
makes the rest once more.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.branch_nodes import ANCHOR, GroupRun, In, Out, wide
from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.model_adapter import Context
from d2ft_fl.engine.random_state import drawn_again, generator_state
from d2ft_fl.engine.saved_activations import SavedActivations
from d2ft_fl.engine.segments import Segment


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
    out = _sum([SegmentRun(branch, s, bounds, x.shape[1], context) for s in present], x)
    if branch.training and branch.traits.output_dropout:
        out = F.dropout(out, branch.traits.output_dropout)
    if branch.training and branch.traits.drop_path:
        out = _drop_path(out, branch.traits.drop_path)
    return x + out


def _sum(runs: Sequence["SegmentRun"], x: Tensor) -> Tensor:
    """Return what a branch adds to x, of all its segments that have examples."""
    if len(runs) == 1:
        return runs[0].sum(runs[0].begin(x))
    parts = x.split([run.examples for run in runs])
    begun = deque(run.begin(part) for run, part in zip(runs, parts, strict=True))
    del parts
    return torch.cat([run.sum(begun.popleft()) for run in runs])


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


class Begun(NamedTuple):
    """A segment whose sum has begun.

    Attributes:
        x: Its input, [examples, tokens, dim].
        shared: Shared parameters of the block, which want gradients where they train.
        graph: Whether gradient will come back.
        y: The norm of x, [rows, dim]; None where it comes later.
        outside: What is added outside the graph, [rows, dim]; None for nothing.
    """

    x: Tensor
    shared: Mapping[str, Tensor]
    graph: bool
    y: Tensor | None = None
    outside: Tensor | None = None


@dataclass(frozen=True)
class SegmentRun:
    """One run of a segment's examples.

    Attributes:
        branch: The branch.
        segment: The segment.
        bounds: See :func:`run_branch`.
        tokens: Of an example.
        context: Of all examples.
    """

    branch: Branch
    segment: Segment
    bounds: Sequence[int]
    tokens: int
    context: Context

    @property
    def examples(self) -> int:
        """How many examples the segment has."""
        first, stop = (self.bounds[slot] for slot in self.segment.slots)
        return stop - first

    def begin(self, x: Tensor) -> "Begun":
        """Return the norm of the segment's examples, and what is added to them outside the graph.

        Args:
            x: [examples, tokens, dim].
        """
        branch, segment = self.branch, self.segment
        graph = torch.is_grad_enabled() and bool(segment.alive)
        shared = branch.shared
        if segment.status is not Status.TRAINS or not graph:
            shared = {role: tensor.detach() for role, tensor in shared.items()}
        if not graph or not segment.through:
            x = x.detach()
        later = segment.status is Status.IDLE or (graph and branch.numerics.recompute)
        return Begun(x, shared, graph) if later else self.normed(x, shared, graph)

    def normed(self, x: Tensor, shared: Mapping[str, Tensor], graph: bool) -> "Begun":
        """See :meth:`begin`."""
        y = self.norm(x, shared)
        with torch.no_grad():
            return Begun(x, shared, graph, y, self._outside(y.detach(), shared, graph))

    def sum(self, begun: "Begun") -> Tensor:
        """Return what the branch adds to the segment's examples: [examples, tokens, dim]."""
        x, shared, graph, y, _ = begun
        if self.segment.status is Status.IDLE:
            return self._idle(x)
        if y is None:
            total = Recomputed.apply(self, tuple(shared), ANCHOR, x, *shared.values())
        elif graph:
            total = self.total(begun)
        else:
            total = begun.outside
        total = total.view(x.shape)
        scale = shared.get(self.branch.spec.scale)
        return total if scale is None else total * scale

    def total(self, begun: "Begun") -> Tensor:
        """Return the sum before its scale, [rows, dim], with what gradient comes back through."""
        _, shared, _, y, total = begun
        spec = self.branch.spec
        bias, far = shared.get(spec.bias), shared.get(spec.far_roles[1])
        assert y is not None
        for index, head_group in enumerate(self.segment.alive):
            run = self.group_run(head_group)
            z = self.middle(run, y, shared)
            self._tell(head_group, z)
            if index:
                total = total + Out.apply(run, ANCHOR, z, None, None, far)
            else:
                total = Out.apply(run, ANCHOR, z, bias, total, far)
            del z  # before the next is computed
        assert total is not None
        return total

    def norm(self, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Return y [rows, dim], in the type of products."""
        return self.branch.numerics.cast(self.branch.normed(x, shared)).flatten(0, 1)

    def middle(self, run: GroupRun, y: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Return what a head group makes of y up to its product out: [rows, depth]."""
        branch = self.branch
        deep = self.segment.through or (bool(run.full) and branch.trains.inward)
        with torch.set_grad_enabled(deep and torch.is_grad_enabled()):
            hs = In.apply(run, ANCHOR, y, shared.get(branch.spec.far_roles[0]))
            return branch.middle(hs, self.tokens, shared, self._context(run.head_group))

    def group_run(self, head_group: HeadGroup) -> GroupRun:
        """Return the run of a head group that gradient comes back through."""
        rows = ((part, self._rows(part.slots, head_group.slots)) for part in head_group.parts)
        full = [(part, at) for part, at in rows if at.start < at.stop]
        return GroupRun(self.branch, head_group, full)

    def again(
        self, head_group: HeadGroup, y: Tensor, shared: Mapping[str, Tensor]
    ) -> tuple[GroupRun, Tensor, SavedActivations]:
        """Return the run of a head group, its z, and what its product out kept, once more."""
        run = self.group_run(head_group)
        z = self.middle(run, y, shared)
        with torch.no_grad():
            return run, z, run.outward_again(z.detach())

    def _rows(self, slots: tuple[int, int], within: tuple[int, int]) -> slice:
        """Return the rows of some slots, counted from the first of others."""
        first = self.bounds[within[0]]
        start, stop = (self.bounds[slot] - first for slot in slots)
        return slice(start * self.tokens, stop * self.tokens)

    def _context(self, head_group: HeadGroup) -> Context:
        """Return the context of a head group's examples."""
        if not self.context:
            return self.context
        first, stop = (self.bounds[slot] for slot in head_group.slots)
        return {
            name: tensor if len(tensor) == 1 else tensor[first:stop]
            for name, tensor in self.context.items()
        }

    # -- outside the graph -------------------------------------------------------------------

    def _outside(self, y: Tensor, shared: Mapping[str, Tensor], graph: bool) -> Tensor | None:
        """Return what head groups outside the graph add, [rows, dim]; None where nothing is added.

        The bias is added here where no others will add it.

        Args:
            y: The norm, [rows, dim].
            shared: Shared parameters of the block.
            graph: Whether there is a graph for other head groups.
        """
        segment, branch = self.segment, self.branch
        bias = None if graph else shared.get(branch.spec.bias)
        running = segment.silent if graph else [*segment.alive, *segment.silent]
        offsets = branch.offsets[slice(*segment.slots)]
        total: Tensor | None = None
        if any(o is not None for o in offsets) or (running and running[0].slots != segment.slots):
            total, bias = self._start(y, bias), None
        for head_group in running:
            rows = self._rows(head_group.slots, segment.slots)
            if rows.start == rows.stop:
                continue
            run = GroupRun(branch, head_group, [], graph=False)
            z = self.middle(run, y[rows], shared)
            self._tell(head_group, z)
            into = None if total is None else total[rows]
            added, _ = run.outward(z, bias, into, shared)
            if into is None or len(into) == len(y):
                total = added
            elif added is not into:
                into.copy_(added)
            bias = None
            del z, into, added  # before the next is computed
        return total

    def _start(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return what is there before any product: the bias, and what skipped heads add."""
        total = torch.zeros_like(y) if bias is None else y.new_empty(y.shape).copy_(bias)
        for slot in range(*self.segment.slots):
            if (offset := self.branch.offsets[slot]) is not None:
                rows = self._rows((slot, slot + 1), self.segment.slots)
                total[rows].view(-1, *offset.shape).add_(offset)
        return total

    def _idle(self, x: Tensor) -> Tensor:
        """Return what stands for a branch of which nothing runs; a scale is in it."""
        out = x.new_zeros(x.shape, dtype=self.branch.numerics.dtype)
        for slot in range(*self.segment.slots):
            if (offset := self.branch.offsets[slot]) is not None:
                first = self.bounds[self.segment.slots[0]]
                out[self.bounds[slot] - first : self.bounds[slot + 1] - first] = offset
        return out

    def _tell(self, head_group: HeadGroup, z: Tensor) -> None:
        if self.branch.tally is not None:
            self.branch.tally(head_group, z.detach().view(-1, self.tokens, head_group.depth))


class Recomputed(torch.autograd.Function):
    """A segment's sum that keeps its input alone, and makes the rest once more on the way back.

    Neither the product out nor what runs outside the graph is needed twice. In place of
    ``torch.utils.checkpoint``, which would make both again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: SegmentRun,
        roles: tuple[str, ...],
        anchor: Tensor,
        x: Tensor,
        *values: Tensor,
    ) -> Tensor:
        """Return the sum before its scale, [rows, dim]; ``values`` are shared, one a role."""
        ctx.run, ctx.roles, ctx.random_state = run, roles, None
        ctx.save_for_backward(x, *values)
        begun = run.normed(x, dict(zip(roles, values, strict=True)), graph=True)
        if run.branch.training and run.branch.random:
            ctx.random_state = generator_state(x.device)
        return run.total(begun)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of x and of shared parameters."""
        run: SegmentRun = ctx.run
        wanted = ctx.needs_input_grad[3:]
        leaves = [
            tensor.detach().requires_grad_(wants)
            for tensor, wants in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        x, shared = leaves[0], dict(zip(ctx.roles, leaves[1:], strict=True))
        with torch.enable_grad(), drawn_again(g.device, ctx.random_state):
            y = run.norm(x, shared)
            again = [run.again(head_group, y, shared) for head_group in run.segment.alive]
        del y
        edges, dzs, grads = [], [], dict[str, Tensor]()
        while again:
            group_run, z, saved = again.pop()
            zs = group_run.parts_of(z.detach(), saved)
            dz, of_shared = group_run.outward_gradients(saved, zs, g, shared, z.requires_grad)
            if dz is not None:
                edges.append(get_gradient_edge(z))
                dzs.append(dz)
            grads |= of_shared
            del z, zs, dz, saved
        bias = run.branch.spec.bias
        if bias in shared and shared[bias].requires_grad:
            grads[bias] = g.sum(0, dtype=shared[bias].dtype)
        if edges:
            torch.autograd.backward(edges, dzs)
        results = [x.grad]
        for role, leaf in shared.items():
            given = grads.get(role) if leaf.requires_grad else None
            results.append(leaf.grad if given is None else wide(given, leaf))
        return None, None, None, *results
