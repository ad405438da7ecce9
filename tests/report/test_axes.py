import numpy as np
import pytest

from d2ft_fl.report.axes import round_step, scale, short, x_choice


@pytest.mark.parametrize(
    "most,unit,expected",
    [
        (4.5e9, "FLOP", (1e9, "GFLOP")),
        (999.0, "B", (1.0, "B")),
        (2e6, "B", (1e6, "MB")),
        (59.0, "s", (1.0, "seconds")),
        (900.0, "s", (60.0, "minutes")),
        (20000.0, "s", (3600.0, "hours")),
        (1e9, "", (1.0, "")),
    ],
)
def test_units_fit_the_greatest_number(most, unit, expected):
    assert scale(most, unit) == expected


@pytest.mark.parametrize("most,step", [(1, 1), (10, 1), (11, 2), (30, 5), (60, 10), (1000, 100)])
def test_an_axis_of_rounds_has_ten_ticks_at_most(most, step):
    assert round_step(most) == step


def test_numbers_are_short_and_what_is_none_stays_none():
    assert short([1 / 3, 2.0, float("nan"), float("inf")], 3) == [0.333, 2.0, None, None]


def test_every_trace_gets_the_values_of_what_is_chosen():
    columns = {"round": [1, 2], "cum_flops": [2e9, 4e9], "cum_seconds": [1.0, 2.0]}
    empty = np.array([])

    def column(name):
        return [np.array(columns.get(name, [0.0, 0.0]), dtype=float), empty]

    options = {option.label: option for option in x_choice(column).options}
    assert options["FLOPs"].data["x"] == [[2.0, 4.0], []]
    assert options["FLOPs"].layout["xaxis.title.text"] == "GFLOP so far, all clients"
    assert options["rounds"].layout["xaxis.dtick"] == 1
    assert options["FLOPs"].layout["xaxis.dtick"] is None
