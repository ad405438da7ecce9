"""What the engine needs to know of a model family: the :class:`ModelAdapter` protocol.

An adapter stands between one model of a library (a timm vision transformer, say) and everything
else here. It divides the model into three parts: the embedding, which turns a batch's inputs into
the residual stream [examples, tokens, dim]; the blocks, each a sequence of residual branches that
the engine runs itself, head by head; and the head, which turns the stream into outputs. The
engine, planning, costs, the server and clients see adapters and
:class:`~d2ft_fl.subnets.architecture.Architecture` only. ``d2ft_fl/models/README.md`` lists what a
new family needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from d2ft_fl.subnets.architecture import Architecture

# What a family's `embed` takes, one tensor with the examples first: images [examples, channels,
# height, width], or words [examples, tokens]. Batches, slots and the meter take it apart by rows.
Inputs = Tensor

# What every block of one forward pass needs besides the stream, by name: a mask, rotary positions.
# Each tensor's first axis is the examples, or 1 where it is the same for all of them.
Context = Mapping[str, Tensor]

# (x [examples, tokens, dim], parameters under `weight` and `bias`) -> the norm of x, as large.
Norm = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

# (whether it trains; what each product in made, [examples, tokens, width]; the block's shared
# parameters, by role; the context) -> what the product out takes, [examples, tokens, depth].
Middle = Callable[[bool, Sequence[Tensor], Mapping[str, Tensor], Context], Tensor]


@dataclass(frozen=True)
class BranchTraits:
    """What one branch of one block computes with, besides its parameters.

    Names of parameters, shapes and where the norm stands are the architecture's, see
    :class:`~d2ft_fl.subnets.architecture.Architecture`.

    Attributes:
        norm: The norm of the branch, as a function of its parameters.
        middle: What lies between the products in and the product out, for example attention. It
            takes any number of heads, and must treat each of them by itself. It draws random
            numbers in training only where ``BranchSpec.dropout`` is above 0.
        output_dropout: Probability of dropout on the sum of all heads.
        drop_path: Probability of stochastic depth: an example goes without the branch.
    """

    norm: Norm
    middle: Middle
    output_dropout: float = 0.0
    drop_path: float = 0.0


# The traits of a block's branches, in the order of the architecture's.
BlockTraits = tuple[BranchTraits, ...]


class ModelAdapter(Protocol):
    """One model, as the rest of the project sees it.

    An adapter is cheap to make and never changes its model's weights. Names of parameters are those
    of ``model.named_parameters()`` everywhere.
    """

    @property
    def model(self) -> nn.Module:
        """The whole, unmodified model; its parameters are the state that a run begins with."""

    @property
    def notes(self) -> Sequence[str]:
        """What somebody who runs this model may want to know of its weights, a line each."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (channels, height, width) of images, (tokens,) of text."""

    def describe(self) -> Architecture:
        """Return how the model divides into subnets: every parameter, and the shape of branches."""

    def block_traits(self, device: torch.device) -> list[BlockTraits]:
        """Return what each block computes with, from the first to the last.

        Args:
            device: Where it will run: kernels of attention depend on it.
        """

    def without_blocks(self) -> nn.Module:
        """Return a copy of all that lies outside the blocks: the ``outer`` of other methods.

        Its parameters keep their names; those of ``Kind.FINAL`` want gradients.
        """

    def embed(self, outer: nn.Module, inputs: Inputs, tokens: int | None) -> tuple[Tensor, Context]:
        """Return the stream [examples, tokens, dim] that enters the first block, and its context.

        Args:
            outer: See :meth:`without_blocks`.
            inputs: Of some examples, on the device of ``outer``.
            tokens: How many tokens of each example to keep, chosen at random, those that the
                architecture counts as ``prefix`` in any case; None for all of them.
        """

    def features(self, outer: nn.Module, x: Tensor, context: Context) -> Tensor:
        """Return what the last linear layer takes: normed and, where the model does so, pooled.

        Args:
            outer: See :meth:`without_blocks`.
            x: The stream behind the last block, [examples, tokens, dim].
            context: What :meth:`embed` returned.
        """

    def logits(self, outer: nn.Module, features: Tensor) -> Tensor:
        """Return the outputs of the last linear layer, [..., classes] for features [..., dim].

        The engine calls it on all features. It is a method of its own because of models with many
        classes, such as words, whose logits take more memory than all else: rows must not depend
        on each other, so that they can be computed a few at a time.
        """

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the logits of the whole :attr:`model`, run by its own library."""

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write weights into a folder as the library of the family loads them.

        Args:
            folder: It exists; ``model.safetensors`` and ``model.json`` are written, the latter an
                object from which ``Family.read`` (``d2ft_fl/models/family.py``) has the arguments
                and classes with which the model is built again.
            weights: By the names of the model's parameters, which are those of the tensors.
        """
