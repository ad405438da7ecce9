"""The sum of a branch, forward and back: the engine's arithmetic.

Each piece of a branch (see :mod:`d2ft_fl.engine.head_group`) is one narrower product in, one
non-linear middle (attention, or the activation) and one narrower product out. The whole branch is
one node of autograd's graph. Its norm and middles are graphs of their own, so that any norm,
attention and activation is differentiated by torch; its products are written out, so that they
save, compute and add up exactly what the schedule asks for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.head_group import HeadGroup, SavedActivations
from d2ft_fl.engine.model_adapter import Context
from d2ft_fl.engine.segments import Segment

if TYPE_CHECKING:
    from d2ft_fl.engine.branch import Branch


class _Graph:
    """A piece of graph of its own: its leaves, and the edge that it ends in."""

    def __init__(self, leaves: Sequence[Tensor], result: Tensor):
        self.leaves = [leaf for leaf in leaves if leaf.requires_grad]
        self.edge = get_gradient_edge(result) if result.requires_grad else None
        self.dtype = result.dtype


def _gradients(
    graphs: Sequence[_Graph], grads: Sequence[Tensor], shared: Sequence[Tensor] = ()
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Gradients of the leaves of each graph, and of leaves that they share, in one go.

    The graphs are gone afterwards.
    """
    edges = [graph.edge for graph in graphs if graph.edge is not None]
    leaves = [leaf for graph in graphs for leaf in graph.leaves]
    if not leaves and not shared:
        return [[] for _ in graphs], []
    values = [grad.to(graph.dtype) for graph, grad in zip(graphs, grads, strict=True)]
    found = iter(torch.autograd.grad(edges, [*leaves, *shared], values))
    return [[next(found) for _ in graph.leaves] for graph in graphs], list(found)


@dataclass
class _Kept:
    """What a live segment keeps for its backward pass.

    Attributes:
        own: The leaves that stand for shared parameters in its graphs.
        norm: The graph of its norm, x to y. y: [rows, dim], where weights need it.
        state: Of the generator that dropout draws from, to draw the same again.
        middles: A graph a live piece, where gradient goes through it.
        taken: Of each live piece, what the gradients of its weights need.
    """

    own: dict[str, Tensor]
    norm: _Graph | None
    y: Tensor | None
    state: Tensor | None = None
    middles: list[_Graph | None] = field(default_factory=list)
    saved: list[SavedActivations] = field(default_factory=list)

    def take(self, index: int) -> tuple[_Graph | None, SavedActivations]:
        """What is kept of one live piece, and then no longer is."""
        if not self.middles:
            return None, SavedActivations()
        found = self.middles[index], self.saved[index]
        self.middles[index], self.saved[index] = None, SavedActivations()
        return found

    def release(self) -> list[Tensor | None]:
        """The big tensors, which are then no longer here; see :meth:`restore`."""
        own = [self.y, *(t for saved in self.saved for t in saved)]
        self.y, self.saved = None, [SavedActivations()] * len(self.saved)
        return own

    def restore(self, tensors: Iterator[Tensor | None]) -> None:
        """Put back what :meth:`release` gave."""
        self.y = next(tensors)
        self.saved = [
            SavedActivations(*(next(tensors) for _ in SavedActivations._fields)) for _ in self.saved
        ]


