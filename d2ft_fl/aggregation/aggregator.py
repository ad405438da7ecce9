"""What becomes of a round's updates: the protocol that every aggregator implements.

Every aggregator keeps these laws, where U are the updates of a round:

Order
    ``apply`` returns the same bits for every order in which U was added, because answers of
    parallel clients come in any order. (``tests/aggregation``: ``test_sums.py`` for the mean,
    ``test_lora_sums.py`` for factors, ``test_robust.py``, ``test_privacy.py``.)
Nobody trained it
    A slice that nobody trained, or that too few trained for the aggregator to tell, keeps its bits.
    (The same files.)
FedAvg
    Where all clients train everything, the mean is that of FedAvg: the changes' mean, weighted by
    examples. (``test_sums.py``.)
All or nothing
    An update that is refused leaves no trace. (``test_sums.py``, ``test_lora_sums.py``.)
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from d2ft_fl.aggregation.update import Update


class Aggregator(Protocol):
    """Takes the updates of one round one at a time, and makes the next global state of them.

    The server makes one for each round, calls :meth:`add` as answers arrive, :meth:`apply` once
    after the last, and reads the properties after that. It is used by one thread.
    """

    def add(self, update: Update) -> None:
        """Validate one client's update and aggregate it.

        Nothing is aggregated when anything is wrong, and the client counts as failed.

        Args:
            update: What a client sent, with the schedule that it was assigned. Its tensors may lie
                in memory that is good until this returns.

        Raises:
            ReplyError: With the first thing that is wrong.
        """

    def apply(self) -> dict[str, Tensor]:
        """Return the next global state, by name: the mean of the updates, before the server's step.

        What keeps its value is the tensor of the state before the round, not a copy.
        """

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Parameters that the server's optimiser steps.

        Name -> the heads that were trained, in ascending order; none for a whole parameter.
        """

    @property
    def subnets_trained(self) -> np.ndarray:
        """Subnets that count as trained in this round: bool [blocks, heads]."""

    @property
    def figures(self) -> Mapping[str, float | None]:
        """Figures for the record of the round, by name; None where one could not be known."""
