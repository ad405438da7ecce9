from dataclasses import dataclass

import pytest

from d2ft_fl.config.option import option, options_of
from d2ft_fl.config.run_config import OPTIONS
from d2ft_fl.errors import ConfigError

NAN = float("nan")
LEANING = ("of these", "the same", "see the last")


@dataclass(frozen=True)
class First:
    """First group.

    More about it.
    """

    whole_number: int = option(3, "A count.", low=1, unit="rounds")
    way: str = option("a", "A choice.", choices=("a", "", "b"))


@dataclass(frozen=True)
class Second:
    """Second group."""

    share: float = option(0.5, "A share.", above=0, high=1)
    rate: float = option(0.5, "A rate.", low=0, below=1)
    factor: float = option(1.0, "A factor.")
    time: float = option(1.0, "A time.", above=0)
    norm: float = option(1.0, "A norm.", low=0)
    part: float = option(1.0, "A part.", low=0, high=1)
    bits: int = option(8, "Bits.", choices=(8, 4))


@dataclass(frozen=True)
class Both(Second, First):
    """Both."""


FOUND = options_of(Both)


def test_an_option_is_in_the_group_that_declares_it_in_the_order_of_groups():
    assert [(one.key, one.group) for one in FOUND.values()][:3] == [
        ("whole-number", "First group"), ("way", "First group"), ("share", "Second group")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "key,good,bad,message",
    [
        ("whole-number", [1, 10**30], [0, -1], "whole-number = 0 must be 1 or more"),
        ("way", ["a", ""], ["c"], "way = 'c' is unknown; use one of a, b"),
        (
            "share",
            [1e-9, 1],
            [0.0, 1.1, float("nan")],
            "share = 0.0 must be above 0, and 1 at most",
        ),
        ("rate", [0, 0.99], [1.0, -0.1], "rate = 1.0 must be 0 or more, and below 1"),
        ("factor", [-1e300], [float("inf"), NAN], "factor = inf must be a finite number"),
        ("time", [1e-9], [0.0, float("inf")], "time = 0.0 must be a finite number above 0"),
        ("norm", [0.0], [-1.0], "norm = -1.0 must be a finite number, 0 or more"),
        ("part", [0.0, 1.0], [1.5], "part = 1.5 must be between 0 and 1"),
        ("bits", [4], [5], "bits = 5 must be 8 or 4"),
    ],
)
def test_a_value_outside_of_its_range_is_refused_with_what_is_allowed(key, good, bad, message):
    for value in good:
        FOUND[key].check(value)
    for value in bad:
        with pytest.raises(ConfigError) as error:
            FOUND[key].check(value)
        if value == bad[0]:
            assert str(error.value) == message


def test_every_option_of_a_run_has_a_sentence_that_stands_alone():
    for key, one in OPTIONS.items():
        assert one.text[0].isupper() or one.text.startswith("mu "), key
        assert one.text.endswith("."), key
        assert not any(words in one.text.lower() for words in LEANING), key
        assert one.group
        one.check(one.default)
