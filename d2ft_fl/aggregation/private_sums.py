"""Private aggregation: sums of updates to which noise is added before anybody sees them.

:mod:`d2ft_fl.aggregation.privacy` defines the sums and says what they promise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from d2ft_fl.aggregation.keyed_noise import Noise
from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Schedule


@dataclass(frozen=True)
class Trainers:
    """How many clients train each part of the model, in expectation over who is drawn.

    Attributes:
        heads: How many train each subnet: float64 [blocks, heads].
        blocks: How many train any subnet of each block: float64 [blocks].
        some: How many train anything.
    """

    heads: np.ndarray
    blocks: np.ndarray
    some: float

    @classmethod
    def of(cls, planned: Sequence[tuple[Schedule, int]], rate: float) -> "Trainers":
        """Count the trainers of all clients' plans.

        Args:
            planned: Schedule and number of examples of every client, at least of one.
            rate: The chance that a client takes part.
        """
        working = [schedule for schedule, examples in planned if examples and not schedule.sits_out]
        shape = planned[0][0].trained.shape
        heads, blocks = np.zeros(shape, dtype=np.int64), np.zeros(shape[0], dtype=np.int64)
        for schedule in working:
            heads += schedule.trained
            blocks += schedule.trained.any(axis=1)
        return cls(heads * rate, blocks * rate, len(working) * rate)

    def of_parameter(self, p: Parameter) -> dict[int, float]:
        """Return how many clients train a parameter, of what any plan trains.

        Args:
            p: The parameter.

        Returns:
            Head -> number of clients; the key is -1 for a whole parameter.
        """
        if p.kind is Kind.SLICED:
            return {h: float(n) for h, n in enumerate(self.heads[p.block]) if n}
        count = self.blocks[p.block] if p.kind is Kind.SHARED else self.some
        return {-1: float(count)} if count else {}


@dataclass(frozen=True)
class PrivateRound:
    """What the sums of one round need to be private.

    Attributes:
        privacy: What the run promises.
        key: The key of the run's noise.
        round: The round, counted from 1.
        trainers: How many clients train what, by all clients' plans.
    """

    privacy: Privacy
    key: bytes
    round: int
    trainers: Trainers


@dataclass
class PrivateSums:
    """Running sums of a round with noise: an :class:`~d2ft_fl.aggregation.aggregator.Aggregator`.

    Attributes:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        examples: Examples that all updates together can count.
        private: What makes the sums private.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    examples: int
    private: PrivateRound
    _sums: Sums = field(init=False)

    def __post_init__(self) -> None:
        self._sums = Sums(self.arch, self.weights, self.examples)

    def add(self, update: Update) -> None:
        """Validate one update, clip it and add it; nothing is added when anything is wrong.

        Args:
            update: What a client sent.

        Raises:
            ReplyError: See :meth:`Sums.terms`.
        """
        terms = [
            replace(term, counts={head: int(n > 0) for head, n in term.counts.items()})
            for term in self._sums.terms(update)
        ]
        size = sum(term.tensor.numel() for term in terms)
        # Rounding to the grid can lengthen a change; the limit is lowered by as much.
        grid = 2.0**-self._sums.fraction_bits
        room = self.private.privacy.clip * (1 - 2.0**-40) - math.sqrt(size) * grid / 2
        length = self._sums.length(terms)
        self._sums.include(update, terms, min(1.0, max(0.0, room) / length) if length else 1.0)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """What any client's plan trains: name -> heads, as in :attr:`Sums.trained`."""
        planned = {
            p.name: self.private.trainers.of_parameter(p) for p in self.arch.parameters if p.trains
        }
        return {n: tuple(h for h in heads if h >= 0) for n, heads in planned.items() if heads}

    @property
    def subnets_trained(self) -> np.ndarray:
        """Subnets that any client's plan trains, drawn or not: bool [blocks, heads]."""
        return self.private.trainers.heads > 0

    @property
    def figures(self) -> Mapping[str, float | None]:
        """The figure ``epsilon``: the privacy that all rounds up to this one cost."""
        return {"epsilon": self.private.privacy.epsilon(self.private.round)}

    def apply(self) -> dict[str, Tensor]:
        """Return the new global weights; what no plan trains keeps its bits."""
        sums, private = self._sums, self.private
        deviation = private.privacy.noise * private.privacy.clip * 2.0**sums.fraction_bits
        # Equal sums get equal noise, for a round that is run again; different sums get other noise.
        noise = Noise(private.key, "noise", private.round, sums.digest())
        for name in self.trained:
            p = self.arch.by_name[name]
            counts = {h: max(1.0, n) for h, n in private.trainers.of_parameter(p).items()}
            for total in sums.divide_by(p, counts):
                # Noise is whole numbers, as the sums are: bits of floats could reveal the sum.
                drawn = np.rint(deviation * noise.normal(total.size))
                total += drawn.astype(np.int64).reshape(total.shape)
        return sums.apply()
