"""Counts of the elements and tensors of some parameters, and their bytes on the wire."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.subnets.architecture import Architecture, Parameter
from d2ft_fl.wire.sizes import ELEMENT, TENSOR_HEADER

Which = Callable[[Parameter], bool]


@dataclass(frozen=True)
class ParameterCounts:
    """Elements and tensors of some parameters, by what they belong to.

    Attributes:
        sliced: Elements of subnets: int64 [blocks, heads].
        shared: Elements that a block's subnets share: int64 [blocks].
        outer: Elements of embedding and final part.
        tensors: Tensors of each block: int64 [blocks].
        outer_tensors: Tensors of embedding and final part.
    """

    sliced: np.ndarray
    shared: np.ndarray
    outer: int
    tensors: np.ndarray
    outer_tensors: int

    @classmethod
    def of(cls, arch: Architecture, which: Which) -> "ParameterCounts":
        """Count those parameters of an architecture for which ``which`` is true."""
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
        """Return the bytes on the wire of subnets and what they share: int64 [clients].

        Args:
            which: bool [clients, blocks, heads].
        """
        of_subnets = (which * ELEMENT * self.sliced).sum(axis=(1, 2))
        return of_subnets + (which.any(axis=2) * self.bytes_of_blocks).sum(axis=1)

    def elements(self, which: np.ndarray) -> np.ndarray:
        """Return the elements of subnets and what they share: int64 [clients].

        Args:
            which: bool [clients, blocks, heads], or how often each subnet counts; what a block's
                subnets share counts as often as the largest of these.
        """
        of_subnets = (which * self.sliced).sum(axis=(1, 2))
        return of_subnets + (which.max(axis=2) * self.shared).sum(axis=1)

    def per_rank(self, rank: int) -> "ParameterCounts":
        """Return the counts per rank, out of those of LoRA's factors of a rank."""
        sliced, shared = self.sliced // max(1, rank), self.shared // max(1, rank)
        return replace(self, sliced=sliced, shared=shared)


@dataclass(frozen=True)
class Parts:
    """Parameter counts of an architecture, by what happens to parameters."""

    arch: Architecture

    @cached_property
    def base(self) -> ParameterCounts:
        """Parameters that are no LoRA factors: in memory with every resident subnet."""
        return ParameterCounts.of(self.arch, lambda p: not p.factor)

    @cached_property
    def factors(self) -> ParameterCounts:
        """LoRA's factors, per rank: in memory with trained subnets; of others they are merged."""
        return ParameterCounts.of(self.arch, lambda p: bool(p.factor)).per_rank(self.arch.rank)

    @cached_property
    def trained(self) -> ParameterCounts:
        """Parameters that train: they have gradients and moments, and travel up."""
        return ParameterCounts.of(self.arch, lambda p: p.trains)

    @cached_property
    def whole(self) -> ParameterCounts:
        """Parameters that train and are no LoRA factors, so that ranks do not matter."""
        return ParameterCounts.of(self.arch, lambda p: p.trains and not p.factor)

    @cached_property
    def ranked(self) -> ParameterCounts:
        """LoRA factors that train, per rank."""
        chosen = ParameterCounts.of(self.arch, lambda p: p.trains and bool(p.factor))
        return chosen.per_rank(self.arch.rank)

    @cached_property
    def fixed(self) -> ParameterCounts:
        """Parameters that never change: they travel down to clients that do not have them."""
        return ParameterCounts.of(self.arch, lambda p: p.fixed)

    @cached_property
    def loose(self) -> ParameterCounts:
        """Parameters that change: they travel down every round."""
        return ParameterCounts.of(self.arch, lambda p: not p.fixed)


@lru_cache
def parts_of(arch: Architecture) -> Parts:
    """Return the parameter counts of an architecture, which cost models have in common."""
    return Parts(arch)
