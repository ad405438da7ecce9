"""The server's step, slice by slice: what clients made of a slice is a gradient to the server.

With ``d`` the head-wise mean change of a slice in a round (:mod:`d2ft_fl.aggregation.sums`) and x
its value, a slice that somebody trained steps by

    mean       x <- x + d
    fedavgm    m <- beta_1 m + d                    x <- x + lr m     (Hsu et al., arXiv 1909.06335)
    fedadam    m <- beta_1 m + (1 - beta_1) d
               v <- beta_2 v + (1 - beta_2) d^2                        (Reddi et al., ICLR 2021,
               x <- x + lr m / (sqrt(v) + tau)                          arXiv 2003.00295, alg. 2)
    fedyogi    as fedadam, with  v <- v - (1 - beta_2) d^2 sign(v - d^2)

m and v begin at zero (the paper lets v begin at tau^2 or more) and are the slice's own: where
nobody trained, x, m and v keep their bits. Without momentum and at a rate of 1 fedavgm is the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2ft_fl.subnets.architecture import Architecture


@dataclass(frozen=True)
class Moments:
    """Of one parameter, in its shape and type: the first moment, and of some kinds the second."""

    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class ServerOptimizer:
    """Steps of one kind; see the module's docstring.

    Attributes:
        kind: One of :data:`.SERVER_OPTIMIZERS` but ``mean``.
        lr, beta_1, beta_2, tau: As in the formulas.
    """

    kind: str
    lr: float
    beta_1: float
    beta_2: float
    tau: float

    def step(
        self,
        arch: Architecture,
        old: Mapping[str, Tensor],
        mean: Mapping[str, Tensor],
        trained: Mapping[str, tuple[int, ...]],
        moments: Mapping[str, Moments],
    ) -> tuple[dict[str, Tensor], dict[str, Moments]]:
        """Return new weights and moments, from old weights and the mean of clients' weights.

        Args:
            trained: Name of a parameter -> the heads that somebody trained; none for a whole one.
        """
        weights, found = dict(mean), dict(moments)
        for name, heads in trained.items():
            p, before = arch.by_name[name], old[name]
            own = moments.get(name) or self._fresh(before)
            if heads:
                slices = [p.pack(t, heads) for t in (before, mean[name], *_parts(own))]
                stepped = self._step(*slices)
                whole = [t.clone() for t in (before, *_parts(own))]
                for into, rows in zip(whole, stepped, strict=True):
                    p.unpack_(into, rows, heads)
            else:
                whole = self._step(before, mean[name], *_parts(own))
            weights[name] = whole[0]
            found[name] = Moments(whole[1], whole[2] if len(whole) > 2 else None)
        return weights, found

    def _fresh(self, like: Tensor) -> Moments:
        second = None if self.kind == "fedavgm" else torch.zeros_like(like)
        return Moments(torch.zeros_like(like), second)

    def _step(
        self, x: Tensor, mean: Tensor, first: Tensor, second: Tensor | None = None
    ) -> list[Tensor]:
        """Value and moments after a step, in x's type."""
        d = mean.double() - x.double()
        if second is None:
            m = self.beta_1 * first.double() + d
            return [t.to(x.dtype) for t in (x.double() + self.lr * m, m)]
        m = self.beta_1 * first.double() + (1 - self.beta_1) * d
        v, square = second.double(), d.square()
        if self.kind == "fedadam":
            v = self.beta_2 * v + (1 - self.beta_2) * square
        else:
            v = v - (1 - self.beta_2) * square * torch.sign(v - square)
        new = x.double() + self.lr * m / (v.sqrt() + self.tau)
        return [t.to(x.dtype) for t in (new, m, v)]


def _parts(moments: Moments) -> tuple[Tensor, ...]:
    return (moments.first,) if moments.second is None else (moments.first, moments.second)
