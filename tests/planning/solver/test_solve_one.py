"""One client: prices first, a quick look at some cases, then one case after another."""

import numpy as np
import pytest

from tests.planning.solver.interpreted import search
from tests.planning.solver.tiny import NOTHING, blank, knapsack


def with_cases(count):
    """One item of three options of value 0, 1, 2; each case allows all but the last forbid 0."""
    allowed = np.ones((count, 3), dtype=bool)
    allowed[:-1, 1] = False
    return knapsack([[0, 1, 2]], [[[0, 0], [1, 1], [9, 0]]], [4, 4], mode=np.arange(count)[:, None],
                    allowed=allowed)  # fmt: skip


class Steps:
    """Stands in for what ``solve_one`` calls: answers by case; notes what is asked.

    Attributes:
        first: The bound that first prices give.
        bounds: The dual in each case at the best prices.
        settled: Case -> the value that is settled on.
        filled: Case -> what ``fill`` wins then.
        lowered: Case -> its bound after further steps, by default what it was.
        solved: Case -> (value, bound) of the case solved, by default what was known.
    """

    def __init__(self, monkeypatch, bounds, first=64.0, settled=None, filled=None, lowered=None,
                 solved=None):  # fmt: skip
        self.bounds, self.first, self.settled = bounds, first, settled or {}
        self.filled, self.lowered, self.solved = filled or {}, lowered or {}, solved or {}
        self.asked, self.relaxed = [], []
        for name in ("first_prices", "lower_prices", "relax", "open_best", "settle", "fill",
                     "solve_case"):  # fmt: skip
            monkeypatch.setattr(search, name, getattr(self, name))

    def first_prices(self, p, q, x, best):
        assert p is self.p
        self.asked.append(("first",))
        best[...] = 5.0 + np.arange(len(best))
        return self.first

    def lower_prices(self, p, q, x, case, steps, length, bound, best):
        assert p is self.p
        self.asked.append(("lower", case, steps, length, bound, best.tolist()))
        best += 1.0
        return self.lowered.get(case, bound)

    def relax(self, p, q):
        assert p is self.p
        self.relaxed.append(q.prices.tolist())
        q.bounds[...] = self.bounds
        return int(np.argmax(self.bounds))

    def open_best(self, p, q, case, opened):
        assert p is self.p
        opened[...] = case

    def settle(self, p, q, y, case, opened):
        assert (p, opened.tolist()) == (self.p, [case])
        self.asked.append(("settle", case))
        y.choice[...] = 10 + case
        return self.settled.get(case, NOTHING)

    def fill(self, p, q, y, case):
        assert (p, y.choice.tolist()) == (self.p, [10 + case])
        self.asked.append(("fill", case))
        return self.filled.get(case, 0.0)

    def solve_case(self, p, q, x, case, bound, utility, effort):
        assert p is self.p
        self.asked.append(("solve", case, bound, utility, effort, q.prices.tolist()))
        if case in self.solved:
            x.choice[...] = 20 + case
        return self.solved.get(case, (utility, bound))

    def run(self, effort=1, fresh=True, start=2, cases=None):
        """Run it; return its result, the choice then, and prices."""
        self.p = with_cases(len(self.bounds)) if cases is None else cases
        x, prices = blank(self.p), np.array([2.0, 3.0])
        x.choice[...] = start
        result = search.solve_one(self.p, x, prices, fresh, effort)
        self.prices = prices.tolist()
        return result, int(x.choice[0])

    def names(self, *which):
        return [call[:2] for call in self.asked if call[0] in which]


@pytest.fixture
def steps(monkeypatch):
    return lambda *bounds, **answers: Steps(monkeypatch, bounds, **answers)


@pytest.mark.parametrize("effort, taken", [(0, 12), (1, 12), (3, 36)])
def test_fresh_prices_take_steps_of_a_tenth_of_the_bound(steps, effort, taken):
    s = steps(32.0, solved={0: (7.0, 30.0)})
    assert s.run(effort) == ((7.0, 30.0), 20)
    assert s.asked == [
        ("first",), ("lower", -1, taken, 0.1 * 64, 64, [5, 6]),
        ("solve", 0, 32, NOTHING, effort, [6, 7]),
    ]  # fmt: skip
    assert s.prices == [6, 7]
    assert s.relaxed == [[6, 7]]


