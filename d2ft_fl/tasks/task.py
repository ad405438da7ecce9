"""The interface of a task: everything that depends on what a model learns.

A task says how examples become a batch, which loss trains the model, and which figures describe how
good the model is. Engine, clients and server know nothing else about what is learnt.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples that are run together, one row for each.

    Attributes:
        inputs: What the model is given, [batch, ...].
        targets: What the outputs are compared with, [batch, ...].
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> "Batch":
        """Return the examples ``start`` to ``stop``, as views."""
        return Batch(self.inputs[start:stop], self.targets[start:stop])

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Outputs:
    """What a model returns for a batch.

    Attributes:
        logits: The model's last layer before any activation, [batch, classes].
    """

    logits: Tensor


class Task(Protocol):
    """What is learnt. :class:`BaseTask` implements the hooks that most tasks have in common."""

    @property
    def name(self) -> str:
        """Name of the task, as run folders record it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all figures, in the order in which they are shown.

        A figure called ``loss`` is drawn beside the loss of clients in training: it has to be the
        mean of :meth:`loss` over :meth:`weight`.
        """

    @property
    def primary(self) -> str:
        """Name of the figure that decides which of two models is the better one."""

    @property
    def maximise(self) -> bool:
        """Whether a larger primary figure is better."""

    @property
    def percent(self) -> frozenset[str]:
        """Names of the figures that are shares between 0 and 1, which are shown in per cent."""

    def collate(self, examples: Any) -> Batch:
        """Make a batch of examples as the data set returns them."""

    def for_client(self, targets: np.ndarray, classes: int, device: torch.device) -> "Task":
        """Return the task as one client trains on it. Called once for each assignment.

        Args:
            targets: Targets of all of the client's training examples.
            classes: Number of the model's outputs.
            device: Where the client trains.
        """

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the loss summed over the batch, a scalar with a gradient.

        It may change ``outputs`` in place, and is called once for each forward pass in training.
        """

    def weight(self, batch: Batch) -> int:
        """Return what a mean loss divides by: the number of examples, or of labelled tokens."""

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return scalars that add up over batches and clients, from which figures are computed.

        Called without gradients, on the model as it is evaluated.
        """

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the value of each of :attr:`metrics` from added :meth:`sums`."""


class BaseTask(ABC):
    """A task whose examples are pairs of input and target and count equally.

    Subclasses set the class variables and implement :meth:`loss`, :meth:`sums` and :meth:`figures`;
    :class:`Task` describes all hooks.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    primary: ClassVar[str]
    maximise: ClassVar[bool] = True
    percent: ClassVar[frozenset[str]] = frozenset()

    def collate(self, examples: tuple[Tensor, Tensor]) -> Batch:
        """Make a batch of stacked inputs and stacked targets, [batch, ...] each."""
        return Batch(*examples)

    def for_client(self, targets: np.ndarray, classes: int, device: torch.device) -> Task:
        """Return this task: every client trains alike."""
        return self

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the loss summed over the batch."""

    def weight(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch)

    @abstractmethod
    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return scalars that add up over batches and clients."""

    @abstractmethod
    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the figures from added sums."""


def add_sums(totals: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the sums of one batch to those of earlier batches, in float64.

    Args:
        totals: Sums so far; empty before the first batch.
        sums: Sums of one batch, see :meth:`Task.sums`.
    """
    return {
        name: value.double() + totals[name] if name in totals else value.double()
        for name, value in sums.items()
    }
