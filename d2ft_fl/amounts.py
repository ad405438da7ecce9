"""How many elements and tensors there are of some parameters, and their bytes on the wire."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from d2ft_fl.memory import ELEMENT
from d2ft_fl.subnets import Architecture, Parameter

TENSOR_HEADER = 160  # bytes that name, shape and place of one tensor take on the wire, at most

Which = Callable[[Parameter], bool]


@dataclass(frozen=True)
class Amounts:
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
    def of(cls, arch: Architecture, which: Which) -> "Amounts":
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

    def elements(self, which: np.ndarray) -> np.ndarray:
        """Elements of subnets [clients, blocks, heads] and what they share: int64 [clients].

        Args:
            which: bool, or how often each counts, what they share as often as the most of them.
        """
        own = (which * self.sliced).sum(axis=(1, 2))
        return own + (which.max(axis=2) * self.shared).sum(axis=1)

    def per_rank(self, rank: int) -> "Amounts":
        """Of LoRA's factors of a rank, what belongs to one of it."""
        sliced, shared = self.sliced // max(1, rank), self.shared // max(1, rank)
        return replace(self, sliced=sliced, shared=shared)