@dataclass(frozen=True)
class Pass:
    """One pass of examples on its way through a branch: what both directions share.

    Attributes:
        branch: The branch. present: Segments that have examples.
        bounds: See :class:`d2ft_fl.engine.branch.Branch`. tokens: Of an example.
    """

    branch: "Branch"
    present: list[Segment]
    bounds: tuple[int, ...]
    tokens: int
    context: Context

    def examples(self, segment: Segment) -> slice:
        """The examples of a segment."""
        return slice(self.bounds[segment.slots[0]], self.bounds[segment.slots[1]])

    def context_of(self, head_group: HeadGroup) -> Context:
        """The context of the examples of a head group."""
        if not self.context:
            return self.context
        first, stop = (self.bounds[slot] for slot in head_group.slots)
        return {
            name: tensor if len(tensor) == 1 else tensor[first:stop]
            for name, tensor in self.context.items()
        }

    def span(self, segment: Segment, start: int, stop: int) -> slice:
        """The rows (examples x tokens) of some slots within their segment's."""
        first = self.bounds[segment.slots[0]]
        ends = (self.bounds[start] - first, self.bounds[stop] - first)
        return slice(ends[0] * self.tokens, ends[1] * self.tokens)

    def work(
        self, segment: Segment, head_groups: Sequence[HeadGroup]
    ) -> Iterator[tuple[HeadGroup, slice]]:
        """The pieces that have examples, with their rows."""
        for head_group in head_groups:
            rows = self.span(segment, *head_group.slots)
            if rows.start < rows.stop:
                yield head_group, rows

    def leaves(
        self, shared: Mapping[str, Tensor], wanted: Mapping[str, bool], segment: Segment
    ) -> dict[str, Tensor]:
        """Leaves that stand for shared parameters; they want gradients where something trains."""
        trains = segment.status is Status.TRAINS
        return {
            role: t.detach().requires_grad_(trains and wanted[role]) for role, t in shared.items()
        }

    def norm(
        self, x: Tensor, own: Mapping[str, Tensor], graph: bool
    ) -> tuple[_Graph | None, Tensor]:
        """The norm's graph, if asked for, and y [rows, dim] in the type of products."""
        with torch.set_grad_enabled(graph):
            y = self.branch.normed(x, own)
        leaves = [x, *(own[role] for role in self.branch.spec.norm_roles if role in own)]
        flat = self.branch.numerics.cast(y.detach()).flatten(0, 1)
        return (_Graph(leaves, y) if graph else None), flat

    def deep(self, segment: Segment, full: bool) -> bool:
        """Whether gradient is wanted in the middle of a live piece."""
        return segment.through or (full and self.branch.trains.inward)

    def middle(
        self, head_group: HeadGroup, y: Tensor, own: Mapping[str, Tensor], live: bool, graph: bool
    ) -> tuple[_Graph | None, SavedActivations, Tensor]:
        """A piece up to its product out: its middle's graph, what to keep, and z [rows, depth].

        Args:
            live: Whether it is run to be trained. graph: Whether gradient goes through its middle.
        """
        branch = self.branch
        hs, saved = head_group.products_in(y, own, branch.numerics, live and branch.training)
        with torch.set_grad_enabled(graph):
            leaves = [h.requires_grad_(graph) for h in hs]
            z = branch.middle(leaves, self.tokens, own, self.context_of(head_group))
        return (_Graph(hs, z) if graph else None), saved, z.detach()

    def forward(
        self, x: Tensor, shared: Mapping[str, Tensor], wanted: Mapping[str, bool] | None
    ) -> tuple[Tensor, list[_Kept]]:
        """The sum [examples, tokens, dim], before its scale; what live segments keep.

        Args:
            wanted: role -> whether its gradient is wanted, the input's under ``x``; None for a
                pass without any graph.
        """
        branch, numerics = self.branch, self.branch.numerics
        total = x.new_empty(x.shape, dtype=numerics.dtype if numerics.mixed else x.dtype)
        kept = []
        for segment in self.present:
            examples = self.examples(segment)
            if segment.status is Status.IDLE:
                total[examples].zero_()
                continue
            live, graph = bool(segment.alive), wanted is not None and not numerics.recompute
            own = self.leaves(shared, wanted, segment) if wanted else dict(shared)
            part = x[examples].detach()
            if wanted and segment.through:
                part.requires_grad_(wanted["x"])
            norm, y = self.norm(part, own, graph and segment.through)
            into = total[examples].flatten(0, 1)
            keeps_y = graph and segment.status is Status.TRAINS and branch.keeps_y
            keep = _Kept(own, norm, y if keeps_y else None)
            if live and numerics.recompute and branch.training and branch.random:
                keep.state = _generator_state(x.device)
            summed: set[int] = set()
            for head_group, rows in self.work(segment, [*segment.alive, *segment.silent]):
                live_group = wanted is not None and head_group in segment.alive
                alive = graph and live_group
                through = alive and self.deep(segment, head_group.full)
                middle, saved, z = self.middle(
                    head_group, y[rows], own if alive else shared, live_group, through
                )
                if branch.tally is not None:
                    branch.tally(head_group, z.view(-1, self.tokens, head_group.depth))
                start = self._start(head_group, summed, shared, total, into[rows])
                drop = live_group and branch.training
                more = head_group.product_out(z, into[rows], shared, numerics, start, drop)
                if alive:
                    keep.middles.append(middle)
                    keep.saved.append(self._kept(head_group, z, saved, more))
                del middle, saved, more, z
            if live and wanted:
                kept.append(keep)
        return total, kept

    def fresh(self, head_group: HeadGroup, done: set[int]) -> tuple[list[int], bool]:
        """Slots of a piece that are not ``done`` yet, and whether that is all; they are now."""
        slots = range(*head_group.slots)
        found = [slot for slot in slots if slot not in done]
        done.update(slots)
        return found, len(found) == len(slots)

    def _start(
        self,
        head_group: HeadGroup,
        summed: set[int],
        shared: Mapping[str, Tensor],
        total: Tensor,
        own: Tensor,
    ) -> Tensor | None:
        """What a piece's product out adds to; see ``HeadGroup.product_out``.

        The first piece of a slot finds nothing: a bias alone goes into its product; else its rows
        start with what is there anyway, the bias and what skipped heads add on average.

        Args:
            summed: Slots whose sum has begun.
            total: The sum [examples, tokens, dim]. own: The piece's rows of it.
        """
        bias, offsets = shared.get(self.branch.spec.bias), self.branch.offsets
        slots, first = self.fresh(head_group, summed)
        if first and not any(offsets[slot] is not None for slot in slots):
            return None if bias is None else self.branch.numerics.cast(bias)
        for slot in slots:
            part = total[self.bounds[slot] : self.bounds[slot + 1]]
            terms = [t for t in (bias, offsets[slot]) if t is not None]
            if terms:
                part.copy_(terms[0] if len(terms) == 1 else terms[0] + terms[1])
            else:
                part.zero_()
        return own

    def scaled(self, total: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """The sum with its layer scale; what stands for a block without work has its own in it."""
        scale = shared.get(self.branch.spec.scale)
        out = total if scale is None else total * scale
        for segment in self.present:
            if segment.status is Status.IDLE:
                for slot in range(*segment.slots):
                    if (offset := self.branch.offsets[slot]) is not None:
                        out[self.bounds[slot] : self.bounds[slot + 1]] = offset
        return out

    def backward(
        self, segment: Segment, kept: _Kept, g: Tensor, x: Tensor | None, grads: "_Gradients"
    ) -> Tensor | None:
        """From the gradient of a live segment's sum, ``g`` [rows, dim], to that of its x.

        Weights' gradients go where they add up, those of shared parameters into ``grads``.

        Args:
            x: The segment's input, when everything is to be computed again.
        """
        branch, numerics = self.branch, self.branch.numerics
        norm, y, own = kept.norm, kept.y, kept.own
        kept.norm = kept.y = None  # the graph's node outlives its backward pass
        if x is not None:
            leaf = x.detach().requires_grad_(segment.through and grads.wanted["x"])
            norm, y = self.norm(leaf, own, graph=segment.through)
        common = [r for r in branch.spec.middle if r in own and own[r].requires_grad]
        head_groups = list(enumerate(self.work(segment, segment.alive)))
        dy, done = (g.new_empty(g.shape) if segment.through else None), set[int]()
        for full in (True, False):  # all pieces of an operation together
            group = [
                (i, head_group, rows)
                for i, (head_group, rows) in head_groups
                if head_group.full is full
            ]
            deep = self.deep(segment, full)
            graphs, dzs, all_saved = [], [], []
            for index, head_group, rows in group:
                graph, saved = kept.take(index)
                if x is not None:
                    assert y is not None
                    graph, saved = self._again(head_group, y[rows], own, deep)
                error = head_group.error_out(g[rows], own, numerics, deep)
                if full:
                    head_group.gradients_out(saved, g[rows], error, grads.add, branch.observer)
                if deep:
                    assert graph is not None
                    graphs.append(graph)
                    dzs.append(head_group.through_out(g[rows], error, saved.z_mask, numerics))
                all_saved.append(saved._replace(z=None, v=None, z_dropped=None, z_mask=None))
                graph, saved, error = None, SavedActivations(), None
            if not deep:
                continue
            inwards, values = _gradients(graphs, dzs, [own[r] for r in common] if group else ())
            graphs, dzs = [], []
            for role, value in zip(common, values, strict=bool(group)):
                grads.add(role, value)
            for (_, head_group, rows), saved, inward in zip(group, all_saved, inwards, strict=True):
                error = head_group.errors_in(inward, numerics, segment.through)
                if full:
                    part = None if y is None else y[rows]
                    head_group.gradients_in(saved, part, inward, error, grads.add, branch.observer)
                if dy is not None:
                    slots, first = self.fresh(head_group, done)
                    for slot in () if first else slots:
                        dy[self.span(segment, slot, slot + 1)] = 0
                    mask = saved.y_mask
                    head_group.through_in(
                        inward, error, mask, dy[rows], own, numerics, add=not first
                    )
            inwards, inward, all_saved, saved, error, part = (
                [],
                [],
                [],
                SavedActivations(),
                None,
                None,
            )
        if dy is None:
            return None
        assert norm is not None
        wanted = [r for r in branch.spec.norm_roles if r in own and own[r].requires_grad]
        y = None
        (found,), _ = _gradients([norm], [dy.view(-1, self.tokens, dy.shape[1])])
        dx = found.pop(0) if grads.wanted["x"] else None
        for role, value in zip(wanted, found, strict=True):
            grads.add(role, value)
        return dx

    def _kept(
        self, head_group: HeadGroup, z: Tensor, first: SavedActivations, second: SavedActivations
    ) -> SavedActivations:
        """What is kept of a live piece, out of what its products in and out gave."""
        if not head_group.full:
            return SavedActivations()
        plain = self.branch.trains.z and second.z_dropped is None
        return second._replace(
            z=z if plain else None, u=first.u, y_dropped=first.y_dropped, y_mask=first.y_mask
        )

    def _again(
        self, head_group: HeadGroup, y: Tensor, own: Mapping[str, Tensor], deep: bool
    ) -> tuple[_Graph | None, SavedActivations]:
        """A live piece computed once more, as far as its gradients need it."""
        numerics, training = self.branch.numerics, self.branch.training
        graph, first, z = self.middle(head_group, y, own, True, deep)
        lora, second = head_group.outward.lora, SavedActivations()
        drops = training and lora is not None and bool(lora.dropout)
        if head_group.full and lora is not None and (lora.far_trains or drops):
            second = head_group.mixed_out(z, numerics, training)
        return graph, self._kept(head_group, z, first, second)


@dataclass
class _Gradients:
    """Gradients of a branch's input and shared parameters, as they add up over segments."""

    wanted: Mapping[str, bool]
    found: dict[str, Tensor] = field(default_factory=dict)

    def add(self, role: str, value: Tensor) -> None:
        """Add a gradient of one role; of a factor in common, of as much as heads at hand train."""
        if role not in self.found:
            self.found[role] = value
            return
        old = self.found[role]
        if old.shape == value.shape:
            self.found[role] = old + value
            return
        whole = old if old.numel() > value.numel() else value
        narrow = value if whole is old else old
        whole[tuple(slice(n) for n in narrow.shape)] += narrow
        self.found[role] = whole

    def of(self, role: str, like: Tensor | None) -> Tensor | None:
        """A gradient as wide as its tensor."""
        found = self.found.get(role)
        if found is None or like is None or found.shape == like.shape:
            return found
        wide = found.new_zeros(like.shape)
        wide[tuple(slice(n) for n in found.shape)] = found
        return wide


class Sum(torch.autograd.Function):
    """What a branch adds, as one node of the graph.

    Saved: x and the norm's statistics; y = norm(x) where something runs FULL; for a FULL or FROZEN
    piece what its middle saves, and for a FULL one z besides, where the middle has not saved it
    anyway; the sum, where a layer scale trains. With ``recompute`` x only (and the sum).

    ``anchor`` wants a gradient, which it never gets: what trains may be sliced parameters alone,
    whose gradients are written where they belong, and autograd is to come by all the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        work: Pass,
        roles: tuple[str, ...],
        anchor: Tensor,
        x: Tensor,
        *values: Tensor,
    ) -> Tensor:
        """The sum of what the pieces add, scaled."""
        branch = work.branch
        shared = dict(zip(roles, values, strict=True))
        wanted = dict(zip(("x", *roles), ctx.needs_input_grad[3:], strict=True))
        total, ctx.kept = work.forward(x, shared, wanted)
        ctx.work, ctx.roles, ctx.wanted = work, roles, wanted
        scale = shared.get(branch.spec.scale)
        keep_total = scale is not None and wanted[branch.spec.scale]
        # Big tensors go through autograd's own store, where hooks see them.
        own = [t for kept in ctx.kept for t in kept.release()]
        ctx.save_for_backward(
            x if branch.numerics.recompute else None, total if keep_total else None, *values, *own
        )
        return work.scaled(total, shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of shared parameters; those of slices go where they belong."""
        work, roles, wanted = ctx.work, ctx.roles, ctx.wanted
        branch = work.branch
        x, total, *rest = ctx.saved_tensors
        shared = dict(zip(roles, rest[: len(roles)], strict=True))
        own = iter(rest[len(roles) :])
        grads, inputs = _Gradients(wanted), list[tuple[slice, Tensor]]()
        scale = shared.get(branch.spec.scale)
        scaled = grad if scale is None else grad * scale
        live = [s for s in work.present if s.alive]
        for segment, kept in zip(live, ctx.kept, strict=True):
            part = work.examples(segment)
            kept.restore(own)
            if segment.status is Status.TRAINS:
                if total is not None:
                    product = grad[part] * total[part]
                    grads.add(branch.spec.scale, product.flatten(0, 1).sum(0))
                    del product
                if wanted.get(branch.spec.bias):
                    grads.add(branch.spec.bias, scaled[part].flatten(0, 1).sum(0))
            g = branch.numerics.cast(scaled[part]).flatten(0, 1)
            with _generator(grad.device, kept.state):
                dx = work.backward(segment, kept, g, None if x is None else x[part], grads)
            if dx is not None:
                inputs.append((part, dx))
        if inputs:
            grads.found["x"] = _assembled(inputs, grad)
        values = (grads.of(role, shared[role]) for role in roles)
        return None, None, None, grads.found.get("x"), *values


def _assembled(parts: list[tuple[slice, Tensor]], like: Tensor) -> Tensor:
    """Gradients of some examples as the gradient of all: zero for the others."""
    if len(parts) == 1 and len(parts[0][1]) == len(like):
        return parts[0][1]
    whole = like.new_zeros(like.shape, dtype=parts[0][1].dtype)
    for examples, part in parts:
        whole[examples] = part
    return whole


def _generator_state(device: torch.device) -> Tensor:
    """The state of the generator that dropout on ``device`` draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _generator(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Draw again what was drawn from ``state`` on, and leave the generator as it is."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
