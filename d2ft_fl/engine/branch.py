"""A residual branch of a block as far as a client has it: some of its heads, and what they do.

A branch (attention or feed-forward) is

    x <- x + drop(scale * (bias + sum_h mid(norm(x) W_in[h]) W_out[h]))

and a head runs in it by its operation:

    FULL          gradient to its weights and through it
    FROZEN        gradient through it; its weights get none
    FORWARD_ONLY  runs outside the graph

A SHORTCUT is not there at all, but for its mean contribution where compensation is on.
:func:`d2ft_fl.engine.run_branch.run_branch` runs a branch.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.model_adapter import BranchTraits, Context
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.product import ProductFactors
from d2ft_fl.engine.saved_activations import Observer
from d2ft_fl.engine.segments import Segment
from d2ft_fl.subnets.branches import BranchSpec, Trains

# Told a head group and its z [examples, tokens, depth] as it runs; see `mean_tally`.
Tally = Callable[[HeadGroup, Tensor], None]


@dataclass
class Branch:
    """One branch of one block.

    Attributes:
        spec: Names and shapes of the branch.
        traits: What it computes with besides its parameters.
        store: The block's slices.
        shared: Role -> shared parameter of the block.
        segments: What its slots do.
        trains: What of it trains.
        factors: Product -> its LoRA factors.
        numerics: How arithmetic is done.
        offsets: Per slot, the compensation of what is skipped, [tokens, dim] or None; scaled and
            biased like the sum it is part of, or as it is where nothing runs.
        training: Whether dropout and stochastic depth are drawn.
        observer: Takes gradients instead of the store; see :data:`Observer`.
        tally: Is told what goes into products out; see :data:`Tally`.
    """

    spec: BranchSpec
    traits: BranchTraits
    store: PackedHeads
    shared: Mapping[str, Tensor]
    segments: list[Segment]
    trains: Trains
    factors: Mapping[str, ProductFactors]
    numerics: Numerics
    offsets: Sequence[Tensor | None]
    training: bool = False
    observer: Observer | None = None
    tally: Tally | None = None

    @cached_property
    def shared_roles(self) -> tuple[str, ...]:
        """Roles of the branch's shared parameters, in a fixed order."""
        return tuple(role for role in self.spec.shared_roles if role in self.shared)

    def normed(self, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of x [examples, tokens, dim]."""
        named = zip(("weight", "bias"), self.spec.norm_roles, strict=True)
        return self.traits.norm(x, {key: shared[role] for key, role in named if role in shared})

    def middle(
        self, hs: Sequence[Tensor], tokens: int, shared: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        """Return what the middle makes of the products in: [rows, width] each -> [rows, depth].

        Args:
            hs: What each product in made, rows being examples x tokens.
            tokens: Of an example.
            shared: Shared parameters of the block.
            context: Of these examples.
        """
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
        return self.spec.dropout > 0 or any(map(self._drops, self.factors))

    def _drops(self, product: str) -> bool:
        return product in self.factors and self.factors[product].dropout > 0

    def settle(self, overwrite: bool) -> list[Tensor]:
        """Decide which FULL heads replace the gradients that they find, and which add to them.

        Args:
            overwrite: Whether one micro-batch makes a step's gradients; otherwise all add up.

        Returns:
            Gradients that must be zeroed before a step.
        """
        full = [part for s in self.segments for group in s.alive for part in group.parts]
        times = Counter(head for part in full for head in part.heads)
        for part in full:  # no order is relied on: autograd chooses it
            part.overwrite = overwrite and all(times[head] == 1 for head in part.heads)
        added = {head for part in full if not part.overwrite for head in part.heads}
        products = (*self.spec.inward, self.spec.outward)
        roles = [role for role in self.store.grads if role.split(".")[0] in products]
        return [
            self.store.grads[role][run.rows]
            for role in roles
            if added
            for run in self.store.runs(role, added)
        ]
