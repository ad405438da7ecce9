"""How the engine does arithmetic: types of products, and what is computed again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2ft_fl.config.training_options import TrainingOptions


@dataclass(frozen=True)
class Numerics:
    """Arithmetic of the engine.

    Attributes:
        dtype: Of products and middles; sums, norms, weights and gradients keep their own.
        recompute: Activation checkpointing: keep a branch's input only, and compute what its
            backward pass needs once more.
    """

    dtype: torch.dtype = torch.float32
    recompute: bool = False

    @classmethod
    def of(cls, options: TrainingOptions) -> "Numerics":
        """Return the arithmetic that options of training ask for."""
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        return cls(dtype, options.checkpointing)

    @property
    def mixed(self) -> bool:
        """Whether products are done in another type than weights have."""
        return self.dtype is torch.bfloat16

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a tensor as products take it."""
        return tensor.to(self.dtype) if self.mixed else tensor
