"""A residual branch of a block, run for some of its heads.

A branch (attention or feed-forward) is

    x <- x + drop(scale * (bias + sum_h mid(norm(x) W_in[h]) W_out[h]))

By operation:

    FULL          gradient to its weights and through it
    FROZEN        gradient through it; its weights get none
    FORWARD_ONLY  runs outside the graph

and a SHORTCUT is not there at all, but for its mean contribution where compensation is on. The
arithmetic of the sum is in :mod:`d2ft_fl.engine.branch_autograd`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl.engine import fast_path
from d2ft_fl.engine.branch_autograd import Pass, Sum
from d2ft_fl.engine.grouping import Status
from d2ft_fl.engine.head_group import HeadGroup, Lora, Observer
from d2ft_fl.engine.model_adapter import BranchTraits, Context
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.segments import Segment
from d2ft_fl.subnets.branches import BranchSpec, Trains

# Told a piece and its z [examples, tokens, depth] as it runs; see `compensation`.
Tally = Callable[[HeadGroup, Tensor], None]


@dataclass
class Branch:
    """One branch of one block, as far as a client holds it.

    Attributes:
        store: The block's slices.
        shared: role -> shared parameters of the block.
        segments: What its slots do.
        trains: What of it trains. loras: Product -> its LoRA factors.
        numerics: How arithmetic is done.
        offsets: Per slot, the compensation of what is skipped, [tokens, dim] or None; scaled and
            biased like the sum it is part of, or as it is where nothing runs.
        training: Whether dropout and stochastic depth are drawn.
        observer: See :data:`Observer`. tally: See :data:`Tally`.
    """

    spec: BranchSpec
    traits: BranchTraits
    store: PackedHeads
    shared: Mapping[str, Tensor]
    segments: list[Segment]
    trains: Trains
    loras: Mapping[str, Lora]
    numerics: Numerics
    offsets: Sequence[Tensor | None]
    training: bool = False
    observer: Observer | None = None
    tally: Tally | None = None

    def __post_init__(self) -> None:
        self._only = fast_path.only_group(self)

    def __call__(self, x: Tensor, bounds: Sequence[int], context: Context) -> Tensor:
        """x [examples, tokens, dim] plus what the branch adds.

        Slot s has the examples ``bounds[s]`` to before ``bounds[s + 1]``.
        """
        present = [s for s in self.segments if bounds[s.slots[0]] < bounds[s.slots[1]]]
        if all(s.status is Status.IDLE for s in present) and not any(
            o is not None and bounds[slot] < bounds[slot + 1] for slot, o in enumerate(self.offsets)
        ):
            return x
        work = Pass(self, present, tuple(bounds), x.shape[1], context)
        graph = torch.is_grad_enabled() and any(s.alive for s in present)
        if graph and self._only and self.observer is None and self.tally is None:
            out = fast_path.run(self, self._only, x, context)
        elif graph:
            roles = tuple(role for role in self.spec.shared_roles if role in self.shared)
            anchor = x.new_empty(0, requires_grad=True)
            out = Sum.apply(work, roles, anchor, x, *(self.shared[role] for role in roles))
        else:
            with torch.no_grad():
                out = work.scaled(work.forward(x.detach(), self.shared, None)[0], self.shared)
        if self.training and self.traits.output_dropout:
            out = F.dropout(out, self.traits.output_dropout)
        if self.training and self.traits.drop_path:
            out = _drop_path(out, self.traits.drop_path)
        return x + out

    def normed(self, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """The norm of x [examples, tokens, dim]."""
        named = zip(("weight", "bias"), self.spec.norm_roles, strict=True)
        return self.traits.norm(x, {key: shared[role] for key, role in named if role in shared})

    def middle(
        self, hs: Sequence[Tensor], tokens: int, shared: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        """What lies between the products: [rows, width] each -> [rows, depth]."""
        split = [h.view(len(h) // tokens, tokens, h.shape[1]) for h in hs]
        training, middle = self.training, self.traits.middle
        if not self.numerics.mixed:
            return middle(training, split, shared, context).flatten(0, 1)
        with torch.autocast(hs[0].device.type, self.numerics.dtype):
            return middle(training, split, shared, context).flatten(0, 1)

    @property
    def keeps_y(self) -> bool:
        """Whether gradients need the norm as it is: not where LoRA drops out of it first."""
        return self.trains.y and not (self.training and self._drops(self.spec.inward[0]))

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn between x and the sum, when training."""
        return self.traits.random or any(map(self._drops, self.loras))

    def _drops(self, product: str) -> bool:
        return product in self.loras and self.loras[product].dropout > 0

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
        for head_group in full:
            head_group.overwrites = overwrite and touched.isdisjoint(head_group.heads)
            if not head_group.overwrites:
                first.update(set(head_group.heads) - touched)
            touched.update(head_group.heads)
        products = (*self.spec.inward, self.spec.outward)
        roles = [role for role in self.store.grads if role.split(".")[0] in products]
        return [
            self.store.grads[role][run.rows]
            for role in roles
            if first
            for run in self.store.runs(role, first)
        ]


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
