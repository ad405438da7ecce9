"""Utility of a client's round: a prediction of how far it brings the model, 1 for everything.

The planner maximises sums over subnets, which do not see that what is trained must reach the loss,
nor that fewer examples bring less. This judges whole rounds, so that plans under different
execution policies compare:

    utility = exp(-a ln(examples)^2 - c ln(learned)^2)  up(w)  down(m)  kept

with the share of the examples; w the bits in which changes travel up, m those of weights down; and
over blocks l and heads h, with backward scores u and forward scores v,

    learned = B + (1 - B) sum_lh u_lh full_lh path_l / sum_lh u_lh     as far as the loss sees it
    path_l  = prod_{m > l} (1 - k cut_m)                   cut_m: share of block m cutting gradients
    kept    = prod_l (1 - s mean_h v_lh skipped_lh / mean v)

Batches of b examples, where b0 on all examples are best, are worth exp(-e ln(b / b1)^2), with b1
the ideal size on a share of the examples, b0 times its root, and 1 below it.

full and skipped are shares of the slots; B is for the classifier, which always trains. A little
less of anything costs next to nothing, hence the squares: so budgets are best spread over what can
be saved on. Of the constants a, c, e, s and those of bits up are about what was measured, a point
of accuracy being 0.01; k, B and those of bits down are guesses. See `docs/accuracy.md`, also for
how well the prediction orders plans.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_fl.subnets.schedule import Operation

EXAMPLES, LEARNED = 0.05, 0.033  # a, c
CUT, SKIPPED = 0.5, 0.3  # k, s
BASE = 0.02
BATCHES, SHRINKING = 0.025, 0.5  # what batches that are too large cost; how batches go by examples
BITS_UP = {32: 1.0, 8: 0.999, 4: 0.993}
BITS_DOWN = {32: 1.0, 8: 0.999}


def ideal_batch(size: int, share: float) -> float:
    """Return the examples of a step on a share of the examples, where all come in ``size``."""
    return size * share**SHRINKING


def of_batch(batch: int, size: int, share: float) -> float:
    """Return what batches make of utility, as a factor: 1 up to the ideal size.

    Args:
        batch: Examples of a step.
        size: Of a step on all examples, where that is best.
        share: Of the examples that are trained on.
    """
    return math.exp(-BATCHES * math.log(max(1.0, batch / ideal_batch(size, share))) ** 2)


@dataclass(frozen=True)
class Utility:
    """Judges rounds by scores of subnets.

    Attributes:
        backward: Scores of training: float64 [blocks, heads].
        forward: Scores of running: float64 [blocks, heads].
    """

    backward: np.ndarray
    forward: np.ndarray

    def of(
        self,
        operations: np.ndarray,
        ranks: np.ndarray,
        examples: np.ndarray,
        bits: Sequence[tuple[int, int]],
    ) -> np.ndarray:
        """Return the utility of many clients' rounds: float64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            ranks: How far training at its rank counts: float64 [clients, blocks, heads].
            examples: Examples of the round as a share of the client's: float64 [clients].
            bits: Of numbers on their way up and down, [clients].
        """
        learned = self.learned(operations, ranks)
        skipped = (operations == Operation.SHORTCUT).mean(axis=1)
        missing = (self.forward * skipped).mean(axis=2) / self.forward.mean()  # [clients, blocks]
        kept = np.prod(np.maximum(1 - SKIPPED * missing, 0.0), axis=1)
        lost = EXAMPLES * np.log(examples) ** 2 + LEARNED * np.log(learned) ** 2
        return np.exp(-lost) * np.array([BITS_UP[u] * BITS_DOWN[d] for u, d in bits]) * kept

    @staticmethod
    def most(share: float, bits: tuple[int, int]) -> float:
        """Return the utility of training everything on a share of the examples: no round has more.

        Args:
            share: Of the client's examples.
            bits: Of numbers on their way up and down.
        """
        return math.exp(-EXAMPLES * math.log(share) ** 2) * BITS_UP[bits[0]] * BITS_DOWN[bits[1]]

    def learned(self, operations: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return what trains, as far as the loss sees it, as a share: float64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            ranks: How far training at its rank counts: float64 [clients, blocks, heads].
        """
        full = (operations == Operation.FULL).mean(axis=1) * ranks  # [clients, blocks, heads]
        cut = (operations <= Operation.FORWARD_ONLY).mean(axis=(1, 3))  # [clients, blocks]
        uncut = np.cumprod(1 - CUT * cut[:, ::-1], axis=1)[:, ::-1]
        path = np.concatenate([uncut[:, 1:], np.ones((len(cut), 1))], axis=1)
        trained = (self.backward * full * path[..., None]).sum(axis=(1, 2)) / self.backward.sum()
        return BASE + (1 - BASE) * trained

    def mean_of(
        self,
        operations: np.ndarray,
        local: np.ndarray,
        used: np.ndarray,
        bits: Sequence[tuple[int, int]],
    ) -> float:
        """Return the mean over clients, weighted by their examples.

        A client that sits out has utility 0. Ranks do not count.

        Args:
            operations: int8 [clients, slots, blocks, heads].
            local: Examples that clients have: int64 [clients].
            used: Examples that clients train on: int64 [clients].
            bits: Of numbers on their way up and down, [clients].
        """
        works = operations.any(axis=(1, 2, 3)) & (used > 0)
        shares = np.where(works, used / np.maximum(1, local), 1.0)
        ranks = np.ones((len(local), *operations.shape[2:]))
        each = self.of(operations, ranks, shares, bits) * works
        return float((each * local).sum() / max(1, local.sum()))
