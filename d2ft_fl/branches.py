"""A residual branch of a block, run for some of its heads: the engine's arithmetic.

A branch (attention or feed-forward) is

    x <- x + drop(scale * (bias + sum_h mid(norm(x) W_in[h]) W_out[h]))

Each piece of it (see :mod:`d2ft_fl.pieces`) is one narrower product in, one non-linear middle
(attention, or the activation) and one narrower product out. By operation:

    FULL          gradient to its weights and through it
    FROZEN        gradient through it; its weights get none
    FORWARD_ONLY  runs outside the graph

and a SHORTCUT is not there at all, but for its mean contribution where compensation is on. The
whole branch is one node of autograd's graph. Its norm and middles are graphs of their own, so that
any norm, attention and activation is differentiated by torch; its products are written out, so
that they save, compute and add up exactly what the schedule asks for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from d2ft_fl.grouping import Status
from d2ft_fl.pieces import Numerics, Observer, PackedHeads, Piece, Segment

Norm = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
# (training; products in, one a role; shared parameters) -> what the product out takes
Middle = Callable[[bool, Sequence[Tensor], Mapping[str, Tensor]], Tensor]
# Told a piece and its z [examples, tokens, depth] as it runs; see `compensation`.
Tally = Callable[[Piece, Tensor], None]


@dataclass(frozen=True)
class BranchTraits:
    """What one branch of a block computes with, beside its weights.

    Attributes:
        inward: Roles of its products in, without ``.weight``: ``("qkv",)``, ``("fc1",)`` ...
        outward: Role of its product out.
        norm_role: Role of the norm before it.
        middle_roles: Shared parameters of the middle, for example of q/k norms.
        scale_role: Role of its layer scale, present or not.
        norm: The norm, as a function of its parameters (roles ``weight`` and ``bias``).
        middle: What lies between the products, in training (dropout is drawn) or not.
        random: Whether the middle draws random numbers when training.
        output_dropout, drop_path: Probabilities, on the sum of all heads.
    """

    inward: tuple[str, ...]
    outward: str
    norm_role: str
    middle_roles: tuple[str, ...]
    scale_role: str
    norm: Norm
    middle: Middle
    random: bool = False
    output_dropout: float = 0.0
    drop_path: float = 0.0


@dataclass
class Branch:
    """One branch of one block, as far as a client holds it.

    Attributes:
        store: The block's slices.
        shared: role -> shared parameters of the block.
        segments: What its slots do.
        numerics: How arithmetic is done.
        offsets: Per slot, the compensation of what is skipped, [tokens, dim] or None; scaled and
            biased like the sum it is part of, or as it is where nothing runs.
        training: Whether dropout and stochastic depth are drawn.
        observer: See :data:`Observer`. tally: See :data:`Tally`.
    """

    traits: BranchTraits
    store: PackedHeads
    shared: Mapping[str, Tensor]
    segments: list[Segment]
    numerics: Numerics
    offsets: Sequence[Tensor | None]
    training: bool = False
    observer: Observer | None = None
    tally: Tally | None = None

    def __call__(self, x: Tensor, bounds: Sequence[int]) -> Tensor:
        """x [examples, tokens, dim] plus what the branch adds.

        Slot s has the examples ``bounds[s]`` to before ``bounds[s + 1]``.
        """
        present = [s for s in self.segments if bounds[s.slots[0]] < bounds[s.slots[1]]]
        if all(s.status is Status.IDLE for s in present) and not any(
            o is not None and bounds[slot] < bounds[slot + 1] for slot, o in enumerate(self.offsets)
        ):
            return x
        work = _Pass(self, present, tuple(bounds), x.shape[1])
        if torch.is_grad_enabled() and any(s.alive for s in present):
            roles = tuple(role for role in self._roles if role in self.shared)
            out = _Sum.apply(work, roles, x, *(self.shared[role] for role in roles))
        else:
            with torch.no_grad():
                out = work.scaled(work.forward(x.detach(), self.shared, None)[0], self.shared)
        if self.training and self.traits.output_dropout:
            out = F.dropout(out, self.traits.output_dropout)
        if self.training and self.traits.drop_path:
            out = drop_path(out, self.traits.drop_path, training=True)
        return x + out

    @property
    def _roles(self) -> tuple[str, ...]:
        """Every shared role that the branch may have, in a fixed order."""
        own = (*self.norm_roles, self.bias_role, self.traits.scale_role)
        return (*own, *self.traits.middle_roles)

    @property
    def bias_role(self) -> str:
        """Role of the bias of the product out."""
        return f"{self.traits.outward}.bias"

    @property
    def norm_roles(self) -> tuple[str, str]:
        """Roles of the norm's parameters."""
        return f"{self.traits.norm_role}.weight", f"{self.traits.norm_role}.bias"

    def normed(self, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """The norm of x [examples, tokens, dim]."""
        named = zip(("weight", "bias"), self.norm_roles, strict=True)
        return self.traits.norm(x, {key: shared[role] for key, role in named if role in shared})

    def middle(self, hs: Sequence[Tensor], tokens: int, shared: Mapping[str, Tensor]) -> Tensor:
        """What lies between the products: [rows, width] each -> [rows, depth]."""
        split = [h.view(len(h) // tokens, tokens, h.shape[1]) for h in hs]
        training, middle = self.training, self.traits.middle
        if not self.numerics.mixed:
            return middle(training, split, shared).flatten(0, 1)
        with torch.autocast(hs[0].device.type, self.numerics.dtype):
            return middle(training, split, shared).flatten(0, 1)

    def settle(self, overwrite: bool) -> list[Tensor]:
        """Decide which pieces replace the gradients that they find, and which add to them.

        Args:
            overwrite: Whether one pass makes a step's gradients; otherwise all add up.

        Returns:
            Gradients that must be zeroed before a step.
        """
        full = [p for s in self.segments for p in s.alive if p.full]
        touched: set[int] = set()
        first: set[int] = set()  # heads whose first gradient is added to what is there
        for piece in full:
            piece.overwrites = overwrite and touched.isdisjoint(piece.heads)
            if not piece.overwrites:
                first.update(set(piece.heads) - touched)
            touched.update(piece.heads)
        roles = [
            *(f"{role}.weight" for role in self.traits.inward),
            f"{self.traits.outward}.weight",
        ]
        roles += [f"{role}.bias" for role in self.traits.inward]
        return [
            self.store.grads[role][run.rows]
            for role in roles
            if first and role in self.store.grads
            for run in self.store.runs(role, first)
        ]


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
        middles: A graph a live piece. zs: [rows, depth] each, of FULL pieces.
    """

    own: dict[str, Tensor]
    norm: _Graph | None
    y: Tensor | None
    state: Tensor | None = None
    middles: list[_Graph | None] = field(default_factory=list)
    zs: list[Tensor | None] = field(default_factory=list)

    def take(self, index: int) -> tuple[_Graph | None, Tensor | None]:
        """The graph and z of one live piece, which are then no longer kept."""
        if not self.middles:
            return None, None
        found = self.middles[index], self.zs[index]
        self.middles[index] = self.zs[index] = None
        return found


@dataclass(frozen=True)
class _Pass:
    """One pass of examples on its way through a branch: what both directions share.

    Attributes:
        branch: The branch. present: Segments that have examples.
        bounds: See :class:`Branch`. tokens: Of an example.
    """

    branch: Branch
    present: list[Segment]
    bounds: tuple[int, ...]
    tokens: int

    def examples(self, segment: Segment) -> slice:
        """The examples of a segment."""
        return slice(self.bounds[segment.slots[0]], self.bounds[segment.slots[1]])

    def span(self, segment: Segment, start: int, stop: int) -> slice:
        """The rows (examples x tokens) of some slots within their segment's."""
        first = self.bounds[segment.slots[0]]
        ends = (self.bounds[start] - first, self.bounds[stop] - first)
        return slice(ends[0] * self.tokens, ends[1] * self.tokens)

    def work(self, segment: Segment, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, slice]]:
        """The pieces that have examples, with their rows."""
        for piece in pieces:
            rows = self.span(segment, *piece.slots)
            if rows.start < rows.stop:
                yield piece, rows

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
        leaves = [x, *(own[role] for role in self.branch.norm_roles if role in own)]
        flat = self.branch.numerics.cast(y.detach()).flatten(0, 1)
        return (_Graph(leaves, y) if graph else None), flat

    def middle(
        self, piece: Piece, y: Tensor, own: Mapping[str, Tensor], graph: bool
    ) -> tuple[_Graph | None, Tensor]:
        """A piece up to its product out: its middle's graph, if asked for, and z [rows, depth]."""
        branch = self.branch
        hs = piece.products_in(y, branch.numerics)
        with torch.set_grad_enabled(graph):
            z = branch.middle([h.requires_grad_(graph) for h in hs], self.tokens, own)
        return (_Graph(hs, z) if graph else None), z.detach()

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
            if wanted:
                part.requires_grad_(wanted["x"])
            norm, y = self.norm(part, own, graph and live)
            into = total[examples].flatten(0, 1)
            keep = _Kept(own, norm, y if graph and segment.status is Status.TRAINS else None)
            if live and numerics.recompute and branch.training and branch.traits.random:
                keep.state = _generator_state(x.device)
            summed: set[int] = set()
            for piece, rows in self.work(segment, [*segment.alive, *segment.silent]):
                alive = graph and piece in segment.alive
                middle, z = self.middle(piece, y[rows], own if alive else shared, alive)
                if branch.tally is not None:
                    branch.tally(piece, z.view(-1, self.tokens, piece.depth))
                if alive:
                    keep.middles.append(middle)
                    keep.zs.append(z if piece.full else None)
                start = self._start(piece, summed, shared, total, into[rows])
                piece.product_out(z, into[rows], numerics, start)
                del middle, z
            if live and wanted:
                kept.append(keep)
        return total, kept

    def fresh(self, piece: Piece, done: set[int]) -> tuple[list[int], bool]:
        """Slots of a piece that are not ``done`` yet, and whether that is all; they are now."""
        slots = range(*piece.slots)
        found = [slot for slot in slots if slot not in done]
        done.update(slots)
        return found, len(found) == len(slots)

    def _start(
        self,
        piece: Piece,
        summed: set[int],
        shared: Mapping[str, Tensor],
        total: Tensor,
        own: Tensor,
    ) -> Tensor | None:
        """What a piece's product out adds to; see ``Piece.product_out``.

        The first piece of a slot finds nothing: a bias alone goes into its product; else its rows
        start with what is there anyway, the bias and what skipped heads add on average.

        Args:
            summed: Slots whose sum has begun.
            total: The sum [examples, tokens, dim]. own: The piece's rows of it.
        """
        bias, offsets = shared.get(self.branch.bias_role), self.branch.offsets
        slots, first = self.fresh(piece, summed)
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
        scale = shared.get(self.branch.traits.scale_role)
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
            leaf = x.detach().requires_grad_(grads.wanted["x"])
            norm, y = self.norm(leaf, own, graph=True)
        assert norm is not None
        common = [r for r in branch.traits.middle_roles if r in own and own[r].requires_grad]
        pieces = list(enumerate(self.work(segment, segment.alive)))
        dy, done = g.new_empty(g.shape), set[int]()
        for full in (True, False):  # all pieces of an operation together
            group = [(i, piece, rows) for i, (piece, rows) in pieces if piece.full is full]
            graphs, dzs = [], []
            for index, piece, rows in group:
                graph, z = kept.take(index)
                if x is not None:
                    assert y is not None
                    graph, z = self.middle(piece, y[rows], own, graph=True)
                assert graph is not None
                if full:
                    assert z is not None
                    piece.gradients_out(z, g[rows], branch.observer)
                graphs.append(graph)
                dzs.append(piece.through_out(g[rows], numerics))
                graph = z = None
            inwards, values = _gradients(graphs, dzs, [own[r] for r in common] if group else ())
            graphs, dzs = [], []
            for role, value in zip(common, values, strict=bool(group)):
                grads.add(role, value)
            for (_, piece, rows), inward in zip(group, inwards, strict=True):
                if full:
                    assert y is not None
                    piece.gradients_in(y[rows], inward, branch.observer)
                if norm.leaves:
                    slots, first = self.fresh(piece, done)
                    for slot in () if first else slots:
                        dy[self.span(segment, slot, slot + 1)] = 0
                    piece.through_in(inward, dy[rows], numerics, add=not first)
            inwards, inward = [], []
        wanted = [r for r in branch.norm_roles if r in own and own[r].requires_grad]
        y = None
        (found,), _ = _gradients([norm], [dy.view(-1, self.tokens, dy.shape[1])])
        dx = found.pop(0) if grads.wanted["x"] else None
        for role, value in zip(wanted, found, strict=True):
            grads.add(role, value)
        return dx


@dataclass
class _Gradients:
    """Gradients of a branch's input and shared parameters, as they add up over segments."""

    wanted: Mapping[str, bool]
    found: dict[str, Tensor] = field(default_factory=dict)

    def add(self, role: str, value: Tensor) -> None:
        """Add a gradient of one role."""
        self.found[role] = self.found[role] + value if role in self.found else value


class _Sum(torch.autograd.Function):
    """What a branch adds, as one node of the graph.

    Saved: x and the norm's statistics; y = norm(x) where something runs FULL; for a FULL or FROZEN
    piece what its middle saves, and for a FULL one z besides, where the middle has not saved it
    anyway; the sum, where a layer scale trains. With ``recompute`` x only (and the sum).
    """

    @staticmethod
    def forward(
        ctx: Any, work: _Pass, roles: tuple[str, ...], x: Tensor, *values: Tensor
    ) -> Tensor:
        branch = work.branch
        shared = dict(zip(roles, values, strict=True))
        wanted = dict(zip(("x", *roles), ctx.needs_input_grad[2:], strict=True))
        total, ctx.kept = work.forward(x, shared, wanted)
        ctx.work, ctx.roles, ctx.wanted = work, roles, wanted
        scale = shared.get(branch.traits.scale_role)
        keep_total = scale is not None and wanted[branch.traits.scale_role]
        # Big tensors go through autograd's own store, where hooks see them.
        own = [t for kept in ctx.kept for t in (kept.y, *kept.zs)]
        for kept in ctx.kept:
            kept.y, kept.zs = None, [None] * len(kept.zs)
        ctx.save_for_backward(
            x if branch.numerics.recompute else None, total if keep_total else None, *values, *own
        )
        return work.scaled(total, shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work, roles, wanted = ctx.work, ctx.roles, ctx.wanted
        branch = work.branch
        x, total, *rest = ctx.saved_tensors
        shared = dict(zip(roles, rest[: len(roles)], strict=True))
        own = iter(rest[len(roles) :])
        grads, inputs = _Gradients(wanted), list[tuple[slice, Tensor]]()
        scale = shared.get(branch.traits.scale_role)
        scaled = grad if scale is None else grad * scale
        live = [s for s in work.present if s.alive]
        for segment, kept in zip(live, ctx.kept, strict=True):
            part = work.examples(segment)
            kept.y, kept.zs = next(own), [next(own) for _ in kept.zs]
            if segment.status is Status.TRAINS:
                if total is not None:
                    product = grad[part] * total[part]
                    grads.add(branch.traits.scale_role, product.flatten(0, 1).sum(0))
                    del product
                if wanted.get(branch.bias_role):
                    grads.add(branch.bias_role, scaled[part].flatten(0, 1).sum(0))
            g = branch.numerics.cast(scaled[part]).flatten(0, 1)
            with _generator(grad.device, kept.state):
                dx = work.backward(segment, kept, g, None if x is None else x[part], grads)
            if dx is not None:
                inputs.append((part, dx))
        if wanted["x"]:
            grads.found["x"] = _assembled(inputs, grad)
        return None, None, *(grads.found.get(role) for role in ("x", *roles))


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
