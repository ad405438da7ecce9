"""Aggregation of partial updates, slice by slice.

A slice s is trained by the clients C_s. n_cs is the number of examples on which client c ran s
FULL, times the weight of an example; g_c is the client's step. Weight and step are 1 unless a
strategy says otherwise.

    theta_s <- theta_s + sum_{c in C_s} n_cs g_c (theta_cs - theta_s) / sum_{c in C_s} n_cs

and theta_s keeps its bits when C_s is empty. With everyone FULL this is FedAvg (McMahan et al.
2017). Sums are 64-bit fixed point, so that they do not depend on the order of replies.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.fixed_point import accumulate, accumulate_quantized, outside, squares
from d2ft_fl.aggregation.grid import SUM_BITS, fraction_bits
from d2ft_fl.aggregation.update import Update, validate
from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.errors import Divergence, ReplyError
from d2ft_fl.subnets.architecture import Architecture, Parameter
from d2ft_fl.wire.quantization import SCALE_BYTES, dequantize_rows, is_quantized

MOST_STEP = 2.0  # of an update: int64 has one bit more than SUM_BITS and the sign


@dataclass(frozen=True)
class Term:
    """What one update adds to the sum of a parameter.

    Attributes:
        parameter: The parameter.
        counts: How many examples trained it; see :meth:`Update.weights`.
        tensor: Its new value, packed; or its quantized change.
        bits: In which a number of ``tensor`` travelled, where it is quantized.
    """

    parameter: Parameter
    counts: dict[int, int]
    tensor: Tensor
    bits: int = PLAIN_BITS

    @property
    def quantized(self) -> bool:
        """Whether ``tensor`` is a quantized change."""
        return is_quantized(self.parameter, self.bits)

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        numbers = self.tensor
        if self.quantized:
            numbers = dequantize_rows(numbers, self.parameter.row_width, self.bits)
        return bool(numbers.isfinite().all())


@lru_cache(maxsize=4096)
def _runs(counts: tuple[tuple[int, float], ...]) -> tuple[tuple[float, int, int], ...]:
    """Return runs of neighbouring heads that count alike: what they count, first and last head.

    Args:
        counts: Heads, ascending, and what each counts.
    """
    grouped = groupby(enumerate(counts), key=lambda item: (item[1][1], item[1][0] - item[0]))
    runs = ((count, [head for _, (head, _) in run]) for (count, _), run in grouped)
    return tuple((count, heads[0], heads[-1]) for count, heads in runs)


@dataclass(frozen=True)
class _Running:
    """The running sum of one parameter. Of a sliced one, rows lie head by head.

    Attributes:
        old: Its value before the round.
        total: Change times examples, in fixed point: int64.
        starts: Head -> its first row; one more entry for the end.
        counts: Head (-1 for a whole parameter) -> what the total is divided by: examples, unless
            :meth:`Sums.divide_by` says otherwise.
    """

    old: np.ndarray
    total: np.ndarray
    starts: tuple[int, ...]
    counts: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, p: Parameter, weight: Tensor) -> "_Running":
        """Return the running sum of a parameter before anything is added."""
        heads = range(len(p.rows))
        old = (p.pack(weight, heads) if heads else weight).detach().contiguous().numpy()
        return cls(old, np.zeros(old.shape, dtype=np.int64), p.starts)

    def stretches(self, counts: Mapping[int, float]) -> Iterator[tuple[float, slice, slice]]:
        """Yield stretches of rows that count alike, in ascending order.

        Neighbouring heads with equal counts come together.

        Args:
            counts: Head (-1 for a whole parameter) -> examples.

        Yields:
            Examples, rows of this sum, and rows of a tensor that has only the heads of ``counts``.
        """
        if -1 in counts:
            yield counts[-1], slice(0, len(self.old)), slice(0, len(self.old))
            return
        taken = 0
        for count, first, last in _runs(tuple(counts.items())):
            rows = slice(self.starts[first], self.starts[last + 1])
            size = rows.stop - rows.start
            yield count, rows, slice(taken, taken + size)
            taken += size


@dataclass
class Sums:
    """Running sums of a round. ``add`` commutes; ``apply`` divides once, at the end.

    Attributes:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        examples: Examples that all updates together can count. The more there are, the fewer bits
            are left for fractions.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    examples: int
    _sums: dict[str, _Running] = field(default_factory=dict)
    _subnets_trained: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._subnets_trained = np.zeros((self.arch.blocks, self.arch.heads), dtype=bool)

    @property
    def subnets_trained(self) -> np.ndarray:
        """Subnets that some update trained: bool [blocks, heads]."""
        return self._subnets_trained

    @property
    def figures(self) -> Mapping[str, float | None]:
        """No figures: sums are exact."""
        return {}

    @property
    def fraction_bits(self) -> int:
        """How many bits of the sums are fractions."""
        return fraction_bits(self.examples)

    @property
    def _most(self) -> float:
        """What a change that can be summed is smaller than."""
        return 2.0 ** (SUM_BITS - self.fraction_bits) / max(1, self.examples)

    def add(self, update: Update) -> None:
        """Validate one update and add it; nothing is added when anything is wrong.

        Args:
            update: What a client sent.

        Raises:
            ReplyError: See :meth:`terms`.
        """
        validate(self.arch, self.weights, update)
        terms = list(self._terms(update, update.sent, update.bits))
        for number, term in enumerate(terms, 1):
            if self._accumulate(term, update.step):
                for added in terms[:number]:  # sums are whole numbers: taking off is exact
                    self._accumulate(added, -update.step)
                raise self._wrong(term)
        self._count(update, terms)

    def terms(self, update: Update) -> "list[Term]":
        """Validate one update and return its terms, for :meth:`include`; nothing is added.

        Args:
            update: What a client sent.

        Raises:
            ReplyError: See :func:`validate`; also when values are not finite, or a change is too
                large to be summed.
        """
        validate(self.arch, self.weights, update)
        terms = list(self._terms(update, update.tensors))
        for term in terms:
            running, new = self._running(term.parameter), term.tensor.numpy()
            for _, rows, packed_rows in running.stretches(term.counts):
                if outside(running.old[rows].ravel(), new[packed_rows].ravel(), self._most):
                    raise self._wrong(term)
        return terms

    def _terms(
        self, update: Update, tensors: Mapping[str, Tensor], bits: int = PLAIN_BITS
    ) -> "Iterator[Term]":
        """Yield the terms of an update, from its tensors in full numbers or as they travelled."""
        for name, tensor in tensors.items():
            p = self.arch.by_name[name]
            yield Term(p, update.weights(p), tensor.detach().contiguous(), bits)

    @staticmethod
    def _wrong(term: "Term") -> ReplyError:
        """Return the error of a term that cannot be summed."""
        if not term.is_finite():
            return Divergence(f"{term.parameter.name!r} holds values that are not finite")
        return Divergence(f"{term.parameter.name!r} changes by more than can be summed")

    def length(self, terms: "list[Term]") -> float:
        """Return how long the whole change of an update is (L2).

        Args:
            terms: What :meth:`terms` returned of the update.
        """
        total = 0.0
        for term in terms:
            running, new = self._running(term.parameter), term.tensor.numpy()
            for _, rows, packed_rows in running.stretches(term.counts):
                total += squares(running.old[rows].ravel(), new[packed_rows].ravel())
        return math.sqrt(total)

    def include(self, update: Update, terms: "list[Term]", factor: float = 1.0) -> None:
        """Add an update by its validated terms.

        Args:
            update: What a client sent.
            terms: What :meth:`terms` returned of it.
            factor: What each change is multiplied by.
        """
        for term in terms:
            self._accumulate(term, factor)
        self._count(update, terms)

    def _accumulate(self, term: "Term", factor: float) -> int:
        """Add a term times ``factor``; return how many elements are left out: too large to sum."""
        running, new = self._running(term.parameter), term.tensor.numpy()
        one, most, wrong = factor * 2.0**self.fraction_bits, self._most, 0
        if term.quantized:
            sizes = new[:, :SCALE_BYTES].copy().view(np.float32)[:, 0]  # [rows]
            for count, rows, packed in running.stretches(term.counts):
                into = running.total[rows], running.old[rows]
                change = new[packed], sizes[packed], term.bits
                wrong += accumulate_quantized(*into, *change, count * one, most)
            return wrong
        for count, rows, packed in running.stretches(term.counts):
            total, old = running.total[rows].ravel(), running.old[rows].ravel()
            wrong += accumulate(total, old, new[packed].ravel(), count * one, most)
        return wrong

    def _count(self, update: Update, terms: "Iterable[Term]") -> None:
        """Note an update that was added: its subnets, and the examples that sums are divided by."""
        self._subnets_trained |= update.schedule.trained
        for term in terms:
            counts = self._running(term.parameter).counts
            for head, count in term.counts.items():
                counts[head] = counts.get(head, 0) + count

    def _running(self, p: Parameter) -> _Running:
        """Return the running sum of a parameter, begun when first asked for."""
        if p.name not in self._sums:
            self._sums[p.name] = _Running.of(p, self.weights[p.name])
        return self._sums[p.name]

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Parameters of which somebody trained anything, on one example at least.

        Returns:
            Name -> the heads in ascending order, none for a whole parameter.
        """
        counted = {
            name: [head for head, n in running.counts.items() if n]
            for name, running in self._sums.items()
        }
        return {
            name: tuple(sorted(h for h in heads if h >= 0))
            for name, heads in counted.items()
            if heads
        }

    def divide_by(self, p: Parameter, counts: Mapping[int, float]) -> list[np.ndarray]:
        """Have :meth:`apply` divide by other counts than the examples that were added.

        Args:
            p: The parameter.
            counts: Head (-1 for a whole parameter) -> what its sum is divided by.

        Returns:
            The sums of the heads in ``counts``, which may be changed in place: int64 with
            :attr:`fraction_bits`.
        """
        running = self._running(p)
        running.counts.clear()
        running.counts.update(counts)
        return [running.total[rows] for _, rows, _ in running.stretches(running.counts)]

    def apply(self) -> dict[str, Tensor]:
        """Return the new global weights; what nobody trained keeps its bits."""
        new = dict(self.weights)
        for name, heads in self.trained.items():
            p, before, running = self.arch.by_name[name], self.weights[name], self._sums[name]
            moved = running.old.copy()
            counts = {h: running.counts[h] for h in heads or (-1,)}
            for count, rows, _ in running.stretches(counts):
                step = running.total[rows] / 2.0**self.fraction_bits / count
                moved[rows] = running.old[rows].astype(np.float64) + step
            packed = torch.from_numpy(moved)
            if heads:
                new[name] = before.clone()
                p.unpack_(new[name], packed, range(len(p.rows)))
            else:
                new[name] = packed.view(before.shape)
        return new
