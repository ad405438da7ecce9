"""The dual: its value and what attains it, first prices, and steps with space dilation."""

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import prices as solver
from tests.planning.solver.tiny import (
    NOTHING,
    at_prices,
    blank,
    draw_prices,
    drawn,
    dual,
    for_seeds,
    knapsack,
)

# -- the dual at some prices -----------------------------------------------------------------


def best_options(p, gain, mode, level):
    """Each item's best option of at most a level: first of what opens least, then the first."""
    out = []
    for i in range(len(p.value)):
        may = [k for k in np.argsort(p.level, kind="stable") if p.level[k] <= level]
        may = [k for k in may if p.allowed[mode, k] and gain[k, i] > NOTHING]
        out.append(max(may, key=lambda k: gain[k, i], default=0))
    return out


@pytest.mark.parametrize("resources", [1, 2, 3, 4])
@for_seeds(12)
def test_the_dual_is_what_its_definition_says(seed, resources):
    p, draw = drawn(seed, resources=resources, groups=3), np.random.default_rng(seed)
    p.allowed[:, 0] = draw.random(2) < 0.8
    prices = draw.integers(1, 9, resources) / 8 * (draw.random(resources) < 0.5 + seed % 2)
    nets, bounds = dual(p, prices)
    q = at_prices(p, prices)
    q.gains[...] = 77.0
    top = solver.relax(p, q)
    assert np.array_equal(q.gains, tiny.gains(p, prices))
    assert np.array_equal(q.nets, nets)
    assert np.array_equal(q.net, nets.max(axis=1))
    assert np.array_equal(q.opened, nets.argmax(axis=1))
    assert np.array_equal(q.bounds, bounds)
    assert top == bounds.argmax()
    for mode in range(2):
        for level in range(3):
            wanted = best_options(p, q.gains, mode, level)
            assert q.arg[mode, level].tolist() == wanted


def test_by_hand():
    """One group: 8 - 2 - 3, or 4 - 1 of the item that opens nothing; prices are 4 and 2."""
    p = knapsack([[0, 4, 8]], [[[0, 0], [1, 0], [1, 2]]], [4, 4], [[[0, 0], [1, 4]]],
                 level=[0, 0, 1])  # fmt: skip
    q = at_prices(p, [4.0, 2.0])
    assert solver.relax(p, q) == 0
    assert q.nets.tolist() == [[[4 - 1], [8 - 1 - 1 - 1 - 2]]]
    assert q.bounds.tolist() == [4 + 2 + 3]
    assert q.opened.tolist() == [[0]]
    assert q.arg.tolist() == [[[1], [2]]]


@for_seeds(30)
def test_no_choice_is_worth_more_than_the_dual(seed):
    p = drawn(seed, items=4, options=3)
    q = at_prices(p, draw_prices(p, seed))
    top = solver.relax(p, q)
    for case in range(3):
        assert tiny.optimum(p, case) <= q.bounds[case] <= q.bounds[top]


def attained(p, prices, case):
    """The dual in a case (-1: the largest), levels and a choice that attain it, and its slack."""
    nets, bounds = dual(p, prices)
    case = bounds.argmax() if case < 0 else case
    opened = [nets[mode, :, g].argmax() for g, mode in enumerate(p.mode[case])]
    gain, choice = tiny.gains(p, prices), []
    for i, g in enumerate(p.group):
        choice.append(best_options(p, gain, p.mode[case, g], opened[g])[i])
    use = p.cost[np.arange(len(choice)), choice].sum(axis=0)
    use = use + p.ladder[np.arange(len(opened)), opened].sum(axis=0)
    return bounds[case], opened, choice, 1 - use / np.maximum(p.capacity, 1)


@pytest.mark.parametrize("case", [-1, 0, 1, 2])
@for_seeds(12)
def test_a_subgradient_is_the_slack_of_what_attains_the_dual(seed, case):
    p = drawn(seed, groups=3)
    prices = draw_prices(p, seed)
    bound, opened, choice, slack = attained(p, prices, case)
    x, slope, q = blank(p), np.full(3, 77.0), at_prices(p, prices)
    assert solver.slack_at(p, q, case, x, slope) == bound
    assert x.tops.tolist() == opened
    assert x.choice.tolist() == choice
    assert slope.tolist() == slack.tolist()
    assert q.at.tolist() == [(i * 4 + k) * 3 for i, k in enumerate(choice)]


