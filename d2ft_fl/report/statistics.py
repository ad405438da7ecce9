"""Means over seeds, with intervals, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Interval:
    """A mean and how far it may be off.

    Attributes:
        mean: NaN of no values.
        half: Half the width of the mean's confidence interval; None of fewer than two values.
        count: Number of values.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Compute Student's interval: mean ± t(n - 1) s / sqrt(n), s with n - 1."""
        n = len(values)
        if n == 0:
            return cls(math.nan, None, 0)
        mean = float(np.mean(values))
        if n == 1:
            return cls(mean, None, 1)
        quantile = float(stdtrit(n - 1, (1 + LEVEL) / 2))
        return cls(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(n), n)

    @property
    def low(self) -> float:
        """Its lower end; the mean without an interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Its upper end; the mean without an interval."""
        return self.mean + (self.half or 0.0)


def differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[float]:
    """Subtract theirs from ours, where both have a value of the same name."""
    return [value - theirs[name] for name, value in ours.items() if name in theirs]
