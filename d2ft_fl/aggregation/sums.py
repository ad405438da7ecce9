"""Folding partial updates in, slice by slice.

For a slice s trained by clients C_s, n_cs the examples on which client c ran s FULL, times what
each counts, and g_c its step, both 1 unless a strategy says otherwise,

    theta_s <- theta_s + sum_{c in C_s} n_cs g_c (theta_cs - theta_s) / sum_{c in C_s} n_cs

and theta_s keeps its bits when C_s is empty. With everyone FULL this is FedAvg (McMahan et al.
2017). Sums are 64-bit fixed point, so that they do not depend on the order of replies.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.fixed_point import accumulate, outside, squares
from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import up_spec
from d2ft_fl.subnets.schedule import Schedule

SUM_BITS = 62  # what a sum may hold
FRACTION_BITS = 36  # at most, of these: it resolves 1.5e-11
CHANGE_BITS = 6  # at least: any change up to 64 can be summed, whatever examples there are
MOST_STEP = 2.0  # of an update: int64 has a bit more than a sum may hold


@dataclass(frozen=True)
class Update:
    """One client's contribution to a round.

    Attributes:
        schedule: What it was assigned.
        slot_examples: Examples it ran in each slot, times what each counts.
        tensors: Trained slices, packed, and whole shared and final parameters (``up_spec``).
        step: What its change is multiplied by in :class:`Sums`, up to :data:`MOST_STEP`; other
            sums do without.
    """

    schedule: Schedule
    slot_examples: list[int]
    tensors: dict[str, Tensor]
    step: float = 1.0

    def weights(self, p: Parameter) -> dict[int, int]:
        """Head -> examples for a sliced parameter; ``{-1: examples}`` for a whole one."""
        if p.kind is Kind.SLICED:
            return self._of_heads[p.block]
        if p.kind is Kind.SHARED:
            return self._of_blocks[p.block]
        return {-1: int(np.array(self.slot_examples)[self.schedule.active].sum())}

    @cached_property
    def _of_heads(self) -> list[dict[int, int]]:
        schedule = self.schedule
        examples = schedule.examples_trained(self.slot_examples)
        heads = [schedule.heads(schedule.trained, block) for block in range(len(examples))]
        return [{h: int(row[h]) for h in own} for row, own in zip(examples, heads, strict=True)]

    @cached_property
    def _of_blocks(self) -> list[dict[int, int]]:
        examples = self.schedule.block_examples_trained(self.slot_examples)
        return [{-1: int(count)} for count in examples]


def validate(arch: Architecture, weights: Mapping[str, Tensor], update: Update) -> None:
    """Check a reply against its assignment: keys, shapes and types.

    Raises:
        ReplyError: With the first thing that is wrong.
    """
    spec = up_spec(arch, update.schedule)
    if missing := sorted(spec.keys() - update.tensors.keys()):
        raise ReplyError(f"{missing[0]!r} is missing")
    if extra := sorted(update.tensors.keys() - spec.keys()):
        raise ReplyError(f"{extra[0]!r} was not assigned")
    for name, shape in spec.items():
        tensor = update.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ReplyError(f"{name!r} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != weights[name].dtype:
            raise ReplyError(f"{name!r} is {tensor.dtype}, not {weights[name].dtype}")


@dataclass(frozen=True)
class Term:
    """What one update adds to the sum of a parameter.

    Attributes:
        parameter, counts: See :meth:`Update.weights`.
        tensor: Its new value, packed.
    """

    parameter: Parameter
    counts: dict[int, int]
    tensor: Tensor


@dataclass(frozen=True)
class _Running:
    """The running sum of one parameter. Of a sliced one, rows lie head by head.

    Attributes:
        old: Its value before the round. total: Change times examples, in fixed point: int64.
        starts: Head -> its first row; one more entry for the end.
        counts: Head (-1 of a whole one) -> examples, or what else is divided by.
    """

    old: np.ndarray
    total: np.ndarray
    starts: tuple[int, ...]
    counts: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, p: Parameter, weight: Tensor) -> "_Running":
        """Nothing added yet."""
        heads = range(len(p.rows))
        old = (p.pack(weight, heads) if heads else weight).detach().contiguous().numpy()
        return cls(old, np.zeros(old.shape, dtype=np.int64), p.starts)

    def stretches(self, counts: Mapping[int, float]) -> Iterator[tuple[float, slice, slice]]:
        """Examples, rows here, and rows of a tensor that holds only these heads, ascending.

        Neighbours that count alike come together.
        """
        if -1 in counts:
            yield counts[-1], slice(0, len(self.old)), slice(0, len(self.old))
            return
        taken = 0
        for (count, _), run in groupby(
            enumerate(counts.items()), key=lambda item: (item[1][1], item[1][0] - item[0])
        ):
            heads = [head for _, (head, _) in run]
            here = slice(self.starts[heads[0]], self.starts[heads[-1] + 1])
            size = here.stop - here.start
            yield count, here, slice(taken, taken + size)
            taken += size


@dataclass
class Sums:
    """Running sums of a round. ``add`` commutes; ``apply`` divides once, at the end.

    Attributes:
        arch, weights: The model, and its values before the round.
        examples: Examples that all updates together can count. The more, the coarser a sum is, and
            the less does one example weigh in it.
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
        return min(FRACTION_BITS, SUM_BITS - CHANGE_BITS - max(1, self.examples).bit_length())

    @property
    def _most(self) -> float:
        """The largest change that can be summed."""
        return 2.0 ** (SUM_BITS - self.fraction_bits) / max(1, self.examples)

    def add(self, update: Update) -> None:
        """Validate one update and add it; nothing is added when anything is wrong.

        Raises:
            ReplyError: See :meth:`terms`.
        """
        validate(self.arch, self.weights, update)
        terms = list(self._terms(update))
        for number, term in enumerate(terms, 1):
            if self._accumulate(term, update.step):
                for added in terms[:number]:  # whole numbers: what was there before is there again
                    self._accumulate(added, -update.step)
                raise self._wrong(term)
        self._count(terms)
        self._subnets_trained |= update.schedule.trained

    def terms(self, update: Update) -> "list[Term]":
        """Validate one update, for :meth:`include`; adds nothing.

        Raises:
            ReplyError: See :func:`validate`; also when values are not finite, or a change is too
                large to be summed.
        """
        validate(self.arch, self.weights, update)
        terms = list(self._terms(update))
        for term in terms:
            own, new = self._running(term.parameter), term.tensor.numpy()
            for _, here, there in own.stretches(term.counts):
                if outside(own.old[here].ravel(), new[there].ravel(), self._most):
                    raise self._wrong(term)
        return terms

    def _terms(self, update: Update) -> "Iterator[Term]":
        for name, tensor in update.tensors.items():
            p = self.arch.by_name[name]
            yield Term(p, update.weights(p), tensor.detach().contiguous())

    @staticmethod
    def _wrong(term: "Term") -> ReplyError:
        """Return what is wrong with a term that cannot be summed."""
        if not bool(term.tensor.isfinite().all()):
            return ReplyError(f"{term.parameter.name!r} holds values that are not finite")
        return ReplyError(f"{term.parameter.name!r} changes by more than can be summed")

    def length(self, terms: "list[Term]") -> float:
        """How long a whole change is (L2)."""
        total = 0.0
        for term in terms:
            own, new = self._running(term.parameter), term.tensor.numpy()
            for _, here, there in own.stretches(term.counts):
                total += squares(own.old[here].ravel(), new[there].ravel())
        return math.sqrt(total)

    def include(self, terms: "list[Term]", factor: float = 1.0) -> None:
        """Add what :meth:`terms` returned, each change times ``factor``."""
        for term in terms:
            self._accumulate(term, factor)
        self._count(terms)

    def _accumulate(self, term: "Term", factor: float) -> int:
        """Add a term times ``factor``; how many of its elements cannot be, and are not."""
        own, new = self._running(term.parameter), term.tensor.numpy()
        wrong = 0
        for count, here, there in own.stretches(term.counts):
            scale = factor * count * 2.0**self.fraction_bits
            total, old = own.total[here].ravel(), own.old[here].ravel()
            wrong += accumulate(total, old, new[there].ravel(), scale, self._most)
        return wrong

    def _count(self, terms: "Iterable[Term]") -> None:
        for term in terms:
            counts = self._running(term.parameter).counts
            for head, count in term.counts.items():
                counts[head] = counts.get(head, 0) + count

    def _running(self, p: Parameter) -> _Running:
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
            name: [head for head, n in own.counts.items() if n] for name, own in self._sums.items()
        }
        return {
            name: tuple(sorted(h for h in heads if h >= 0))
            for name, heads in counted.items()
            if heads
        }

    def digest(self) -> str:
        """Return a name for what was added."""
        total = hashlib.blake2b(digest_size=16)
        for name in sorted(self._sums):
            total.update(name.encode())
            total.update(self._sums[name].total.data)
        return total.hexdigest()

    def divide_by(self, p: Parameter, counts: Mapping[int, float]) -> list[np.ndarray]:
        """Have :meth:`apply` divide by these counts, and not by the examples that were added.

        Returns:
            The sums that they concern, int64 with :attr:`fraction_bits`, to be changed in place.
        """
        own = self._running(p)
        own.counts.clear()
        own.counts.update(counts)
        return [own.total[here] for _, here, _ in own.stretches(own.counts)]

    def apply(self) -> dict[str, Tensor]:
        """Return the new global weights; what nobody trained is the old tensor's bits."""
        new = dict(self.weights)
        for name, heads in self.trained.items():
            p, before, own = self.arch.by_name[name], self.weights[name], self._sums[name]
            moved = own.old.copy()
            counts = {h: own.counts[h] for h in heads or (-1,)}
            for count, here, _ in own.stretches(counts):
                step = own.total[here] / 2.0**self.fraction_bits / count
                moved[here] = own.old[here].astype(np.float64) + step
            rows = torch.from_numpy(moved)
            if heads:
                new[name] = before.clone()
                p.unpack_(new[name], rows, range(len(p.rows)))
            else:
                new[name] = rows.view(before.shape)
        return new