@pytest.mark.parametrize("case", [0, 1, 2])
def test_groups_are_opened_and_items_chosen_as_a_case_says(case):
    p = drawn(3, groups=2)._replace(mode=np.array([[0, 1], [1, 0], [1, 1]]))
    q = at_prices(p, [0.5, 0.25, 1.0])
    solver.relax(p, q)
    q.opened[...] = [[0, 1], [2, 0]]
    opened, choice = np.full(2, 77), np.full(5, 77)
    solver.open_best(p, q, case, opened)
    assert opened.tolist() == [[0, 0], [2, 1], [2, 0]][case]
    levels = np.array([1, 2])
    solver.pick(p, q, case, levels, choice)
    modes = p.mode[case][p.group]
    assert choice.tolist() == [q.arg[modes[i], levels[p.group[i]], i] for i in range(5)]


# -- first prices ----------------------------------------------------------------------------


def bisected(p):
    """The least of the dual at 0 and at three prices between a thousandth of it and itself."""
    zero = np.zeros(len(p.capacity))
    bound, _, _, slack = attained(p, zero, -1)
    direction = np.maximum(-slack, 0)
    if not direction.any() or bound == NOTHING:
        return bound, zero
    direction = direction / direction.sum()
    low, high, found = bound / 1000, bound, [(bound, 0.0)]
    for _ in range(3):
        at = np.sqrt(low * high)
        value, _, _, slack = attained(p, at * direction, -1)
        found.append((value, at))
        low, high = (at, high) if slack @ direction < 0 else (low, at)
    bound, at = min(found)
    return bound, at * direction


@for_seeds(30)
def test_first_prices_are_bisected_along_overuse(seed):
    p = drawn(seed, share=0.15 + 0.1 * (seed % 5), options=3)
    bound, prices = bisected(p)
    best, q = np.full(3, 77.0), at_prices(p, [1.0, 2.0, 3.0])
    assert solver.first_prices(p, q, blank(p), best) == pytest.approx(bound, rel=1e-12)
    assert best == pytest.approx(prices, rel=1e-12)


def test_first_prices_by_hand():
    """Both items want all of the second resource, twice; the dual is least where one lets go."""
    p = knapsack([[0, 4], [0, 16]], [[[0, 0], [1, 4]], [[0, 0], [1, 4]]], [4, 4])
    # D(0) = 20. At p = sqrt(20 * 0.02): p + 3.37 + 15.37; at sqrt(0.63 * 20) = 3.56: 16.44 less;
    # at sqrt(3.56 * 20) = 8.43: 16.
    best = np.full(2, 77.0)
    assert solver.first_prices(p, at_prices(p, [1, 1]), blank(p), best) == pytest.approx(16)
    assert best == pytest.approx([0, 20 * 10 ** (-3 / 8)])


def test_where_all_fits_prices_are_0():
    p = knapsack([[0, 4]], [[[0, 0], [4, 1]]], [4, 4])
    best = np.full(2, 77.0)
    assert solver.first_prices(p, at_prices(p, [1, 1]), blank(p), best) == 4
    assert best.tolist() == [0, 0]


def test_where_nothing_is_allowed_the_bound_says_so():
    p = knapsack([[NOTHING], [0]], [[[0]], [[9]]], [4])
    best = np.full(1, 77.0)
    assert solver.first_prices(p, at_prices(p, [1]), blank(p), best) == NOTHING
    assert best.tolist() == [0]
    # An item that is too dear by itself has no option either, though all that is left is over.
    p = knapsack([[NOTHING], [0]], [[[3]], [[3]]], [4])
    assert solver.first_prices(p, at_prices(p, [1]), blank(p), best) == NOTHING


# -- steps -----------------------------------------------------------------------------------


