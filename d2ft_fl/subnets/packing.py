"""Which slices travel for a schedule, cut out of a model and laid out for clients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Schedule

# Makes the rows of some heads of a parameter, in this order: nobody else's.
Take = Callable[[Parameter, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Arrived:
    """Slices as they came: packed, heads ascending."""

    tensors: Mapping[str, Tensor]

    def take(self, p: Parameter, heads: tuple[int, ...]) -> Tensor:
        """Return the rows of some of the heads that came, in the order asked for."""
        arrived = tuple(sorted(heads))
        return rows_of(self.tensors[p.name], row_ranges(p, arrived), heads, arrived)


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """A whole model laid out for clients to take their slices from.

    Attributes:
        tensors: By name; of sliced parameters the rows of all heads, ascending.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, arch: Architecture, weights: Mapping[str, Tensor]) -> "GlobalModel":
        """Lay out weights as a state dict has them."""
        return cls(
            {
                p.name: p.pack(weights[p.name], range(arch.heads))
                if p.kind is Kind.SLICED
                else weights[p.name]
                for p in arch.parameters
            }
        )

    def take(self, p: Parameter, heads: tuple[int, ...]) -> Tensor:
        """Return a copy of the rows of some heads."""
        parts = list(self.parts(p, heads))
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def parts(self, p: Parameter, heads: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield views of the rows of some heads, those of neighbours together."""
        whole = self.tensors[p.name]
        for _, run in groupby(enumerate(heads), key=lambda pair: pair[1] - pair[0]):
            neighbours = [head for _, head in run]
            yield whole[p.starts[neighbours[0]] : p.starts[neighbours[-1] + 1]]


def row_ranges(spec: Parameter, order: Sequence[int]) -> dict[int, range]:
    """Return where rows lie when heads are stored in ``order``: head -> range of rows."""
    start, places = 0, {}
    for head in order:
        places[head] = range(start, start + len(spec.rows[head]))
        start = places[head].stop
    return places


def rows_of(
    tensor: Tensor, places: Mapping[int, range], heads: Sequence[int], all_heads: Sequence[int]
) -> Tensor:
    """Return a copy of the rows of ``heads``, out of rows that are stored by ``all_heads``."""
    if tuple(heads) == tuple(all_heads):
        return tensor[: sum(len(places[h]) for h in heads)].clone()
    rows = [row for head in heads for row in places[head]]
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.long, device=tensor.device))


def down_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Return what a client is sent, name -> shape: embedding, final, and what it runs of blocks."""
    return _spec(arch, schedule, schedule.resident, trained=False)


def up_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Return what a client sends back, name -> shape: what it trained of blocks and final part."""
    return _spec(arch, schedule, schedule.trained, trained=True)


def _spec(
    arch: Architecture, schedule: Schedule, what: np.ndarray, trained: bool
) -> dict[str, tuple[int, ...]]:
    spec: dict[str, tuple[int, ...]] = {}
    heads_of = [schedule.heads(what, block) for block in range(len(what))]
    for p in arch.parameters:
        if trained and not p.trains:
            continue
        if p.kind in (Kind.FINAL, Kind.EMBEDDING):
            spec[p.name] = p.shape
        elif p.block >= 0 and (heads := heads_of[p.block]):
            ranks = schedule.trained_ranks(p.block) if trained and p.factor else None
            if ranks is not None:
                spec[p.name] = p.ranked_shape(ranks)
            else:
                spec[p.name] = p.packed_shape(heads) if p.kind is Kind.SLICED else p.shape
    return spec


def carried(
    arch: Architecture, schedule: Schedule, cached: np.ndarray | None = None
) -> Iterator[tuple[Parameter, tuple[int, ...]]]:
    """Yield parameters that come down for a schedule, with the heads of sliced ones, ascending.

    Args:
        arch: Of the model.
        schedule: What the client runs.
        cached: bool [blocks, heads], subnets whose fixed parameters the client has: these, and what
            blocks and the model need with any of their subnets, are left out.
    """
    for name in down_spec(arch, schedule):
        p = arch.by_name[name]
        held = cached if p.fixed else None
        if p.kind is Kind.SLICED:
            wanted = schedule.resident if held is None else schedule.resident & ~held
            if heads := schedule.heads(wanted, p.block):
                yield p, heads
        elif held is None or not (held if p.block < 0 else held[p.block]).any():
            yield p, ()


def pack_for(
    arch: Architecture,
    weights: Mapping[str, Tensor],
    schedule: Schedule,
    cached: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of :func:`carried`, cut out of the global ``weights``."""
    return {
        p.name: p.pack(weights[p.name], heads) if p.kind is Kind.SLICED else weights[p.name]
        for p, heads in carried(arch, schedule, cached)
    }
