"""The resources that a budget limits, and amounts of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESOURCES = ("flops", "memory", "bytes_up", "bytes_down")


MOST_WORK = 2**60  # of a round: whatever a curve says, the sum of a few is an int64
MEMORY_MARGIN = 32  # 1/32 on top for the small tensors that the formula leaves out


@dataclass(frozen=True)
class Cost:
    """What one client spends in one round."""

    flops: int = 0
    memory: int = 0  # bytes, at the peak
    bytes_up: int = 0
    bytes_down: int = 0
    # How long it computes: seconds on the curve of its machine, times the FLOP/s of that curve's
    # peak. Those are FLOPs that the machine would do meanwhile, were it always at its best.
    work: int = 0

    def vector(self) -> np.ndarray:
        """Return the amounts in the order of ``RESOURCES``: int64 [4]."""
        return np.array([getattr(self, r) for r in RESOURCES], dtype=np.int64)

    def amounts(self) -> dict[str, int]:
        """Return the amounts by name, in the order of ``RESOURCES``."""
        return {r: getattr(self, r) for r in RESOURCES}


def costs_from(amounts: np.ndarray, work: np.ndarray) -> list[Cost]:
    """Return costs of which arrays are at hand.

    Args:
        amounts: In the order of ``RESOURCES``: int64 [costs, 4].
        work: int64 [costs].
    """
    pairs = zip(amounts.tolist(), work.tolist(), strict=True)
    return [Cost(flops, memory, up, down, w) for (flops, memory, up, down), w in pairs]


def workload_variance(flops: Sequence[int]) -> float:
    """Return the variance over clients of their FLOPs, in units of the mean's square.

    D2FT (arXiv 2504.12471) reports the variance of the work of devices; 0 is an even load.
    """
    mean = float(np.mean(flops)) if len(flops) else 0.0
    return float(np.var(flops)) / mean**2 if mean else 0.0
