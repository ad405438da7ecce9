"""How clients train: what costs depend on, and training follows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16")
# What learning rates are multiplied by after this share of the rounds.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class Numerics:
    """How arithmetic is done.

    Attributes:
        dtype: Of products and middles; sums, norms, weights and gradients keep their own.
        recompute: Activation checkpointing: keep a branch's input only, and compute what its
            backward pass needs once more.
    """

    dtype: torch.dtype = torch.float32
    recompute: bool = False

    @property
    def mixed(self) -> bool:
        """Whether products are done in another type than weights have."""
        return self.dtype is torch.bfloat16

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor as products take it."""
        return tensor.to(self.dtype) if self.mixed else tensor


@dataclass(frozen=True)
class LocalOptions:
    """How a client trains what it was assigned.

    Attributes:
        precision: ``fp32``, or ``bf16``: products and activations in bfloat16, weights, gradients
            and sums in float32, as torch's autocast does it.
        checkpointing: Keep only the inputs of branches for the backward pass, and compute the rest
            once more (Chen et al., arXiv 1604.06174): less memory for more FLOPs.
        accumulate: Passes that a batch is run in, one after another, gradients added up: less
            memory for more time. One optimiser step a batch in any case.
        proximal: mu of FedProx (Li et al., MLSys 2020, arXiv 1812.06127, equation 2): the loss is
            larger by mu / 2 times the squared distance of what trains from where it began. Takes a
            copy of that; 0 for none.
        logit_adjustment: How much of the log of its label's share of the client's examples is added
            to each logit in the loss (Menon et al., ICLR 2021, arXiv 2007.07314, equation 10; for
            federations FedLC, Zhang et al., ICML 2022, arXiv 2209.00189): at 1 the model need not
            learn which labels a client happens to have. 0 for none.
    """

    batch_size: int = 16
    epochs: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-4
    head_lr: float = 2e-3
    lora_lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    precision: str = "fp32"
    checkpointing: bool = False
    accumulate: int = 1
    proximal: float = 0.0
    logit_adjustment: float = 0.0

    def at(self, factor: float, rate: float = 1.0) -> "LocalOptions":
        """The same with learning rates times a factor; all but the classifier's by a rate, too."""
        return replace(
            self,
            lr=self.lr * factor * rate,
            head_lr=self.head_lr * factor,
            lora_lr=self.lora_lr * factor * rate,
        )

    def under(self, policy: "ExecutionPolicy") -> "LocalOptions":
        """These options, but for what a way says that costs depend on."""
        return replace(
            self,
            batch_size=self.batch_size if policy.batch is None else policy.batch,
            accumulate=self.accumulate if policy.accumulate is None else policy.accumulate,
            checkpointing=(
                self.checkpointing if policy.checkpointing is None else policy.checkpointing
            ),
        )

    def plain(self) -> "LocalOptions":
        """The same without what trades FLOPs or time for memory."""
        return replace(self, checkpointing=False, accumulate=1)

    def numerics(self) -> Numerics:
        """The engine's part of it."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return Numerics(dtype, self.checkpointing)


@dataclass(frozen=True)
class ExecutionPolicy:
    """How a client runs its schedule, where that is not as configured; None is as configured.

    Attributes:
        accumulate: Passes that a batch is run in.
        checkpointing: Whether activations are computed again.
        tokens: Of an example, that blocks see in training, prefix tokens included. Which patches
            those are is drawn anew for every example and batch (PatchDropout, Liu et al., WACV
            2023, arXiv 2208.07220). None for all.
        bits_up: Of each number that travels up; see :mod:`d2ft_fl.wire.quantization`.
        bits_down: Of each that travels down; fewer than 32 only with fewer up.
        in_turn: Whether fewer examples than a client has are taken in turn, those of a round after
            those of the one before, in an order of the run: each is seen as often as any other.
            Otherwise every round draws its own.
        rate: What the learning rates of all but the classifier are multiplied by.
        weight: What each of its examples counts when means are taken.
        step: What the server multiplies the client's change by; see :class:`Update
            <d2ft_fl.aggregation.sums.Update>`.
        batch: Examples of a step, one a slot at least: fewer of them make more steps.
    """

    accumulate: int | None = None
    checkpointing: bool | None = None
    tokens: int | None = None
    bits_up: int | None = None
    bits_down: int | None = None
    in_turn: bool = False
    rate: float = 1.0
    weight: float = 1.0
    step: float = 1.0
    batch: int | None = None

    @property
    def priced(self) -> "ExecutionPolicy":
        """What of it costs depend on."""
        return replace(self, in_turn=False, rate=1.0, weight=1.0, step=1.0)


DEFAULT_POLICY = ExecutionPolicy()