def lowered(p, case, steps, length, bound, best):
    """Subgradient steps with dilation of space, by matrices (N. Z. Shor, 1985)."""
    resources = len(best)
    base, step, before = np.eye(resources), None, None
    prices = best = np.array(best, dtype=float)
    for turn in range(steps + 1):
        value, _, _, slope = attained(p, prices, case)
        if value < bound:
            bound, best = value, prices
        slope = np.where((prices <= 0) & (slope > 0), 0, slope)
        if turn:
            length *= 1.3 if slope @ step > 0 else 0.75
            turned = base.T @ (slope - before)
            if turned @ turned > 1e-12:
                unit = turned / np.linalg.norm(turned)
                base = base @ (np.eye(resources) - (1 - 1 / 2) * np.outer(unit, unit))
        steepest = base.T @ slope
        if steepest @ steepest < 1e-12:
            break
        step, before = base @ steepest / np.linalg.norm(steepest), slope
        prices = np.maximum(prices - length * step, 0)
    return bound, best, prices


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
@for_seeds(12)
def test_steps_follow_subgradients_in_dilated_space(seed, steps):
    p = drawn(seed, share=0.3, items=6)
    case, best = seed % 4 - 1, draw_prices(p, seed)
    length, bound = 0.3, attained(p, best, case)[0]
    wanted, prices, last = lowered(p, case, steps, length, bound, best)
    q = at_prices(p, [77.0, 77.0, 77.0])
    found = solver.lower_prices(p, q, blank(p), case, steps, length, bound, best)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert best == pytest.approx(prices, rel=1e-9)
    assert q.prices == pytest.approx(last, rel=1e-9)


def test_one_step_by_hand():
    """The slope is (1 - 2, 1 - 3) / sqrt 5; the third resource, unused at price 0, stays."""
    costs = [[[0, 0, 0], c] for c in ([4, 4, 0], [2, 4, 0], [2, 4, 0])]
    p = knapsack([[0, 99], [0, 99], [0, 99]], costs, [4, 4, 4])
    best, q = np.array([1.0, 0.0, 0.0]), at_prices(p, [0, 0, 0])
    bound = 297 - 1
    found = solver.lower_prices(p, q, blank(p), -1, 0, np.sqrt(5), float(bound), best)
    assert (found, best.tolist()) == (bound, [1, 0, 0])
    assert q.prices == pytest.approx([2, 2, 0])  # where the next step would be
    found = solver.lower_prices(p, q, blank(p), -1, 1, np.sqrt(5), float(bound), best)
    assert found == pytest.approx(bound - 1 * 1 - 2 * 2)
    assert best == pytest.approx([2, 2, 0])


def test_steps_end_where_the_slope_is_0():
    p = knapsack([[0, 4]], [[[0], [4]]], [4])
    best, q = np.array([2.0]), at_prices(p, [0])
    assert solver.lower_prices(p, q, blank(p), 0, 5, 1.0, 4.0, best) == 4
    assert q.prices.tolist() == best.tolist() == [2]


def test_a_bound_that_is_lower_already_is_kept():
    p = knapsack([[0, 4], [0, 4]], [[[0], [4]], [[0], [4]]], [4])
    best = np.array([0.0])
    assert solver.lower_prices(p, at_prices(p, [0]), blank(p), 0, 1, 1.0, 6.0, best) == 6
    assert best.tolist() == [0]


# -- ties and limits, by the dual's answers --------------------------------------------------


class Answers:
    """Stands in for the dual of two resources: values and slacks in order; notes prices."""

    def __init__(self, monkeypatch, *answers):
        self.answers, self.asked = iter(answers), []
        monkeypatch.setattr(solver, "slack_at", self.slack_at)
        p = knapsack([[0.0]], np.zeros((1, 1, 2)), [1, 1])
        self.q = at_prices(p, [77, 77])
        self.given = p, self.q, blank(p)

    def slack_at(self, p, q, case, x, slope):
        self.asked.append(q.prices.tolist())
        value, slope[...] = next(self.answers)
        return value

    def lower(self, steps, bound, start):
        best = np.array(start, dtype=float)
        return solver.lower_prices(*self.given, -1, steps, 1.0, bound, best), best.tolist()


