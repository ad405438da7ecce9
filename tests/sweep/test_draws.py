import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.sweep.draws import Choice, Span, uniform

UNIT = st.floats(0, 1, exclude_max=True)


def test_a_draw_is_a_hash_of_seed_option_and_number():
    """``printf '0 lr 3' | sha256sum`` begins with 7f282574ab16691d; 53 of these bits count."""
    assert uniform(0, "lr", 3) == (0x7F282574AB16691D >> 11) / 2**53
    assert len({uniform(s, k, n) for s in (0, 1) for k in ("lr", "slots") for n in (0, 1)}) == 8


def test_draws_are_spread_evenly():
    draws = np.array([uniform(7, "lr", n) for n in range(4000)])
    assert abs(draws.mean() - 0.5) < 4 / math.sqrt(12 * 4000)
    assert np.histogram(draws, bins=10, range=(0, 1))[0].min() > 300


@given(UNIT, st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_a_span_holds_its_draws(u, least, width, log):
    least = abs(least) + 1e-6 if log else least
    span = Span(least, least + width, log)
    assert span.least <= span.draw(u) <= span.most


@given(UNIT, st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_whole_ends_draw_whole_numbers(u, least, width, log):
    x = Span(least, least + width, log).draw(u)
    assert isinstance(x, int)
    assert least <= x <= least + width


def test_every_whole_number_is_as_likely():
    draws = [Span(1, 4).draw(u) for u in np.linspace(0, 1, 4000, endpoint=False)]
    assert [draws.count(n) for n in (1, 2, 3, 4)] == pytest.approx([1000] * 4, abs=1)


def test_logarithms_are_spread_evenly_and_digits_are_few():
    span = Span(1e-4, 1e-2, log=True)
    assert [span.draw(u) for u in (0, 0.25, 0.5)] == [1e-4, 0.000316228, 1e-3]


def test_a_choice_is_each_value_for_its_part_of_the_interval():
    assert [Choice((8, 16, 32)).draw(u) for u in (0, 0.33, 0.34, 0.66, 0.67, 0.999)] == [
        8, 8, 16, 16, 32, 32
    ]  # fmt: skip
