"""What a head group keeps between its forward and its backward pass, and who may watch."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Told (role, first row, gradient of a run of rows) instead of adding the gradient up; see
# `d2ft_fl.engine.probes.probe_scores`.
Observer = Callable[[str, int, Tensor], None]

# Told (role, gradient) of a parameter that heads share.
Sink = Callable[[str, Tensor], None]


class SavedActivations(NamedTuple):
    """What a FULL head group keeps for the gradients of its weights; None where none needs it.

    Attributes:
        u: What A makes of the input of the product in, scaled: [rows, rank].
        v: What A makes of the input of the product out, scaled: [rows, rank].
        y_dropped: What went into A of the product in, where LoRA drops out.
        y_mask: Where ``y_dropped`` was not dropped.
        z_dropped: What went into A of the product out, where LoRA drops out.
        z_mask: Where ``z_dropped`` was not dropped.
    """

    u: Tensor | None = None
    v: Tensor | None = None
    y_dropped: Tensor | None = None
    y_mask: Tensor | None = None
    z_dropped: Tensor | None = None
    z_mask: Tensor | None = None


NOTHING_SAVED = SavedActivations()