def test_the_first_of_equal_bounds_keeps_its_prices(monkeypatch):
    best = np.full(2, 77.0)
    a = Answers(monkeypatch, (100.0, [-3, 0]), (90.0, [0, 9]), (90.0, [0, 1]), (90.0, [1, 0]))
    assert solver.first_prices(*a.given, best) == 90
    half = 100 * 10**-1.5
    assert a.asked[0] == [0, 0]
    assert a.asked[1] == best.tolist() == pytest.approx([half, 0])
    # Where slack is 0 along the direction, prices fall.
    assert a.asked[2] == pytest.approx([np.sqrt(0.1 * half), 0])
    assert a.asked[3] == pytest.approx([np.sqrt(0.1 * np.sqrt(0.1 * half)), 0])
    a = Answers(monkeypatch, (9.0, [-1, 0]), (9.0, [-1, 0]), (8.0, [-1, 0]))
    assert a.lower(2, 9.0, [4, 4]) == (8, [6.3, 4])
    a = Answers(monkeypatch, (9.0, [-1, 0]), (9.0, [-1, 0]))
    assert a.lower(1, 9.0, [4, 4]) == (9, [4, 4])


def test_a_resource_that_just_fits_is_no_direction(monkeypatch):
    best = np.full(2, 77.0)
    a = Answers(monkeypatch, (100.0, [0, -1]), *[(90.0, [0, -1])] * 3)
    solver.first_prices(*a.given, best)
    assert a.asked[1] == pytest.approx([0, 100 * 10**-1.5])


@pytest.mark.parametrize("slack, length", [([-1, 0], 1.3), ([0, -1], 0.75), ([0.5, 0], 0.75)])
def test_a_step_is_longer_where_it_still_descends(monkeypatch, slack, length):
    """The first step is (-1, 0), away from the slope, which is turned by half with dilation."""
    a = Answers(monkeypatch, (9.0, [-1, 0]), (9.0, slack))
    a.lower(1, 9.0, [4, 4])
    assert a.asked == [[4, 4], [5, 4]]
    moved = a.q.prices - [5, 4]
    if slack != [0, -1]:
        assert moved == pytest.approx(-length * np.sign(slack) * [1 if slack[0] < 0 else 0.5, 1])
    else:  # dilated along (1, -1): slopes there count half, squared a quarter
        inner = np.eye(2) - np.array([[1, -1], [-1, 1]]) / 4
        assert moved == pytest.approx(-length * inner @ inner @ slack / np.hypot(*inner @ slack))


def test_a_price_of_0_does_not_fall(monkeypatch):
    a = Answers(monkeypatch, (9.0, [0.5, -0.5]), (9.0, [0.5, -0.5]))
    a.lower(1, 9.0, [0, 1])
    assert a.asked == [[0, 1], [0, 2]]
    assert a.q.prices.tolist() == [0, 2 + 1.3]
    a = Answers(monkeypatch, (9.0, [-3, 4]))
    a.lower(0, 9.0, [0, 2])
    assert a.q.prices == pytest.approx([0.6, 1.2])


def test_slopes_that_are_as_good_as_0_end_it_and_do_not_dilate(monkeypatch):
    monkeypatch.setattr(solver, "EPSILON", 0.25)
    a = Answers(monkeypatch, (9.0, [-0.5, 0]))  # of norm EPSILON: still a slope
    a.lower(0, 9.0, [4, 4])
    assert a.q.prices.tolist() == [5, 4]
    a = Answers(monkeypatch, (9.0, [-0.25, 0]))
    a.lower(5, 9.0, [4, 4])
    assert a.asked == [[4, 4]]
    # From -2 to -1.5: a difference of norm EPSILON does not dilate, that to -1 does.
    for slack, third in ((-1.5, 1.3), (-1, 1.3 / 2)):
        a = Answers(monkeypatch, (9.0, [-2, -2]), (9.0, [slack, -2]))
        a.lower(1, 9.0, [4, 4])
        moved = a.q.prices - a.asked[1]
        assert (moved[0] / moved[1] == pytest.approx(slack / -2)) == (third == 1.3)
