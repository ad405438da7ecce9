"""One run of a batch's examples through a branch: what its two directions have in common.

Each head group of a branch (see :mod:`d2ft_fl.engine.head_group`) is one narrower product in, one
middle (attention, or the activation) and one narrower product out. Norms and middles are small
graphs of autograd, so that torch differentiates any norm, attention and activation; products are
written out, so that they save, compute and add up exactly what the schedule asks for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.model_adapter import Context
from d2ft_fl.engine.saved_activations import NOTHING_SAVED, SavedActivations
from d2ft_fl.engine.segments import Segment


class Graph:
    """A small graph of autograd: its leaves, and the edge that it ends in.

    Args:
        leaves: What it begins with; those that want no gradient are left out.
        result: What it makes.
    """

    def __init__(self, leaves: Sequence[Tensor], result: Tensor):
        self.leaves = [leaf for leaf in leaves if leaf.requires_grad]
        self.edge = get_gradient_edge(result) if result.requires_grad else None
        self.dtype = result.dtype


def gradients(
    graphs: Sequence[Graph], grads: Sequence[Tensor], shared: Sequence[Tensor] = ()
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return gradients of the leaves of each graph, and of leaves that graphs share.

    The graphs are gone afterwards.

    Args:
        graphs: Differentiated in one go.
        grads: Gradients of their results.
        shared: Leaves besides those that graphs name.
    """
    edges = [graph.edge for graph in graphs if graph.edge is not None]
    leaves = [leaf for graph in graphs for leaf in graph.leaves]
    if not leaves and not shared:
        return [[] for _ in graphs], []
    values = [grad.to(graph.dtype) for graph, grad in zip(graphs, grads, strict=True)]
    results = iter(torch.autograd.grad(edges, [*leaves, *shared], values))
    return [[next(results) for _ in graph.leaves] for graph in graphs], list(results)


@dataclass
class SegmentState:
    """What a segment through which gradient goes keeps for its backward pass.

    Attributes:
        shared: Role -> the leaf that stands for a shared parameter in the segment's graphs.
        norm: The graph of the norm, x to y; None where x wants no gradient.
        y: The norm's result [rows, dim], where gradients of weights need it.
        random_state: Of the generator that dropout draws from, to draw the same again.
        middles: Of each live head group, its middle's graph, where gradient goes through it.
        saved: Of each live head group, what the gradients of its weights need.
    """

    shared: dict[str, Tensor]
    norm: Graph | None
    y: Tensor | None
    random_state: Tensor | None = None
    middles: list[Graph | None] = field(default_factory=list)
    saved: list[SavedActivations] = field(default_factory=list)

    def take(self, index: int) -> tuple[Graph | None, SavedActivations]:
        """Return what is kept of one live head group, and keep it no longer."""
        if not self.middles:
            return None, NOTHING_SAVED
        kept = self.middles[index], self.saved[index]
        self.middles[index], self.saved[index] = None, NOTHING_SAVED
        return kept

    def release(self) -> list[Tensor | None]:
        """Return the big tensors, and keep them no longer; :meth:`restore` puts them back."""
        tensors = [self.y, *(t for saved in self.saved for t in saved)]
        self.y, self.saved = None, [NOTHING_SAVED] * len(self.saved)
        return tensors

    def restore(self, tensors: Iterator[Tensor | None]) -> None:
        """Put back what :meth:`release` returned."""
        self.y = next(tensors)
        self.saved = [
            SavedActivations(*(next(tensors) for _ in SavedActivations._fields)) for _ in self.saved
        ]


