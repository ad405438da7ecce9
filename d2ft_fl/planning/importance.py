"""Importance of subnets: backward scores for training it, forward scores for running it.

With w the parameters of a subnet (its rows of the products of a block; norms and biases that all
subnets of a block share belong to none), g_i the gradient of log p(y_i | x_i) by them, and means
over a client's n scored examples, one example at a time,

    magnitude   mean_w |w|
    fisher      sqrt(mean_i mean_w g_i^2)       root of the empirical Fisher information
    gradient    mean_i mean_w |g_i|
    taylor      mean_i |sum_w w g_i|
    uniform     1

The first three are means per parameter, so that subnets of uneven size compare: how large a
weight, or how steep its slope, is on average. D2FT (arXiv 2504.12471, section 3.2) trains by
magnitude and runs by Fisher information; its root is a size of gradients, as magnitude is one of
weights, while Fisher itself is so uneven that most subnets would seem not to matter.

``taylor`` is a change of the loss, and not divided by anything: to first order, what happens to an
example's loss when all of the subnet's weights go to zero, in absolute value (Molchanov et al.,
CVPR 2019, arXiv 1906.10771, who square the sum). Over the rows of its products out alone the sum
would be the derivative of the loss by a gate on the subnet, which is what Michel et al. (NeurIPS
2019, arXiv 1905.10650) score heads by.

**How they compare.** Kinds have units of their own, so each is divided by its mean over the model:
a score of 2 is twice the average subnet's, in any block and of either direction. A planner then
adds up

    value(FULL)         = backward + forward_weight * forward
    value(FORWARD_ONLY) =            forward_weight * forward

``forward-weight`` is the value of running an average subnet beside training it: at 1, training
the average subnet on top of running it doubles its value; at 0 only training counts. It says
nothing of costs, which the planner weighs against values by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from d2ft_fl.engine.importance_measures import MEASURES
from d2ft_fl.subnets.architecture import Architecture, Kind

MEASURED = tuple(MEASURES)  # kinds that need a probe
KINDS = ("magnitude", *MEASURED, "uniform")
TENSOR = "d2ft.score."  # + kind: a measurement's name on the wire


def magnitude(arch: Architecture, weights: Mapping[str, Tensor]) -> np.ndarray:
    """Return the mean absolute weight of each subnet: float64 [blocks, heads]."""
    total = np.zeros((arch.blocks, arch.heads))
    for p in arch.of_kind(Kind.SLICED):
        sizes = weights[p.name].abs().double().movedim(p.axis, 0)
        rows = sizes.reshape(len(sizes), -1).sum(dim=1).numpy()
        for head, rows_of_head in enumerate(p.rows):
            total[p.block, head] += rows[list(rows_of_head)].sum()
    return total / arch.subnet_sizes


def prior(blocks: int, heads: int) -> np.ndarray:
    """Return scores for what is not measured yet: float64 [blocks, heads].

    They fall with depth from 1.5 to 0.5, about as Fisher information does in a pretrained vision
    transformer on new images.
    """
    falling = 1.5 - np.arange(blocks) / max(1, blocks - 1)
    return np.repeat(falling[:, None], heads, axis=1)


def normalised(scores: np.ndarray) -> np.ndarray:
    """Scale scores to mean 1; all are 1 where the mean is 0. NaN is unknown, and stays."""
    mean = np.nanmean(scores)
    return scores / mean if mean > 0 else np.where(np.isnan(scores), np.nan, 1.0)


@dataclass(frozen=True)
class ScoreBook:
    """Scores that clients' probes have measured so far.

    Attributes:
        means: By kind, the running mean over rounds: float64 [blocks, heads], NaN where a subnet
            was never seen. Of ``fisher`` it is the mean square, before the root.
    """

    means: Mapping[str, np.ndarray] = field(default_factory=dict)

    def scores(self, kind: str) -> np.ndarray:
        """Return the measurements of one kind that was measured: float64 [blocks, heads].

        A subnet never seen gets the mean of those seen.
        """
        known = self.means[kind]
        return np.where(np.isnan(known), np.nanmean(known), known)

    def updated(
        self, measured: Mapping[int, tuple[Mapping[str, np.ndarray], int]], momentum: float
    ) -> "ScoreBook":
        """Return the book after a round.

        A round's measurements are those of its clients, each with mean 1 over what it saw, weighted
        by examples. Earlier rounds count ``momentum``, and this one counts the rest.

        Args:
            measured: Client -> (kind -> [blocks, heads], NaN where not measured; examples).
            momentum: In [0, 1); 0 forgets earlier rounds.
        """
        # Clients in order, so that the mean does not depend on who answered first.
        ordered = [measured[client] for client in sorted(measured)]
        means = dict(self.means)
        for kind in MEASURED:
            parts = [(normalised(values[kind]), n) for values, n in ordered if kind in values]
            if parts:
                means[kind] = _blended(means.get(kind), _pooled(parts), momentum)
        return ScoreBook(means)


def _pooled(parts: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Return the mean of measurements, weighted by examples; NaN where nobody measured."""
    total = np.sum([np.nan_to_num(values) * n for values, n in parts], axis=0)
    examples = np.sum([~np.isnan(values) * n for values, n in parts], axis=0)
    return np.where(examples > 0, total / np.maximum(examples, 1), np.nan)


def _blended(known: np.ndarray | None, fresh: np.ndarray, momentum: float) -> np.ndarray:
    """Return the running mean; a subnet measured only before, or only now, keeps that value."""
    if known is None:
        return fresh
    both = momentum * known + (1 - momentum) * fresh
    return np.where(np.isnan(known), fresh, np.where(np.isnan(fresh), known, both))


def subnet_scores(
    kind: str, arch: Architecture, weights: Mapping[str, Tensor], book: ScoreBook
) -> np.ndarray:
    """Return scores of one of ``KINDS`` with mean 1 over the model: float64 [blocks, heads]."""
    if kind == "magnitude":
        return normalised(magnitude(arch, weights))
    if kind == "uniform":
        return np.ones((arch.blocks, arch.heads))
    if kind not in book.means:
        return normalised(prior(arch.blocks, arch.heads))
    measured = book.scores(kind)
    return normalised(np.sqrt(measured) if kind == "fisher" else measured)
