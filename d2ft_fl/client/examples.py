"""Which examples a client trains on, and in which order: by seed, round and client."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from d2ft_fl.data.federated_data import FederatedData
from d2ft_fl.engine.trainer import Batches
from d2ft_fl.rounds.messages import Message
from d2ft_fl.tasks.task import Batch, Task


@dataclass
class LocalExamples:
    """Draws and orders the examples of clients, by their numbers in the client's data.

    Attributes:
        data: The data set, and which examples are whose.
        task: What is learnt, by all clients together.
        seed: Of the run.
        epochs_per_round: How often a client sees its examples in a round.
        device: Where batches go.
        flips_labels: Whether a client trains on label L - 1 - y for y, of L classes.
    """

    data: FederatedData
    task: Task
    seed: int
    epochs_per_round: int
    device: torch.device
    flips_labels: Callable[[int], bool] = lambda client: False

    def count(self, client: int) -> int:
        """Return how many examples a client has."""
        return len(self.data.partitions[client])

    def seed_of(self, client: int, round_number: int) -> tuple[int, int, int]:
        """Return what random numbers of a client's round are seeded with."""
        return self.seed, round_number, client

    def choose(self, message: Message) -> np.ndarray:
        """Return the examples to train on, where none are selected: int64 [examples]."""
        if message.policy.in_turn:
            return self.in_turn(message)
        return self._order(message.client, message.round)[0][: message.examples]

    def in_turn(self, message: Message) -> np.ndarray:
        """Return the examples whose turn it is in a round, if all rounds take as many."""
        count = self.count(message.client)
        order = np.random.default_rng([self.seed, message.client, 3]).permutation(count)
        start = (message.round - 1) * message.examples
        return order[np.arange(start, start + message.examples) % count]

    def epochs(self, client: int, round_number: int, chosen: np.ndarray) -> list[np.ndarray]:
        """Return each epoch's order of the chosen examples: int64 [examples] each."""
        return [epoch[np.isin(epoch, chosen)] for epoch in self._order(client, round_number)]

    def batches(self, client: int, examples: np.ndarray, size: int) -> Batches:
        """Yield some of a client's examples, in batches of a size."""
        for start in range(0, len(examples), size):
            yield self.batch(client, examples[start : start + size])

    def batch(self, client: int, examples: np.ndarray) -> Batch:
        """Return some of a client's examples as one batch."""
        inputs, targets = self.data.client_batch(client, examples, self.device)
        if self.flips_labels(client):
            targets = self.data.classes - 1 - targets
        return self.task.collate((inputs, targets))

    def task_of(self, client: int) -> Task:
        """Return what a client learns, which may depend on the labels that it has."""
        labels = self.data.train.labels[self.data.partitions[client]]
        if self.flips_labels(client):
            labels = self.data.classes - 1 - labels
        return self.task.for_client(labels, self.data.classes, self.device)

    def _order(self, client: int, round_number: int) -> list[np.ndarray]:
        """Return each epoch's order of all examples of a client."""
        draw = np.random.default_rng([*self.seed_of(client, round_number), 1])
        return [draw.permutation(self.count(client)) for _ in range(self.epochs_per_round)]
