"""How much a subnet matters: backward scores for training it, forward scores for running it.

D2FT (arXiv 2504.12471, section 3.2) takes weight magnitude for the first and Fisher information
for the second. Scores are normalised to a mean of 1 over the model, so that the two compare.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from d2ft_fl.subnets import Architecture, Kind

KINDS = ("magnitude", "fisher", "uniform")


def magnitude(arch: Architecture, weights: dict[str, Tensor]) -> np.ndarray:
    """Mean absolute weight of each subnet: float64 [blocks, heads]."""
    total = np.zeros((arch.blocks, arch.heads))
    count = np.zeros((arch.blocks, arch.heads))
    for p in arch.of_kind(Kind.SLICED):
        sizes = weights[p.name].abs().double().movedim(p.axis, 0)
        rows = sizes.reshape(len(sizes), -1).sum(dim=1).numpy()
        for head, own in enumerate(p.rows):
            total[p.block, head] += rows[list(own)].sum()
            count[p.block, head] += len(own) * (p.numel // p.shape[p.axis])
    return total / count


def normalised(scores: np.ndarray) -> np.ndarray:
    """Scores with mean 1; all ones where nothing is known to matter."""
    mean = scores.mean()
    return scores / mean if mean > 0 else np.ones_like(scores)


@dataclass(frozen=True)
class FisherBook:
    """What clients' scoring passes have told so far: a running mean over rounds.

    A subnet never seen keeps the prior, the mean of those seen (1 before any was).
    """

    mean: np.ndarray | None = None
    momentum: float = 0.5

    def scores(self, arch: Architecture) -> np.ndarray:
        """float64 [blocks, heads]."""
        return np.ones((arch.blocks, arch.heads)) if self.mean is None else self.mean

    def updated(self, measured: dict[int, tuple[np.ndarray, int]]) -> "FisherBook":
        """The book after a round: ``measured`` is client -> (Fisher [blocks, heads], examples)."""
        if not measured:
            return self
        # Clients in order, so that the mean does not depend on who answered first.
        ordered = [measured[client] for client in sorted(measured)]
        examples = sum(n for _, n in ordered)
        fresh = np.sum([normalised(f) * n for f, n in ordered], axis=0) / examples
        if self.mean is not None:
            fresh = (1 - self.momentum) * self.mean + self.momentum * fresh
        return FisherBook(fresh, self.momentum)