def test_many_resources_take_three_steps_each(steps):
    s = steps(32.0)
    s.p = knapsack([[0.0]], np.zeros((1, 1, 5)), [1] * 5)
    x = blank(s.p)
    x.choice[...] = 0
    search.solve_one(s.p, x, np.zeros(5), True, 2)
    assert s.asked[1] == ("lower", -1, 30, 0.1 * 64, 64, [5, 6, 7, 8, 9])


def test_prices_that_are_known_take_six_small_steps(steps):
    s = steps(16.0, 32.0)
    s.run(0, fresh=False)
    assert s.asked[0] == ("lower", -1, 6, 0.02 * 32, 32, [2, 3])
    assert s.relaxed[:2] == [[2, 3], [3, 4]]


@pytest.mark.parametrize("start, utility", [(0, 0.0), (2, NOTHING)])
def test_where_an_item_has_no_option_nothing_is_tried(steps, start, utility):
    s = steps(NOTHING, NOTHING, first=NOTHING)
    assert s.run(start=start) == ((utility, NOTHING), start)
    assert s.asked == [("first",)]


@pytest.mark.parametrize("start, known", [(0, 0.0), (1, 1.0), (2, NOTHING)])
def test_a_start_counts_where_it_fits(steps, start, known):
    s = steps(32.0)
    assert s.run(start=start) == ((known, 32.0), start)
    assert s.asked[-1][:4] == ("solve", 0, 32, known)


def test_a_start_that_no_case_allows_does_not_count(steps):
    s, p = steps(32.0, 31.0), with_cases(2)
    p.allowed[1, 1] = False
    assert s.run(start=1, cases=p) == ((NOTHING, 32.0), 1)


# -- a quick look ----------------------------------------------------------------------------


def test_four_cases_with_the_highest_bounds_are_looked_at(steps):
    s = steps(10.0, 30.0, 20.0, 50.0, 20.0, 40.0)
    s.run()
    assert s.names("settle", "fill") == [("settle", case) for case in (3, 5, 1, 2)]
    assert s.names("solve") == [("solve", 3)]  # nothing is known: the highest


def test_cases_bounded_by_what_is_found_are_not_looked_at(steps):
    s = steps(30.0, 50.0, 40.0, settled={1: 20.0, 2: 25.0}, filled={1: 9.0, 2: 5.0})
    assert s.run()[0] == (30.0, 50.0)
    assert s.names("settle", "fill") == [("settle", 1), ("fill", 1), ("settle", 2), ("fill", 2)]
    assert s.names("solve") == [("solve", 2)]
    assert s.run(start=0)[1] == 12


def test_a_bound_above_what_is_found_is_looked_at(steps):
    s = steps(30.0 + 1e-9, 50.0, settled={1: 30.0})
    s.run()
    assert s.names("settle") == [("settle", 1), ("settle", 0)]


@pytest.mark.parametrize("value, choice, utility", [
    (1.0, 1, 1.0), (1.0 + 1e-13, 1, 1.0), (1.5, 11, 1.5),
])  # fmt: skip
def test_what_is_better_than_the_start_is_kept(steps, value, choice, utility):
    s = steps(10.0, 20.0, settled={1: value})
    assert s.run(start=1) == ((utility, 20.0), choice)
    assert s.names("solve") == [("solve", 1)]


def test_the_first_of_equal_cases_is_solved(steps):
    s = steps(10.0, 20.0, 15.0, settled={0: 4.0, 1: 4.0, 2: 4.0})
    s.run()
    assert s.names("solve") == [("solve", 1)]


def test_where_none_can_be_settled_the_case_of_the_start_is_solved(steps):
    s = steps(40.0, 30.0, 20.0)
    s.run(start=1)  # which only the last case allows
    assert s.names("solve") == [("solve", 2)]
    s = steps(40.0, 30.0, 20.0, settled={0: -1.0})
    s.run(start=1)
    assert s.names("solve") == [("solve", 0)]
    s = steps(20.0, 30.0, 20.0)
    s.run(start=2)  # which does not fit
    assert s.names("solve") == [("solve", 1)]


