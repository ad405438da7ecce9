"""Private aggregation: sums of updates to which noise is added before anybody sees them.

:mod:`d2ft_fl.aggregation.privacy` defines the sums and says what they promise.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from d2ft_fl.aggregation.keyed_noise import Noise
from d2ft_fl.aggregation.privacy import Privacy, fits_sums
from d2ft_fl.aggregation.releases import Releases
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update
from d2ft_fl.errors import RunError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Schedule


@dataclass(frozen=True)
class Trainers:
    """How many clients train each part of the model, in expectation over who is drawn.

    Attributes:
        heads: How many train each subnet: float64 [blocks, heads].
        blocks: How many train any subnet of each block: float64 [blocks].
        some: How many train anything.
        clients: How many could, drawn or not.
    """

    heads: np.ndarray
    blocks: np.ndarray
    some: float
    clients: int

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
        return cls(heads * rate, blocks * rate, len(working) * rate, len(working))

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
        releases: What was released before, and what the run promises.
        key: The key of the run's noise.
        round: The round, counted from 1.
        trainers: How many clients train what, by all clients' plans.
    """

    releases: Releases
    key: bytes
    round: int
    trainers: Trainers

    @property
    def privacy(self) -> Privacy:
        """What the run promises."""
        return self.releases.privacy


@dataclass
class PrivateSums:
    """Running sums of a round with noise: an :class:`~d2ft_fl.aggregation.aggregator.Aggregator`.

    Attributes:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        private: What makes the sums private.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    private: PrivateRound
    _sums: Sums = field(init=False)

    def __post_init__(self) -> None:
        # Clients count alike. The grid is that of all who may train: it tells not who was drawn.
        self._sums = Sums(self.arch, self.weights, self.private.trainers.clients)

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
        room, length = max(0.0, room), self._sums.length(terms)
        self._sums.include(update, terms, room / length if length > room else 1.0)

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
        """The figure ``epsilon``: the privacy that all that was released up to here costs."""
        return {"epsilon": self.private.releases.epsilon}

    def apply(self) -> dict[str, Tensor]:
        """Return the new global weights, released; what no plan trains keeps its bits.

        Raises:
            RunError: When noise would leave the integers of the sums, or the release would cost
                more than was promised.
        """
        private, bits = self.private, self._sums.fraction_bits
        noise, clip = private.privacy.noise, private.privacy.clip
        if not fits_sums(noise, clip, bits):
            raise RunError(
                f"noise-multiplier = {noise:.3g} times clip-norm = {clip:.3g} leaves the integers "
                f"of sums with {bits} bits of fractions: lower clip-norm"
            )
        deviation = noise * clip * 2.0**bits
        counts = {
            name: {h: max(1.0, n) for h, n in self._counts(name).items()} for name in self.trained
        }
        totals = [
            total
            for name, own in counts.items()
            for total in self._sums.divide_by(self.arch.by_name[name], own)
        ]
        release = self._name(totals, deviation, counts)
        private.releases.note(private.round, release)
        # Equal sums get equal noise, for a round that is run again; different sums get other noise.
        stream = Noise(private.key, "noise", private.round, release)
        for total in totals:
            # Noise is whole numbers, as the sums are: bits of floats could reveal the sum.
            drawn = np.rint(deviation * stream.normal(total.size))
            total += drawn.astype(np.int64).reshape(total.shape)
        return self._sums.apply()

    def _counts(self, name: str) -> dict[int, float]:
        """Return how many clients train a parameter, as :meth:`Trainers.of_parameter`."""
        return self.private.trainers.of_parameter(self.arch.by_name[name])

    def _name(
        self, totals: Sequence[np.ndarray], deviation: float, counts: Mapping[str, object]
    ) -> str:
        """Return a hash of everything that a release is made of, which nobody can make or check
        without the key.

        Args:
            totals: The sums before noise.
            deviation: The standard deviation of the noise, on their grid.
            counts: What each is divided by, by name of its parameter.
        """
        hashed = hashlib.blake2b(key=self.private.key, digest_size=16)
        made_of = self._sums.fraction_bits, deviation, counts, [t.shape for t in totals]
        hashed.update(repr(made_of).encode())
        for total in totals:
            hashed.update(np.ascontiguousarray(total).data)
        return hashed.hexdigest()
