"""What the engine needs of a model family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Norm = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


# (training; products in, one a role; shared parameters) -> what the product out takes
Middle = Callable[[bool, Sequence[Tensor], Mapping[str, Tensor]], Tensor]


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


@dataclass(frozen=True)
class BlockTraits:
    """What a block computes with beside its weights."""

    attention: BranchTraits
    feed_forward: BranchTraits
