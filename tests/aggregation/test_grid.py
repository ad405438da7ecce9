"""Bits of sums: what they resolve, and that none can leave its integer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.aggregation.grid import fraction_bits


@pytest.mark.parametrize(
    "examples,bits", [(0, 36), (1, 36), (2**20 - 1, 36), (2**20, 35), (2**30, 25)]
)
def test_bits_by_hand(examples, bits):
    """62 of a sum, 6 for a change up to 64, and those of the number of examples."""
    assert fraction_bits(examples) == bits


@given(st.integers(1, 2**40))
def test_changes_of_64_on_all_examples_stay_in_the_integer(examples):
    assert 64 * examples * 2 ** fraction_bits(examples) <= 2**62
    resolved = fraction_bits(examples)
    assert resolved == 36 or 64 * examples * 2 ** (resolved + 2) > 2**62