@dataclass(frozen=True)
class BranchRun:
    """One run of examples through a branch.

    Attributes:
        branch: The branch.
        present: Segments that have examples.
        bounds: Slot s has the examples ``bounds[s]`` to before ``bounds[s + 1]``.
        tokens: Tokens of an example.
        context: Of all examples.
    """

    branch: Branch
    present: list[Segment]
    bounds: tuple[int, ...]
    tokens: int
    context: Context

    # -- which examples and rows are whose ---------------------------------------------------

    def examples(self, segment: Segment) -> slice:
        """Return the examples of a segment."""
        return slice(self.bounds[segment.slots[0]], self.bounds[segment.slots[1]])

    def rows(self, segment: Segment, start: int, stop: int) -> slice:
        """Return the rows (examples x tokens) of some slots within their segment's."""
        first = self.bounds[segment.slots[0]]
        ends = (self.bounds[start] - first, self.bounds[stop] - first)
        return slice(ends[0] * self.tokens, ends[1] * self.tokens)

    def with_examples(
        self, segment: Segment, head_groups: Sequence[HeadGroup]
    ) -> Iterator[tuple[HeadGroup, slice]]:
        """Yield the head groups that have examples, with their rows within the segment's."""
        for head_group in head_groups:
            rows = self.rows(segment, *head_group.slots)
            if rows.start < rows.stop:
                yield head_group, rows

    def context_of(self, head_group: HeadGroup) -> Context:
        """Return the context of a head group's examples."""
        if not self.context:
            return self.context
        first, stop = (self.bounds[slot] for slot in head_group.slots)
        return {
            name: tensor if len(tensor) == 1 else tensor[first:stop]
            for name, tensor in self.context.items()
        }

    def fresh(self, head_group: HeadGroup, done: set[int]) -> tuple[list[int], bool]:
        """Return slots of a head group that are not ``done`` yet, and whether that is all.

        They are done afterwards.
        """
        slots = range(*head_group.slots)
        new = [slot for slot in slots if slot not in done]
        done.update(slots)
        return new, len(new) == len(slots)

    # -- parts of a segment's work, in both directions ----------------------------------------

    def leaves(
        self, shared: Mapping[str, Tensor], wanted: Mapping[str, bool], segment: Segment
    ) -> dict[str, Tensor]:
        """Return leaves that stand for shared parameters, and want gradients where they train."""
        trains = segment.status is Status.TRAINS
        return {
            role: t.detach().requires_grad_(trains and wanted[role]) for role, t in shared.items()
        }

    def norm(
        self, x: Tensor, shared: Mapping[str, Tensor], graph: bool
    ) -> tuple[Graph | None, Tensor]:
        """Return the norm's graph, if asked for, and y [rows, dim] in the type of products."""
        with torch.set_grad_enabled(graph):
            y = self.branch.normed(x, shared)
        leaves = [x, *(shared[role] for role in self.branch.spec.norm_roles if role in shared)]
        flat = self.branch.numerics.cast(y.detach()).flatten(0, 1)
        return (Graph(leaves, y) if graph else None), flat

    def deep(self, segment: Segment, full: bool) -> bool:
        """Whether gradient is wanted in the middle of a live head group."""
        return segment.through or (full and self.branch.trains.inward)

    def middle(
        self,
        head_group: HeadGroup,
        y: Tensor,
        shared: Mapping[str, Tensor],
        live: bool,
        graph: bool,
    ) -> tuple[Graph | None, SavedActivations, Tensor]:
        """Run a head group up to its product out.

        Args:
            head_group: The heads.
            y: What goes in, [rows, dim].
            shared: Shared parameters of the block.
            live: Whether it is run to be trained.
            graph: Whether gradient goes through its middle.

        Returns:
            Its middle's graph, what to keep of its products in, and z [rows, depth].
        """
        branch = self.branch
        hs, saved = head_group.inward.forward(y, shared, branch.numerics, live and branch.training)
        with torch.set_grad_enabled(graph):
            leaves = [h.requires_grad_(graph) for h in hs]
            z = branch.middle(leaves, self.tokens, shared, self.context_of(head_group))
        return (Graph(hs, z) if graph else None), saved, z.detach()

    def to_keep(
        self,
        head_group: HeadGroup,
        z: Tensor,
        inward: SavedActivations,
        outward: SavedActivations,
    ) -> SavedActivations:
        """Return what is kept of a live head group, out of what its products in and out gave."""
        if not head_group.full:
            return NOTHING_SAVED
        plain = self.branch.trains.z and outward.z_dropped is None
        return outward._replace(
            z=z if plain else None, u=inward.u, y_dropped=inward.y_dropped, y_mask=inward.y_mask
        )

    def scaled(self, total: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Return the sum with its layer scale; what stands for an idle block has its own in it."""
        scale = shared.get(self.branch.spec.scale)
        out = total if scale is None else total * scale
        for segment in self.present:
            if segment.status is Status.IDLE:
                for slot in range(*segment.slots):
                    if (offset := self.branch.offsets[slot]) is not None:
                        out[self.bounds[slot] : self.bounds[slot + 1]] = offset
        return out
