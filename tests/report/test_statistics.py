"""Intervals and differences, by hand."""

import math

import pytest

from d2ft_fl.report.statistics import Interval, differences


def test_an_interval_is_students():
    """Of 1, 2, 3: s = 1, and t of two degrees of freedom at 97.5 % is 4.3027 in any table."""
    found = Interval.of([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.low, found.high) == (2 - found.half, 2 + found.half)


def test_two_values_have_a_wide_interval():
    """Of 0 and 1: s = 1 / sqrt 2, t = 12.7062, so 12.7062 / 2."""
    assert Interval.of([0.0, 1.0]).half == pytest.approx(6.3531, rel=1e-5)


def test_one_value_has_no_interval_and_none_no_mean():
    one, none = Interval.of([0.5]), Interval.of([])
    assert (one.mean, one.half, one.low, one.high) == (0.5, None, 0.5, 0.5)
    assert math.isnan(none.mean)
    assert (none.half, none.count) == (None, 0)


def test_differences_are_of_names_that_both_have():
    assert differences({"a": 3.0, "b": 5.0, "c": 1.0}, {"b": 1.0, "a": 1.0, "d": 9.0}) == [2.0, 4.0]
