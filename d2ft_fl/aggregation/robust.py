"""Robust aggregation: a few hostile or broken clients cannot move its result far.

Of the clients of a round, k may be hostile (``trim-share``, one at least). With the values
x_1 .. x_n that n clients give one coordinate of a slice, sorted,

    trimmed-mean         the mean of x_(k+1) .. x_(n-k)
    median               the middle one, or the mean of the middle two
    mean-around-median   the mean of the n - k that are nearest to the median; of two that are as
                         near, the smaller counts

(the first two of Yin et al., ICML 2018, arXiv 1803.01498, the last of Xie et al., 2018, arXiv
1802.10116). k is of the whole round, and not a share of n: under budgets few clients train a slice,
and those who are hostile may be the larger part of them. So a slice that fewer than 2k + 1 clients
trained keeps its value. Every client counts the same, whatever number of examples it says. Updates
wait in one file on disk, and are mapped, not read, when they are aggregated.

Honest clients of different data differ too, and hostile ones, whose values are cut at one end,
have honest ones cut at the other. Nearest-neighbor mixing (Allouah et al., AISTATS 2023, arXiv
2302.01772) makes them alike before: each client's slice is replaced by the mean of the n - k
slices that are nearest to it, itself included, by Euclidean distance.

Norm clipping (Sun et al., arXiv 1911.07963) comes before any aggregation: a client's whole change
is made shorter where it is longer than ``clip-norm``,

    change <- change min(1, clip-norm / |change|_2)
"""

import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.aggregator import Aggregator
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update, validate
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.util.files import writing
from d2ft_fl.wire import blob

ROBUST = ("trimmed-mean", "median", "mean-around-median")


@dataclass
class RobustSums:
    """One round's updates, kept on disk until :meth:`apply`: an :class:`.Aggregator`.

    Attributes:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        kind: One of :data:`ROBUST`.
        suspects: How many clients of the round may be hostile.
        mixing: Whether each client's slice is first mixed with those nearest to it.
        left: After :meth:`apply`, the share of the trained slices that too few clients trained.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    kind: str
    suspects: int
    mixing: bool = False
    left: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # It has no name: nothing is left of it, however this process ends.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._checks = Sums(self.arch, self.weights, 1)  # which sum nothing
        self._places: list[slice] = []  # of each update in the file
        self._digests: list[bytes] = []  # of each update
        self._trainers: dict[tuple[str, int], list[int]] = {}  # (parameter, head) -> updates
        self._starts: list[dict[str, dict[int, int]]] = []  # of each update: heads' first rows

    def add(self, update: Update) -> None:
        """Validate one update and keep it.

        Args:
            update: What a client sent.

        Raises:
            ReplyError: See :meth:`Sums.terms`.
            RunError: When there is no room for it on disk.
        """
        terms = self._checks.terms(update)
        number = len(self._places)
        starts: dict[str, dict[int, int]] = {}
        self._keep({term.parameter.name: term.tensor for term in terms})
        for term in terms:
            p, first = term.parameter, 0
            starts[p.name] = first_rows = {}
            for head, count in term.counts.items():
                first_rows[head] = first
                first += len(p.rows[head]) if head >= 0 else 0
                if count:
                    self._trainers.setdefault((p.name, head), []).append(number)
        self._starts.append(starts)

    def _keep(self, tensors: dict[str, Tensor]) -> None:
        """Write an update's tensors to the end of the file."""
        start = os.fstat(self._file.fileno()).st_size
        start += -start % blob.LENGTH_BYTES  # as tensors lie in memory
        with writing(Path(tempfile.gettempdir())):
            self._file.seek(start)
            length = blob.append(self._file, tensors, {})
        self._file.seek(start)
        self._digests.append(hashlib.file_digest(self._file, "blake2b").digest())
        self._places.append(slice(start, start + length))

    def _kept(self) -> list[dict[str, Tensor]]:
        """Return the tensors of each update, mapped into memory."""
        if not self._places:
            return []
        content = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY))
        return [blob.decode(content[place])[0] for place in self._places]

    @property
    def _least(self) -> int:
        """How many clients a slice needs, so that honest clients outnumber hostile ones."""
        return 2 * self.suspects + 1

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Parameters of which enough clients trained anything; see :attr:`Sums.trained`."""
        heads_of: dict[str, list[int]] = {}
        for (name, head), updates in self._trainers.items():
            if len(updates) >= self._least:
                heads_of.setdefault(name, []).extend([head] if head >= 0 else [])
        return {name: tuple(sorted(heads)) for name, heads in heads_of.items()}

    @property
    def subnets_trained(self) -> np.ndarray:
        """Subnets of which enough clients trained anything: bool [blocks, heads]."""
        trained = np.zeros((self.arch.blocks, self.arch.heads), dtype=bool)
        for name, heads in self.trained.items():
            if heads:
                trained[self.arch.by_name[name].block, list(heads)] = True
        return trained

    @property
    def figures(self) -> Mapping[str, float | None]:
        """The figure ``too_few_trainers``, which is :attr:`left`."""
        return {"too_few_trainers": self.left}

    def apply(self) -> dict[str, Tensor]:
        """Return the new global weights; what too few clients trained keeps its bits."""
        new = dict(self.weights)
        with_many = 0
        kept = self._kept()
        for (name, head), updates in self._trainers.items():
            if len(updates) < self._least:
                continue
            with_many += 1
            p = self.arch.by_name[name]
            updates = sorted(updates, key=self._digests.__getitem__)  # not by who answered first
            given = torch.stack([_rows(kept[n][name], p, head, self._starts[n]) for n in updates])
            if self.mixing:
                given = mixed(given, self.suspects)
            middle = self._middle(given.sort(dim=0).values).to(self.weights[name].dtype)
            if head < 0:
                new[name] = middle
                continue
            if new[name] is self.weights[name]:
                new[name] = self.weights[name].clone()
            p.unpack_(new[name], middle, [head])
        if self._trainers:
            self.left = 1 - with_many / len(self._trainers)
        self._file.close()
        return new

    def _middle(self, ordered: Tensor) -> Tensor:
        """Return the robust mean of one slice.

        Args:
            ordered: What clients give each coordinate, ascending: float64 [clients, ...].
        """
        count = len(ordered)
        if self.kind == "trimmed-mean":
            return ordered[self.suspects : count - self.suspects].mean(dim=0)
        median = ordered[(count - 1) // 2 : count // 2 + 1].mean(dim=0)
        if self.kind == "median":
            return median
        nearest = (ordered - median).abs().argsort(dim=0, stable=True)
        return ordered.gather(0, nearest[: count - self.suspects]).mean(dim=0)


def mixed(values: Tensor, suspects: int) -> Tensor:
    """Mix what clients give one slice, each with its nearest neighbours.

    Args:
        values: What clients give the slice: float64 [clients, ...].
        suspects: How many of the clients may be hostile.

    Returns:
        For each client the mean of all but the ``suspects`` values farthest from its own: float64
        [clients, ...].
    """
    flat = values.flatten(1)
    flat = flat - flat.median(dim=0).values  # without what all have in common, distances are exact
    near = torch.cdist(flat, flat).argsort(dim=1, stable=True)[:, : len(flat) - suspects]
    return torch.stack([values[nearest.sort().values].mean(dim=0) for nearest in near])


def _rows(
    tensor: Tensor, p: Parameter, head: int, starts: Mapping[str, Mapping[int, int]]
) -> Tensor:
    """Return a client's value of a slice, cut out of what it sent: float64 [rows, ...]."""
    if head < 0:
        return tensor.double()
    start = starts[p.name][head]
    return tensor[start : start + len(p.rows[head])].double()


