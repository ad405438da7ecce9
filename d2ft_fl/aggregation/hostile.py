"""What hostile clients send, for experiments: the server makes it of what all clients trained.

Clients that attack train honestly, and the server, which simulates them, puts another change of
each slice in place of theirs before it aggregates. With the changes d_1 .. d_h of the honest who
trained a slice, their mean mu and standard deviation sigma (coordinate by coordinate), m hostile
among n trainers, d the attacker's own change and s = ``hostile-scale``:

    sign-flip      s d
    gaussian       normal noise of s times the root mean square of d
                   (Blanchard et al., NeurIPS 2017, arXiv 1703.02757)
    inner-product  s mu (Xie et al., UAI 2019, arXiv 1903.03936)
    alie           mu - z sigma, z = Phi^-1((n - m - k) / (n - m)), k = floor(n / 2) + 1 - m
                   (Baruch et al., NeurIPS 2019, arXiv 1902.06156, algorithm 3)
    min-max        mu - gamma sigma, with the largest gamma for which it lies no farther from any
                   honest change than two of these lie apart
                   (Shejwalkar and Houmansadr, NDSS 2021, equation 7)

The last three know what honest clients send. ``label-flip`` is no change of what is sent: such a
client trains on label L - 1 - y for y (Fang et al., USENIX Security 2020, arXiv 1911.11815).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.update import Update
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter

LABEL_FLIP = "label-flip"
KNOWING = ("inner-product", "alie", "min-max")  # attacks that know what honest clients send
Slice = tuple[str, int]  # a parameter, and the head of it; -1 for a whole one


@dataclass
class Attack:
    """The hostile clients of one round.

    Attributes:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        kind: One of :data:`~d2ft_fl.config.choices.ATTACKS`.
        scale: Of the attacks that have one.
        seed: Of random draws.
    """

    arch: Architecture
    weights: Mapping[str, Tensor]
    kind: str
    scale: float
    seed: Sequence[int]
    _honest: dict[Slice, dict[int, Tensor]] = field(default_factory=dict)
    _hostile: dict[Slice, int] = field(default_factory=dict)  # trainers that attack

    def see(self, client: int, update: Update) -> None:
        """Note what an honest client sent, for attacks that know it.

        Args:
            client: Who sent it.
            update: Valid.
        """
        if self.kind in KNOWING:
            for part, change in self._changes(update):
                self._honest.setdefault(part, {})[client] = change

    def join(self, update: Update) -> None:
        """Count a hostile client among the trainers of what it trained."""
        for part, _ in self._changes(update):
            self._hostile[part] = self._hostile.get(part, 0) + 1

    def send(self, client: int, update: Update) -> Update:
        """Return what a hostile client sends.

        Args:
            client: Who attacks.
            update: What it trained; every hostile one has joined, every honest one was seen.
        """
        draw = np.random.default_rng([*self.seed, client, 5])
        sent: dict[str, list[Tensor]] = {}
        for part, change in self._changes(update):
            made = self._made(part, change, draw)
            sent.setdefault(part[0], []).append(self._old(part) + made)
        dtype = {name: tensor.dtype for name, tensor in update.tensors.items()}
        return update.holding({n: torch.cat(parts).to(dtype[n]) for n, parts in sent.items()})

    def _made(self, part: Slice, own: Tensor, draw: np.random.Generator) -> Tensor:
        """Return the change of a slice that an attacker sends: float64 [rows, ...]."""
        if self.kind == "sign-flip":
            return self.scale * own
        if self.kind == "gaussian":
            noise = torch.from_numpy(draw.standard_normal(tuple(own.shape)))
            return self.scale * own.square().mean().sqrt() * noise
        honest = self._honest.get(part)
        if not honest:  # nobody to hide among
            return own
        changes = torch.stack([honest[client] for client in sorted(honest)])
        mean = changes.mean(dim=0)
        if self.kind == "inner-product":
            return self.scale * mean
        deviation = changes.std(dim=0, correction=0)
        if self.kind == "alie":
            return mean - alie_factor(len(changes), self._hostile[part]) * deviation
        return mean - min_max_factor(changes, mean, deviation) * deviation

    def _changes(self, update: Update) -> Iterator[tuple[Slice, Tensor]]:
        """Yield each slice that an update trained, and its change: float64 [rows, ...]."""
        for name, tensor in update.tensors.items():
            p = self.arch.by_name[name]
            first = 0
            for head in update.weights(p):
                rows = _rows(p, head, tensor)
                part = name, head
                yield part, tensor[first : first + rows].double() - self._old(part)
                first += rows

    def _old(self, part: Slice) -> Tensor:
        """Return the value of a slice before the round: float64 [rows, ...]."""
        name, head = part
        p, old = self.arch.by_name[name], self.weights[name]
        return (p.pack(old, [head]) if p.kind is Kind.SLICED else old).double()


def _rows(p: Parameter, head: int, tensor: Tensor) -> int:
    """Return how many rows a slice has in a packed tensor."""
    return len(p.rows[head]) if p.kind is Kind.SLICED else len(tensor)


def alie_factor(honest: int, hostile: int) -> float:
    """Return how many deviations from the mean still look like a part of the majority.

    Args:
        honest: Clients that trained a slice and are honest.
        hostile: Those that attack.
    """
    supporters = (honest + hostile) // 2 + 1 - hostile
    share = (honest - supporters) / honest
    return NormalDist().inv_cdf(share) if 0 < share < 1 else 0.0


def min_max_factor(changes: Tensor, mean: Tensor, direction: Tensor) -> float:
    """Return the largest gamma for which mean - gamma direction stays among honest changes.

    That is, no farther from any of them than the two that lie farthest apart.

    Args:
        changes: Of honest clients: float64 [clients, ...].
        mean: Their mean.
        direction: Where to go.
    """
    flat, way = (mean - changes).flatten(1), direction.flatten()
    widest, length = torch.cdist(flat, flat).max().square(), way.square().sum()
    if not length:
        return 0.0
    # |flat_i - gamma way|^2 <= widest, a quadratic in gamma for each client
    half, rest = flat @ way, widest - flat.square().sum(dim=1)
    return float(((half + (half.square() + length * rest).clamp(min=0).sqrt()) / length).min())
