"""The backward pass of a branch's sum: segment by segment, in named steps.

From the gradient g of a segment's sum [rows, dim], for all FULL head groups and then all FROZEN
ones: back through their products out, their middles, and their products in, to the gradient dy of
the norm; then through the norm to the gradient of x. Gradients of head groups' weights go where
they add up, those of shared parameters into :class:`SharedGradients`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from d2ft_fl.engine.branch_run import BranchRun, Graph, SegmentState, gradients
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.saved_activations import NOTHING_SAVED, SavedActivations
from d2ft_fl.engine.segments import Segment

# A live head group: its place among those that have examples, and its rows of the segment's.
Placed = tuple[int, HeadGroup, slice]


@dataclass
class SharedGradients:
    """Gradients of shared parameters, as they add up over segments.

    Attributes:
        wanted: Role -> whether its gradient is wanted, the input's under ``x``.
        sums: Role -> the sum so far.
    """

    wanted: Mapping[str, bool]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, role: str, value: Tensor) -> None:
        """Add a gradient of one role; a LoRA factor's may have fewer ranks than another's."""
        if role not in self.sums:
            self.sums[role] = value
            return
        old = self.sums[role]
        if old.shape == value.shape:
            self.sums[role] = old + value
            return
        whole = old if old.numel() > value.numel() else value
        narrow = value if whole is old else old
        whole[tuple(slice(n) for n in narrow.shape)] += narrow
        self.sums[role] = whole

    def of(self, role: str, like: Tensor | None) -> Tensor | None:
        """Return the gradient of a role, as large as its parameter; None where there is none."""
        gradient = self.sums.get(role)
        if gradient is None or like is None or gradient.shape == like.shape:
            return gradient
        wide = gradient.new_zeros(like.shape)
        wide[tuple(slice(n) for n in gradient.shape)] = gradient
        return wide


class SegmentBackward:
    """The backward pass of one segment through which gradient goes.

    Args:
        run: Which examples go through which branch.
        segment: The segment.
        state: What it kept; used up.
        g: Gradient of its sum, [rows, dim], in the type of products.
        x: Its input, where everything is to be computed again; else None.
        grads: Where gradients of shared parameters add up.
    """

    def __init__(
        self,
        run: BranchRun,
        segment: Segment,
        state: SegmentState,
        g: Tensor,
        x: Tensor | None,
        grads: SharedGradients,
    ):
        self.run, self.segment, self.state, self.g, self.grads = run, segment, state, g, grads
        self.again = x is not None
        self.norm, self.y = state.norm, state.y
        state.norm = state.y = None  # the graph's node outlives its backward pass
        if x is not None:
            leaf = x.detach().requires_grad_(segment.through and grads.wanted["x"])
            self.norm, self.y = run.norm(leaf, state.shared, graph=segment.through)
        self.dy = g.new_empty(g.shape) if segment.through else None
        self.done: set[int] = set()  # slots whose gradient of y has begun
        leaves = state.shared
        self.common = [r for r in run.branch.spec.middle if r in leaves and leaves[r].requires_grad]

    def input_gradient(self) -> Tensor | None:
        """Run it; return the gradient of x [examples, tokens, dim], or None where x wants none."""
        with_examples = self.run.with_examples(self.segment, self.segment.alive)
        live: list[Placed] = [(index, *placed) for index, placed in enumerate(with_examples)]
        for full in (True, False):  # all head groups of an operation together
            self._operation([placed for placed in live if placed[1].full is full], full)
        self.y = None
        return self._through_norm()

    def _operation(self, placed: list[Placed], full: bool) -> None:
        """Go back through all head groups that are FULL, or all that are FROZEN."""
        if not placed:
            return
        deep = self.run.deep(self.segment, full)
        graphs, dzs, saved = self._through_products_out(placed, full, deep)
        if deep:
            dhs = self._through_middles(graphs, dzs)
            self._through_products_in(placed, saved, dhs, full)

    def _through_products_out(
        self, placed: list[Placed], full: bool, deep: bool
    ) -> tuple[list[Graph], list[Tensor], list[SavedActivations]]:
        """Add up gradients of products out; return middles' graphs, gradients of their results.

        What is returned third is what gradients of the products in need.
        """
        graphs, dzs, kept = [], [], []
        for index, head_group, rows in placed:
            graph, dz, saved = self._through_product_out(index, head_group, rows, full, deep)
            if graph is not None and dz is not None:
                graphs.append(graph)
                dzs.append(dz)
            kept.append(saved)
            del graph, dz, saved  # before the next is computed
        return graphs, dzs, kept

    def _through_product_out(
        self, index: int, head_group: HeadGroup, rows: slice, full: bool, deep: bool
    ) -> tuple[Graph | None, Tensor | None, SavedActivations]:
        branch, numerics = self.run.branch, self.run.branch.numerics
        graph, saved = self.state.take(index)
        if self.again:
            graph, saved = self._forward_again(head_group, rows, deep)
        g, outward = self.g[rows], head_group.outward
        error = outward.factor_error(g, self.state.shared, numerics, deep)
        if full:
            outward.weight_gradients(saved, g, error, self.grads.add, branch.observer)
        dz = outward.input_gradient(g, error, saved.z_mask, numerics) if deep else None
        return graph, dz, saved._replace(z=None, v=None, z_dropped=None, z_mask=None)

    def _forward_again(
        self, head_group: HeadGroup, rows: slice, deep: bool
    ) -> tuple[Graph | None, SavedActivations]:
        """Compute a live head group once more, as far as its gradients need it."""
        assert self.y is not None
        run, numerics, training = self.run, self.run.branch.numerics, self.run.branch.training
        graph, inward, z = run.middle(head_group, self.y[rows], self.state.shared, True, deep)
        factors, outward = head_group.outward.product.factors, NOTHING_SAVED
        drops = training and factors is not None and bool(factors.dropout)
        if head_group.full and factors is not None and (factors.far_trains or drops):
            outward = head_group.outward.into_b(z, numerics, training)
        return graph, run.to_keep(head_group, z, inward, outward)

    def _through_middles(self, graphs: list[Graph], dzs: list[Tensor]) -> list[list[Tensor]]:
        """Return gradients of what the products in made; both lists are empty afterwards."""
        shared = [self.state.shared[role] for role in self.common]
        dhs, values = gradients(graphs, dzs, shared)
        graphs.clear()
        dzs.clear()
        for role, value in zip(self.common, values, strict=True):
            self.grads.add(role, value)
        return dhs

    def _through_products_in(
        self,
        placed: list[Placed],
        saved: list[SavedActivations],
        dhs: list[list[Tensor]],
        full: bool,
    ) -> None:
        """Add up gradients of products in, and the gradient of y into ``self.dy``."""
        run, numerics, shared = self.run, self.run.branch.numerics, self.state.shared
        for (_, head_group, rows), kept, dh in zip(placed, saved, dhs, strict=True):
            inward = head_group.inward
            error = inward.factor_error(dh, numerics, self.segment.through)
            if full:
                y = None if self.y is None else self.y[rows]
                observer = run.branch.observer
                inward.weight_gradients(kept, y, dh, error, self.grads.add, observer)
            if self.dy is not None:
                slots, first = run.fresh(head_group, self.done)
                for slot in () if first else slots:
                    self.dy[run.rows(self.segment, slot, slot + 1)] = 0
                dy = self.dy[rows]
                inward.input_gradient(dh, error, kept.y_mask, dy, shared, numerics, add=not first)

    def _through_norm(self) -> Tensor | None:
        """Return the gradient of x, and add up those of the norm's parameters."""
        if self.dy is None:
            return None
        assert self.norm is not None
        shared = self.state.shared
        roles = self.run.branch.spec.norm_roles
        trained = [r for r in roles if r in shared and shared[r].requires_grad]
        dy = self.dy.view(-1, self.run.tokens, self.dy.shape[1])
        (values,), _ = gradients([self.norm], [dy])
        dx = values.pop(0) if self.grads.wanted["x"] else None
        for role, value in zip(trained, values, strict=True):
            self.grads.add(role, value)
        return dx
