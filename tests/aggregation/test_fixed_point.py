"""Compiled loops against the same sums in full numbers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.aggregation.fixed_point import accumulate, accumulate_quantized
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
