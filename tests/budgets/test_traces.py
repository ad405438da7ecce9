import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.budgets.budget import Amount, Budget
from d2ft_fl.budgets.traces import Trace, parse_trace
from d2ft_fl.errors import ConfigError

BUDGET = Budget.from_mapping(
    {"flops": "50 %", "memory": 1000, "bytes-up": 7, "speed": "4 FLOP/s", "deadline": "9 s"}
)


def test_a_battery_falls_for_eight_rounds_of_ten_and_is_charged_in_two():
    # From 1 down to 0.3 in eight steps of 0.7 / 8, and back in two of 0.35.
    expected = [1 - 0.0875 * n for n in range(8)] + [0.3, 0.65]
    got = [Trace("battery").factor(0, round) for round in range(1, 21)]
    assert got == pytest.approx(expected * 2)


def test_a_load_is_a_day_of_24_rounds_with_noon_in_the_middle():
    # By 0.6 / 12 = 0.05 a round, down and up again.
    expected = [1 - 0.05 * n for n in range(12)] + [0.4 + 0.05 * n for n in range(12)]
    got = [Trace("load").factor(0, round) for round in range(1, 49)]
    assert got == pytest.approx(expected * 2)


def test_clients_are_at_different_points_of_a_trace():
    # Of ten clients spread by the golden ratio, no two are within 1/30 of the period.
    phases = sorted(Trace("load").factor(c, 1) for c in range(10))
    assert len({round(p, 3) for p in phases}) == 10
    assert min(phases) < 0.5
    assert max(phases) > 0.9


def test_a_list_goes_on_from_its_start_for_all_clients_alike():
    trace = Trace("list", (1.0, 0.5, 0.25))
    assert [trace.factor(c, r) for c, r in enumerate(range(1, 6))] == [1, 0.5, 0.25, 1, 0.5]


@given(st.sampled_from(["battery", "load"]), st.integers(0, 10**6), st.integers(1, 10**6))
def test_factors_are_above_0_and_at_most_1(name, client, round_number):
    assert 0.29 < Trace(name).factor(client, round_number) <= 1


def test_a_trace_scales_what_it_says_and_nothing_else():
    half = Trace("list", (0.5,)).apply(BUDGET, 0, 1)
    assert half == Budget.from_mapping(
        {"flops": "25 %", "memory": 1000, "bytes-up": 7, "speed": "2 FLOP/s", "deadline": "9 s"}
    )
    noon = Trace("load").apply(BUDGET, 0, 13)
    assert noon.memory.value == pytest.approx(400)
    assert (noon.flops.relative, noon.flops.value) == (True, pytest.approx(0.2))
    assert noon.bytes_up == Amount(7)
    assert Trace("load").apply(Budget(), 0, 13) == Budget()


@pytest.mark.parametrize(
    "value", ["solar", [], [0.5, 0], [1.1], [-0.5], [True], ["a"], 0.5, [float("nan")]]
)
def test_what_is_no_trace_is_refused_in_one_line(value):
    with pytest.raises(ConfigError, match=r"file:3: trace = .* use 'battery', 'load', or") as error:
        parse_trace(value, "file:3")
    assert "\n" not in str(error.value)
