"""Folding private updates in: sums that get noise before anybody sees them.

See :mod:`d2ft_fl.aggregation.privacy` for what they are, and what they promise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from d2ft_fl.aggregation.keyed_noise import Noise
from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.aggregation.sums import Sums, Update
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Schedule


@dataclass(frozen=True)
class Trainers:
    """How many clients' plans train what, expected over who is drawn.

    Attributes:
        heads: float64 [blocks, heads]. blocks: Any of a block's heads, float64 [blocks].
        some: Anything at all.
    """

    heads: np.ndarray
    blocks: np.ndarray
    some: float

    @classmethod
    def of(cls, planned: Sequence[tuple[Schedule, int]], rate: float) -> "Trainers":
        """Count the trainers of all clients' plans.

        Args:
            planned: Schedule and number of examples of every client; one at least.
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
        """Head -> how many, of those that any plan trains; -1 of a whole parameter."""
        if p.kind is Kind.SLICED:
            return {h: float(n) for h, n in enumerate(self.heads[p.block]) if n}
        count = self.blocks[p.block] if p.kind is Kind.SHARED else self.some
        return {-1: float(count)} if count else {}


@dataclass(frozen=True)
class PrivateRound:
    """What the sums of one round need to be private.

    Attributes:
        privacy: How much noise. key: Of the noise.
        round: Counted from 1.
        trainers: Of all clients' plans.
    """

    privacy: Privacy
    key: bytes
    round: int
    trainers: Trainers


@dataclass
class PrivateSums:
    """Running sums of a round with noise; the interface is that of :class:`Sums`.

    Attributes:
        arch, weights: The model, and its values before the round.
        examples: Examples that all updates together can count.
        private: How they are private.
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

        Raises:
            ReplyError: See :meth:`Sums.terms`.
        """
        terms = [
            replace(term, counts={head: int(n > 0) for head, n in term.counts.items()})
            for term in self._sums.terms(update)
        ]
        size = sum(term.tensor.numel() for term in terms)
        # Exactly: what rounding to the grid can add to the length is taken off before.
        grid = 2.0**-self._sums.fraction_bits
        room = self.private.privacy.clip * (1 - 2.0**-40) - math.sqrt(size) * grid / 2
        length = self._sums.length(terms)
        self._sums.include(terms, min(1.0, max(0.0, room) / length) if length else 1.0)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """What any client's plan trains; see :attr:`Sums.trained`."""
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
        """``epsilon``: what all rounds up to this one cost."""
        return {"epsilon": self.private.privacy.epsilon(self.private.round)}

    def apply(self) -> dict[str, Tensor]:
        """Return the new global weights; what no plan trains is the old tensor's bits."""
        sums, private = self._sums, self.private
        deviation = private.privacy.noise * private.privacy.clip * 2.0**sums.fraction_bits
        # Of the same sums it is the same noise, for a round that is run again; of others another.
        noise = Noise(private.key, "noise", private.round, sums.digest())
        for name in self.trained:
            p = self.arch.by_name[name]
            counts = {h: max(1.0, n) for h, n in private.trainers.of_parameter(p).items()}
            for total in sums.divide_by(p, counts):
                # Whole numbers, as the sums are: no bit of a float tells what it was added to.
                drawn = np.rint(deviation * noise.normal(total.size))
                total += drawn.astype(np.int64).reshape(total.shape)
        return sums.apply()
