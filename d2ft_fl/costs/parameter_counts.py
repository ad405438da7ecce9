"""How many elements and tensors there are of some parameters, and their bytes on the wire."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.subnets.architecture import Architecture, Parameter
from d2ft_fl.wire.sizes import ELEMENT, TENSOR_HEADER

Which = Callable[[Parameter], bool]


@dataclass(frozen=True)
class ParameterCounts:
    """How much of an architecture some parameters are, by what they belong to.

    Attributes:
        sliced: Elements, int64 [blocks, heads]. shared: Elements, int64 [blocks].
        outer: Elements of embedding and final part.
        tensors: Of each block: int64 [blocks]. outer_tensors: Of embedding and final part.
    """

    sliced: np.ndarray
    shared: np.ndarray
    outer: int
    tensors: np.ndarray
    outer_tensors: int

    @classmethod
    def of(cls, arch: Architecture, which: Which) -> "ParameterCounts":
        """Counted from the parameters."""
        chosen = [p for p in arch.parameters if which(p)]
        outer = [p.numel for p in chosen if p.block < 0]
        blocks = np.array([p.block for p in chosen if p.block >= 0], dtype=np.int64)
        tensors = np.bincount(blocks, minlength=arch.blocks)
        sliced, shared = arch.sliced_sizes(which), arch.shared_sizes(which)
        return cls(sliced, shared, sum(outer), tensors, len(outer))

    @property
    def bytes_of_blocks(self) -> np.ndarray:
        """Bytes on the wire of what a block's subnets share, headers included: int64 [blocks]."""
        return ELEMENT * self.shared + TENSOR_HEADER * self.tensors

    @property
    def outer_bytes(self) -> int:
        """Bytes on the wire of embedding and final part."""
        return ELEMENT * self.outer + TENSOR_HEADER * self.outer_tensors

    def wire_bytes(self, which: np.ndarray) -> np.ndarray:
        """Bytes on the wire of subnets bool [clients, blocks, heads] and what they share."""
        own = (which * ELEMENT * self.sliced).sum(axis=(1, 2))
        return own + (which.any(axis=2) * self.bytes_of_blocks).sum(axis=1)

    def elements(self, which: np.ndarray) -> np.ndarray:
        """Elements of subnets [clients, blocks, heads] and what they share: int64 [clients].

        Args:
            which: bool, or how often each counts, what they share as often as the most of them.
        """
        own = (which * self.sliced).sum(axis=(1, 2))
        return own + (which.max(axis=2) * self.shared).sum(axis=1)

    def per_rank(self, rank: int) -> "ParameterCounts":
        """Of LoRA's factors of a rank, what belongs to one of it."""
        sliced, shared = self.sliced // max(1, rank), self.shared // max(1, rank)
        return replace(self, sliced=sliced, shared=shared)


@dataclass(frozen=True)
class Parts:
    """How much of an architecture there is of what, by what becomes of it."""

    arch: Architecture

    @cached_property
    def own(self) -> ParameterCounts:
        """The model's own parameters: held with every resident subnet."""
        return ParameterCounts.of(self.arch, lambda p: not p.factor)

    @cached_property
    def factors(self) -> ParameterCounts:
        """LoRA's factors, by rank: held with trained subnets; those of others are folded in."""
        return ParameterCounts.of(self.arch, lambda p: bool(p.factor)).per_rank(self.arch.rank)

    @cached_property
    def trained(self) -> ParameterCounts:
        """What trains: has gradients and moments, and travels up."""
        return ParameterCounts.of(self.arch, lambda p: p.trains)

    @cached_property
    def whole(self) -> ParameterCounts:
        """What trains whatever the rank: everything but factors."""
        return ParameterCounts.of(self.arch, lambda p: p.trains and not p.factor)

    @cached_property
    def ranked(self) -> ParameterCounts:
        """Of factors that train, what belongs to one of their rank."""
        chosen = ParameterCounts.of(self.arch, lambda p: p.trains and bool(p.factor))
        return chosen.per_rank(self.arch.rank)

    @cached_property
    def fixed(self) -> ParameterCounts:
        """What never changes: travels down to clients that have it not."""
        return ParameterCounts.of(self.arch, lambda p: p.fixed)

    @cached_property
    def loose(self) -> ParameterCounts:
        """What changes: travels down every round."""
        return ParameterCounts.of(self.arch, lambda p: not p.fixed)