def test_one_case_is_solved_without_a_look(steps):
    s = steps(40.0)
    s.run()
    assert [call[0] for call in s.asked] == ["first", "lower", "solve"]


# -- one case after another ------------------------------------------------------------------


@pytest.mark.parametrize("effort, order", [(0, [1]), (1, [1]), (2, [1, 3]), (3, [1, 3, 2]),
                                           (4, [1, 3, 2, 0]), (9, [1, 3, 2, 0])])  # fmt: skip
def test_effort_is_how_many_cases_are_solved(steps, effort, order):
    """First the one that looked best, then those with the highest bounds, the first of equals."""
    s = steps(20.0, 30.0, 35.0, 40.0, settled={1: 7.0})
    s.run(effort)
    assert [case for _, case in s.names("solve")] == order
    s = steps(35.0, 35.0, 35.0, settled={1: 7.0})
    s.run(effort)
    assert [case for _, case in s.names("solve")] == [1, 0, 2][: max(1, min(effort, 3))]


def test_a_case_takes_further_steps_from_the_common_prices(steps):
    s = steps(30.0, 50.0, lowered={1: 45.0, 0: 28.0}, solved={1: (20.0, 44.0), 0: (25.0, 27.0)})
    assert s.run(2) == ((25.0, 44.0), 20)
    assert s.asked[-4:] == [
        ("lower", 1, 6, 0.02 * 50, 50, [6, 7]), ("solve", 1, 45, NOTHING, 2, [7, 8]),
        ("lower", 0, 6, 0.02 * 30, 30, [6, 7]), ("solve", 0, 28, 20, 2, [7, 8]),
    ]  # fmt: skip
    assert s.relaxed == [[6, 7], [7, 8], [7, 8]]
    assert s.prices == [6, 7]


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_cases_within_a_ten_thousandth_are_not_solved(steps, scale):
    top = scale * 4096.0
    for gap, solves in ((0.4096 + 1e-9, 1), (0.4096 - 1e-9, 0)):
        s = steps(top, settled={0: top - gap})
        p = with_cases(1)
        p.value[0, 1] = top - gap
        assert s.run(start=1, cases=p) == ((top - gap, top), 1)
        assert len(s.names("solve")) == solves


def test_cases_without_any_option_are_not_solved(steps):
    s = steps(NOTHING, 30.0, NOTHING)
    assert s.run(3)[0] == (NOTHING, 30.0)
    assert s.names("solve") == [("solve", 1)]


def test_the_bound_is_the_highest_of_all_cases_and_the_value(steps):
    s = steps(30.0, 50.0, 45.0, solved={1: (20.0, 21.0)})
    assert s.run()[0] == (20.0, 45.0)
    s = steps(30.0, 50.0, solved={1: (35.0, 21.0)})
    assert s.run()[0] == (35.0, 35.0)
    s = steps(30.0, 50.0, lowered={1: 25.0})
    assert s.run()[0] == (NOTHING, 30.0)


def test_the_lowest_of_five_cases_is_not_looked_at(steps):
    for lowest in (10.0, 20.0):
        s = steps(50.0, 40.0, 30.0, 20.0, lowest)
        s.run()
        assert s.names("settle") == [("settle", case) for case in range(4)]


def test_the_second_case_may_be_solved_last(steps):
    s = steps(20.0, 30.0, 40.0, settled={2: 7.0})
    s.run(3)
    assert s.names("solve") == [("solve", 2), ("solve", 1), ("solve", 0)]


@pytest.mark.parametrize("value, choice", [(1.25, 1), (1.5, 11)])
def test_what_is_settled_has_to_gain_more_than_rounding(steps, monkeypatch, value, choice):
    monkeypatch.setattr(search, "EPSILON", 0.25)
    assert steps(10.0, 20.0, settled={1: value}).run(start=1)[1] == choice


def test_a_gap_of_just_a_ten_thousandth_is_left_alone(steps):
    p = with_cases(1)
    p.value[0, 1] = 9999.0
    s = steps(10000.0)
    assert s.run(start=1, cases=p) == ((9999.0, 10000.0), 1)
    assert not s.names("solve")
