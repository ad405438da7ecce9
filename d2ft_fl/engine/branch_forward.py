"""The sum that a branch adds, forward: segment by segment, head group by head group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2ft_fl.engine.branch_run import BranchRun, SegmentState
from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.random_state import generator_state
from d2ft_fl.engine.segments import Segment


def branch_sum(
    run: BranchRun, x: Tensor, shared: Mapping[str, Tensor], wanted: Mapping[str, bool] | None
) -> tuple[Tensor, list[SegmentState]]:
    """Return the sum [examples, tokens, dim], before its scale, and what live segments keep.

    Args:
        run: Which examples go through which branch.
        x: The residual stream, [examples, tokens, dim].
        shared: Role -> shared parameter of the block.
        wanted: Role -> whether its gradient is wanted, the input's under ``x``; None where there is
            no graph.
    """
    numerics = run.branch.numerics
    total = x.new_empty(x.shape, dtype=numerics.dtype if numerics.mixed else x.dtype)
    states = []
    for segment in run.present:
        if segment.status is Status.IDLE:
            total[run.examples(segment)].zero_()
            continue
        state = _Segment(run, segment, total, shared, wanted).forward(x)
        if segment.alive and wanted is not None:
            states.append(state)
    return total, states


class _Segment:
    """One segment on its way forward.

    Args:
        run: Which examples go through which branch.
        segment: The segment.
        total: The sum of all examples; the segment's part of it is written.
        shared: Role -> shared parameter of the block.
        wanted: See :func:`branch_sum`.
    """

    def __init__(
        self,
        run: BranchRun,
        segment: Segment,
        total: Tensor,
        shared: Mapping[str, Tensor],
        wanted: Mapping[str, bool] | None,
    ):
        self.run, self.segment, self.total = run, segment, total
        self.shared, self.wanted = shared, wanted
        self.into = total[run.examples(segment)].flatten(0, 1)  # [rows, dim]
        self.graph = wanted is not None and not run.branch.numerics.recompute
        self.summed: set[int] = set()  # slots whose sum has begun

    def forward(self, x: Tensor) -> SegmentState:
        """Sum up what the head groups add to ``x``; return what to keep."""
        run, segment, branch = self.run, self.segment, self.run.branch
        leaves = (
            dict(self.shared)
            if self.wanted is None
            else run.leaves(self.shared, self.wanted, segment)
        )
        part = x[run.examples(segment)].detach()
        if self.wanted is not None and segment.through:
            part.requires_grad_(self.wanted["x"])
        norm, y = run.norm(part, leaves, self.graph and segment.through)
        keeps_y = self.graph and segment.status is Status.TRAINS and branch.keeps_y
        state = SegmentState(leaves, norm, y if keeps_y else None)
        again = segment.alive and branch.numerics.recompute
        if again and branch.training and branch.random:
            state.random_state = generator_state(x.device)
        for head_group, rows in run.with_examples(segment, [*segment.alive, *segment.silent]):
            self._head_group(head_group, rows, y, state)
        return state

    def _head_group(
        self, head_group: HeadGroup, rows: slice, y: Tensor, state: SegmentState
    ) -> None:
        """Add what a head group adds; keep what its gradients need in ``state``."""
        run, branch = self.run, self.run.branch
        live = self.wanted is not None and head_group in self.segment.alive
        keeps = self.graph and live
        graph, inward, z = run.middle(
            head_group,
            y[rows],
            state.shared if keeps else self.shared,
            live,
            keeps and run.deep(self.segment, head_group.full),
        )
        if branch.tally is not None:
            branch.tally(head_group, z.view(-1, run.tokens, head_group.depth))
        outward = head_group.outward.forward(
            z,
            self.into[rows],
            self.shared,
            branch.numerics,
            self._start(head_group, self.into[rows]),
            live and branch.training,
        )
        if keeps:
            state.middles.append(graph)
            state.saved.append(run.to_keep(head_group, z, inward, outward))

    def _start(self, head_group: HeadGroup, into: Tensor) -> Tensor | None:
        """Return what a head group's product out adds to; see ``ProductOut.forward``.

        The first head group of a slot finds nothing: a bias alone goes into its product; else its
        rows start with what is there anyway, the bias and what skipped heads add on average.

        Args:
            head_group: The heads.
            into: Their rows of the sum.
        """
        run, offsets = self.run, self.run.branch.offsets
        bias = self.shared.get(run.branch.spec.bias)
        slots, first = run.fresh(head_group, self.summed)
        if first and not any(offsets[slot] is not None for slot in slots):
            return None if bias is None else run.branch.numerics.cast(bias)
        for slot in slots:
            part = self.total[run.bounds[slot] : run.bounds[slot + 1]]
            terms = [t for t in (bias, offsets[slot]) if t is not None]
            if terms:
                part.copy_(terms[0] if len(terms) == 1 else torch.add(*terms))
            else:
                part.zero_()
        return into