def clipped(
    arch: Architecture, weights: Mapping[str, Tensor], update: Update, norm: float
) -> Update:
    """Return an update with its change shortened to ``norm``, or itself where it is no longer.

    Args:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        update: A valid update.
        norm: The longest that the whole change may be (L2).
    """
    old = dict(_old(arch, weights, update))
    changes = {name: tensor.double() - old[name] for name, tensor in update.tensors.items()}
    length = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    if length <= norm:
        return update
    tensors = {
        name: (old[name] + change * (norm / length)).to(update.tensors[name].dtype)
        for name, change in changes.items()
    }
    return update.holding(tensors)


def _old(
    arch: Architecture, weights: Mapping[str, Tensor], update: Update
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and old values of what an update changes, packed like the update: float64."""
    for name in update.tensors:
        p, old = arch.by_name[name], weights[name]
        yield name, (p.pack(old, update.weights(p)) if p.kind is Kind.SLICED else old).double()


@dataclass
class ClippedUpdates:
    """Clips each update's change, and hands it to another aggregator.

    Attributes:
        inner: What aggregates the clipped updates.
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        norm: The longest that a client's whole change may be (L2).
    """

    inner: Aggregator
    arch: Architecture
    weights: dict[str, Tensor]
    norm: float

    def add(self, update: Update) -> None:
        """Validate one update, clip it and aggregate it.

        Args:
            update: What a client sent.

        Raises:
            ReplyError: With the first thing that is wrong.
        """
        validate(self.arch, self.weights, update)
        self.inner.add(clipped(self.arch, self.weights, update, self.norm))

    def apply(self) -> dict[str, Tensor]:
        """Return the next global state, by name."""
        return self.inner.apply()

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Parameters that the server's optimiser steps; see :class:`.Aggregator`."""
        return self.inner.trained

    @property
    def subnets_trained(self) -> np.ndarray:
        """Subnets that count as trained: bool [blocks, heads]."""
        return self.inner.subnets_trained

    @property
    def figures(self) -> Mapping[str, float | None]:
        """Figures of the other aggregator."""
        return self.inner.figures
