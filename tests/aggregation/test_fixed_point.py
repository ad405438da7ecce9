"""Compiled loops by hand, and against the same sums in full numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.aggregation.fixed_point import accumulate, accumulate_quantized, outside, squares
from d2ft_fl.wire.quantization import SCALE_BYTES, dequantize_rows, quantize_rows

MOST = 0.5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    size=st.sampled_from([1e-6, 0.01, 1.0]),  # of the last, some change by more than MOST
)
def test_quantized_changes_add_what_full_numbers_add(seed, rows, width, bits, size):
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, width, generator=draw)
    changes = size * torch.randn(rows, width, generator=draw)
    sent = quantize_rows(changes, bits, np.random.SFC64(seed))
    new = old + dequantize_rows(sent, width, bits)
    totals = [np.full((rows, width), 7, dtype=np.int64) for _ in range(2)]
    scale = 3 * 2.0**36
    left_out = accumulate(
        totals[0].ravel(), old.flatten().numpy(), new.flatten().numpy(), scale, MOST
    )
    sizes = sent[:, :SCALE_BYTES].flatten().view(torch.float32).numpy()
    args = totals[1], old.numpy(), sent.numpy(), sizes, bits, scale, MOST
    assert accumulate_quantized(*args) == left_out
    assert (totals[0] == totals[1]).all()


OLD = np.array([1.0, 1.0, 1.0, 1.0, -2.0, 1.0, 1.0, 0.0, 0.0], dtype=np.float32)
NEW = np.array([1.5, 0.5, 1.625, 0.25, -2.25, 1.125, np.nan, np.inf, -np.inf], dtype=np.float32)
# Changes by 1/2, -1/2, 5/8, -3/4, -1/4, 1/8, and three that are not finite.


def test_what_is_too_large_or_not_finite_is_counted():
    assert outside(OLD, NEW, 0.5) == 7
    assert outside(OLD, NEW, 0.625) == 5
    assert outside(OLD, NEW, 0.75) == 4
    assert outside(OLD[:2], NEW[:2], 0.501) == 0
    assert outside(OLD[:0], NEW[:0], 0.5) == 0


def test_squares_of_changes_by_hand():
    assert squares(OLD[:6], NEW[:6]) == (16 + 16 + 25 + 36 + 4 + 1) / 64
    assert squares(OLD[:0], NEW[:0]) == 0


def test_changes_are_added_as_the_nearest_whole_numbers():
    """Times 5: 2.5 is rounded to 2 and -2.5 to -2, as ties are; -1.25 to -1, 0.625 to 1."""
    total = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert accumulate(total, OLD, NEW, 5.0, 0.625) == 5
    assert total.tolist() == [12, 18, 30, 40, 49, 61, 70, 80, 90]
    assert accumulate(total, OLD, NEW, -5.0, 0.625) == 5  # takes it off again
    assert total.tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert accumulate(total, OLD, NEW, 8.0, 0.75) == 4
    assert total.tolist() == [14, 16, 35, 40, 48, 61, 70, 80, 90]


@pytest.mark.parametrize(
    "bits,sent,middle",
    [
        (8, [[128, 126, 127, 129, 0], [127, 255, 130, 124, 9]], 127),
        # Two numbers a byte, the first in its lower half; of five, the last byte has one.
        (4, [[0x68, 0x97, 0x00], [0xF7, 0x4A, 0x09]], 7),
    ],
)
def test_quantized_changes_by_hand(bits, sent, middle):
    numbers = [[8, 6, 7, 9, 0], [7, 15, 10, 4, 9]] if bits == 4 else sent
    old = np.array([[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]], dtype=np.float32)
    sizes = np.array([0.25, 0.5], dtype=np.float32)
    # The scales stand before the numbers; they come as numbers of their own, too.
    rows = np.array([[1, 2, 3, 4, *row] for row in sent], dtype=np.uint8)
    changes = np.subtract(numbers, middle) * sizes[:, None].astype(float)
    fits = abs(changes) < 1.0
    total = np.arange(10).reshape(2, 5)
    left_out = accumulate_quantized(total, old, rows, sizes, bits, 16.0, 1.0)
    assert left_out == 10 - fits.sum() > 0
    wanted = np.arange(10).reshape(2, 5) + np.where(fits, 16 * changes, 0).astype(int)
    assert total.tolist() == wanted.tolist()
