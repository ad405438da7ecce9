"""Compiled loops of aggregation; each reads its arrays once."""

import numpy as np

from d2ft_fl.util.compiled import entry


@entry
def outside(old: np.ndarray, new: np.ndarray, most: float) -> int:
    """Return how many elements changed by more than ``most``, or are not finite."""
    count = 0
    for i in range(old.size):
        if not abs(np.float64(new[i]) - np.float64(old[i])) <= most:
            count += 1
    return count


@entry
def squares(old: np.ndarray, new: np.ndarray) -> float:
    """Return the sum of the squares of all changes."""
    total = 0.0
    for i in range(old.size):
        change = np.float64(new[i]) - np.float64(old[i])
        total += change * change
    return total


@entry
def accumulate(
    total: np.ndarray, old: np.ndarray, new: np.ndarray, scale: float, most: float
) -> int:
    """Add ``scale`` times the change to int64 ``total``, each element rounded to the nearest.

    Elements that changed by more than ``most``, or are not finite, are left out.

    Returns:
        How many elements were left out, as :func:`outside` counts them.
    """
    count = 0
    for i in range(total.size):
        change = np.float64(new[i]) - np.float64(old[i])
        fits = abs(change) <= most
        count += not fits
        total[i] += np.int64(np.rint((change if fits else 0.0) * scale))
    return count
