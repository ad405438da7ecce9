"""The server's step, slice by slice: the server takes the mean change of a slice as a gradient.

With ``d`` the head-wise mean change of a slice in a round (:mod:`d2ft_fl.aggregation.sums`) and x
its value, a slice that somebody trained steps by

    mean       x <- x + d
    fedavgm    m <- beta_1 m + d                    x <- x + lr m     (Hsu et al., arXiv 1909.06335)
    fedadam    m <- beta_1 m + (1 - beta_1) d
               v <- beta_2 v + (1 - beta_2) d^2                        (Reddi et al., ICLR 2021,
               x <- x + lr m / (sqrt(v) + tau)                          arXiv 2003.00295, alg. 2)
    fedyogi    as fedadam, with  v <- v - (1 - beta_2) d^2 sign(v - d^2)

m and v begin at zero (the paper lets v begin at tau^2 or more) and belong to the slice: where
nobody trained it, x, m and v keep their bits. Without momentum and at a rate of 1 fedavgm is the
mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2ft_fl.subnets.architecture import Architecture


@dataclass(frozen=True)
class Moments:
    """The moments of one parameter, in its shape and type.

    Attributes:
        first: The first moment, m.
        second: The second moment, v; None for ``fedavgm``, which has none.
    """

    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class ServerOptimizer:
    """Steps of one kind; see the module's docstring.

    Attributes:
        kind: One of :data:`.SERVER_OPTIMIZERS` but ``mean``.
        lr: The learning rate of the server, lr in the formulas.
        beta_1: The decay of the first moment.
        beta_2: The decay of the second moment.
        tau: What is added to the square root of v.
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
            arch: The architecture of the round.
            old: The global state before the round, by name.
            mean: The mean of clients' weights, by name.
            moments: Moments before the round, by name; none of what was never trained.
            trained: Name of a parameter -> the heads that somebody trained; none for a whole one.
        """
        weights, new_moments = dict(mean), dict(moments)
        for name, heads in trained.items():
            p, before = arch.by_name[name], old[name]
            current = moments.get(name) or self._fresh(before)
            if heads:
                slices = [p.pack(t, heads) for t in (before, mean[name], *_parts(current))]
                stepped = self._step(*slices)
                whole = [t.clone() for t in (before, *_parts(current))]
                for into, rows in zip(whole, stepped, strict=True):
                    p.unpack_(into, rows, heads)
            else:
                whole = self._step(before, mean[name], *_parts(current))
            weights[name] = whole[0]
            new_moments[name] = Moments(whole[1], whole[2] if len(whole) > 2 else None)
        return weights, new_moments

    def _fresh(self, like: Tensor) -> Moments:
        """Return moments of zero for a parameter."""
        second = None if self.kind == "fedavgm" else torch.zeros_like(like)
        return Moments(torch.zeros_like(like), second)

    def _step(
        self, x: Tensor, mean: Tensor, first: Tensor, second: Tensor | None = None
    ) -> list[Tensor]:
        """Return the value and the moments after a step, in the type of ``x``."""
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
    """Return the moments that there are."""
    return (moments.first,) if moments.second is None else (moments.first, moments.second)
