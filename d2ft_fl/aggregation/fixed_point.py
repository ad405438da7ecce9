"""Compiled loops of aggregation; each reads its arrays once."""

import numpy as np

from d2ft_fl.util.compiled import entry


@entry
def outside(old: np.ndarray, new: np.ndarray, most: float) -> int:
    """Return how many elements changed by ``most`` or more, or are not finite."""
    count = 0
    for i in range(old.size):
        if not abs(np.float64(new[i]) - np.float64(old[i])) < most:
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

    Elements that changed by ``most`` or more, or are not finite, are left out.

    Returns:
        How many elements were left out, as :func:`outside` counts them.
    """
    count = 0
    for i in range(total.size):
        change = np.float64(new[i]) - np.float64(old[i])
        fits = abs(change) < most
        count += not fits
        total[i] += np.int64(np.rint((change if fits else 0.0) * scale))
    return count


@entry
def accumulate_quantized(
    total: np.ndarray,
    old: np.ndarray,
    quantized: np.ndarray,
    sizes: np.ndarray,
    bits: int,
    scale: float,
    most: float,
) -> int:
    """Add what :func:`accumulate` adds, from quantized changes.

    The new value, ``old`` plus the change, is rounded to float32, as
    :func:`~d2ft_fl.wire.quantization.with_quantized_changes` makes it.

    Args:
        total: Sums: int64 [rows, width].
        old: Values before the round: float32 [rows, width].
        quantized: Rows of :func:`~d2ft_fl.wire.quantization.quantize_rows`: uint8 [rows, bytes].
        sizes: The scales of these rows: float32 [rows].
        bits: Of a number: 4 or 8.
        scale: What a change is multiplied by.
        most: What changes that are added are smaller than.

    Returns:
        How many elements were left out, as :func:`outside` counts them.
    """
    count = 0
    middle = np.float32(2 ** (bits - 1) - 1)
    width = old.shape[1]
    numbers = np.empty(width + 1, dtype=np.float32)
    for row in range(old.shape[0]):
        size, sent = sizes[row], quantized[row, 4:]
        if bits == 4:
            for i in range((width + 1) // 2):
                numbers[2 * i] = sent[i] & np.uint8(15)
                numbers[2 * i + 1] = sent[i] >> np.uint8(4)
        else:
            for i in range(width):
                numbers[i] = sent[i]
        for i in range(width):
            new = old[row, i] + size * (numbers[i] - middle)
            change = np.float64(new) - np.float64(old[row, i])
            fits = abs(change) < most
            count += not fits
            total[row, i] += np.int64(np.rint((change if fits else 0.0) * scale))
    return count
