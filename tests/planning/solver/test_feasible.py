"""Any choice that fits: flips under rising weights, and what is done in which order."""

from itertools import product

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import feasible, instance
from tests.planning.solver.tiny import (
    NOTHING,
    at_prices,
    blank,
    changed,
    draw_choice,
    drawn,
    for_seeds,
    knapsack,
    right,
    taken,
)

FOUND, UNKNOWN, IMPOSSIBLE = 0, 1, 2


# -- overuse and weights ---------------------------------------------------------------------


def over(p, choice, weights):
    """By how much a choice is over capacity, in weighted shares."""
    more = np.maximum(tiny.used(p, choice) - p.capacity, 0)
    return float((weights * (more / np.maximum(p.capacity, 1))).sum())


@for_seeds(10)
def test_overuse_is_counted_in_weighted_shares_of_capacity(seed):
    p = drawn(seed, items=4, options=3, share=0.3)
    q, weights = at_prices(p, [0, 0, 0]), np.array([0.5, 1.0, 1.25])
    for choice in tiny.everything(p)[::7]:
        x = taken(p, choice)
        assert feasible.overuse(p, q, x, weights) == over(p, choice, weights)
        for i, k in product(range(4), range(3)):
            after = over(p, changed(choice, (i, k)), weights)
            assert feasible.overuse_after(p, q, x, weights, i, k, np.inf) == after
            for most in (after / 2, after, after + 1):
                found = feasible.overuse_after(p, q, x, weights, i, k, most)
                assert found == after if after < most else most <= found <= after


@pytest.mark.parametrize("most, found", [(0.0, 1.0), (1.0, 1.0), (1.25, 3.0), (9.0, 7.0)])
def test_overuse_is_counted_up_to_what_is_asked(most, found):
    p = knapsack([[0, 0]], [[[0, 0, 0], [2, 3, 5]]], [1, 1, 1])
    x, q, weights = taken(p, [0]), at_prices(p, [0, 0, 0]), np.ones(3)
    assert feasible.overuse_after(p, q, x, weights, 0, 1, most) == found


def test_what_is_over_weighs_a_tenth_more_and_the_mean_stays():
    p = knapsack(np.zeros((1, 1)), np.zeros((1, 1, 3)), [4, 5, 6])
    x, weights = blank(p), np.array([1.5, 1.0, 0.5])
    x.used[...] = 5, 5, 7
    feasible.reweigh(p, x, weights)
    assert weights == pytest.approx(np.array([1.65, 1, 0.55]) * 3 / 3.2, rel=1e-14)


# -- flips -----------------------------------------------------------------------------------


def pressed(p, choice, left, flips):
    """Flips that leave least overuse, none back for three flips, under weights that rise."""
    weights, barred = np.ones(len(p.capacity)), {}
    for step in range(flips):
        if tiny.fits(p, choice):
            return choice, True
        after = {
            (i, k): over(p, changed(choice, (i, k)), weights)
            for i, k in zip(*np.nonzero(left), strict=True)
            if k != choice[i] and step >= barred.get((i, k), 0)
        }
        if min(after.values(), default=np.inf) >= over(p, choice, weights):
            weights = np.where(tiny.used(p, choice) > p.capacity, 1.1 * weights, weights)
            weights = weights / weights.mean()
        if after:
            i, k = min(after, key=after.get)
            barred[i, choice[i]] = step + 4
            choice = changed(choice, (i, k))
    return choice, tiny.fits(p, choice)


@pytest.mark.parametrize("flips", [0, 1, 2, 3, 5, 12])
@for_seeds(20)
def test_items_are_flipped_to_least_weighted_overuse(seed, flips):
    p = drawn(seed, items=4, options=3, share=0.25, groups=1 + seed % 2)
    left = np.random.default_rng(seed).random((4, 3)) < 0.7
    choice = draw_choice(p, seed)
    x = taken(p, choice)
    wanted, fits = pressed(p, choice, left, flips)
    assert feasible.press(p, at_prices(p, [0, 0, 0]), x, left, flips) == fits
    assert x.choice.tolist() == wanted.tolist()
    assert right(p, x)


def test_what_was_flipped_stays_for_three_flips():
    """One item of two options that never fit: it goes, and is back at the fifth chance only."""
    p = knapsack([[0, 0]], [[[5], [6]]], [4])
    ends = []
    for flips in range(11):
        x = taken(p, [0])
        assert not feasible.press(p, at_prices(p, [0]), x, np.ones((1, 2), dtype=bool), flips)
        ends.append(int(x.choice[0]))
    assert ends == [0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("flips, fits", [(0, False), (1, True)])
def test_the_last_flip_counts(flips, fits):
    p = knapsack([[0, 0]], [[[5], [4]]], [4])
    x, left = taken(p, [0]), np.ones((1, 2), dtype=bool)
    assert feasible.press(p, at_prices(p, [0]), x, left, flips) == fits


# -- one case after another ------------------------------------------------------------------


class Phases:
    """Stands in for what ``first_fit`` calls: answers by case, and notes what is asked."""

    def __init__(self, monkeypatch, may=(), flips=(), search=()):
        self.asked, self.answers = [], {"may": may, "flips": flips, "search": search}
        monkeypatch.setattr(feasible, "may_fit", self.may_fit)
        monkeypatch.setattr(feasible, "press", self.press)
        monkeypatch.setattr(feasible, "complete", self.complete)

    def may_fit(self, p, q, case, left, prices, steps):
        self.asked.append(("may", case, left.tolist(), prices.tolist(), steps))
        self.case, prices[...] = case, 9.0
        return self.answers["may"][case]

    def press(self, p, q, x, left, flips):
        assert right(p, x)
        self.asked.append(("flips", x.choice.tolist(), flips))
        x.choice[...] = 0
        return self.answers["flips"][self.case]

    def complete(self, p, q, x, case, left, prices, nodes):
        self.asked.append(("search", case, prices.tolist(), nodes))
        return self.answers["search"][case]


def cases():
    """Two items of three options, two cases; the first item may not take 0, nor the second 2."""
    return knapsack(
        [[NOTHING, 1, 2], [3, 4, 5]], [[[0], [1], [1]], [[1], [1], [8]]], [4],
        mode=[[0], [1]], allowed=[[True, True, False], [True, False, True]],
    )  # fmt: skip


LEFT = [[False, True, False], [True, True, False]], [[False, False, True], [True, False, False]]
LATER = 3_000_000 // (2 * 3 * 1 * 2)


@pytest.mark.parametrize("effort", [1, 3])
def test_each_case_is_narrowed_pressed_and_searched(monkeypatch, effort):
    phases = Phases(monkeypatch, [True, True], [False, False], [(False, 4), (False, 1)])
    p = cases()
    x = blank(p)
    x.choice[...] = 2, 2
    assert feasible.first_fit(p, x, effort) == IMPOSSIBLE
    nodes, flips = 1 + LATER * effort, 2000 * effort
    assert phases.asked == [
        ("may", 0, LEFT[0], [1], 120), ("flips", [1, 0], flips), ("search", 0, [9], nodes),
        ("may", 1, LEFT[1], [1], 120), ("flips", [2, 0], flips), ("search", 1, [9], nodes),
    ]  # fmt: skip


@pytest.mark.parametrize("answers, outcome, phases", [
    (([True], [True], []), FOUND, ["may", "flips"]),
    (([True], [False], [(True, 0)]), FOUND, ["may", "flips", "search"]),
    (([False, True], [None, True], []), FOUND, ["may", "may", "flips"]),
    (([False, False], [], []), IMPOSSIBLE, ["may", "may"]),
    (([True, False], [False], [(False, 0)]), UNKNOWN, ["may", "flips", "search", "may"]),
    (([False, True], [None, False], [None, (False, 0)]), UNKNOWN,
     ["may", "may", "flips", "search"]),
    (([True, True], [False] * 2, [(False, 0), (False, 1)]), UNKNOWN,
     ["may", "flips", "search"] * 2),
])  # fmt: skip
def test_what_is_found_ends_it_and_what_is_not_settled_is_unknown(
    monkeypatch, answers, outcome, phases
):
    asked = Phases(monkeypatch, *answers)
    x = blank(cases())
    x.choice[...] = 0
    assert (feasible.FOUND, feasible.UNKNOWN, feasible.IMPOSSIBLE) == (0, 1, 2)
    assert feasible.first_fit(cases(), x, 1) == outcome
    assert [call[0] for call in asked.asked] == phases


@for_seeds(30)
def test_a_choice_is_found_where_there_is_one(seed):
    p = drawn(seed, items=4, options=3, share=0.25)
    x = blank(p)
    x.choice[...] = draw_choice(p, seed)
    able = [c for c in tiny.everything(p) if tiny.fits(p, c) and tiny.worth(p, c) > NOTHING
            and any(tiny.obeys(p, c, case) for case in range(3))]  # fmt: skip
    outcome = feasible.first_fit(p, x, 1)
    assert outcome == (FOUND if able else IMPOSSIBLE)
    if able:
        assert x.choice.tolist() in [c.tolist() for c in able]


def test_every_client_gets_its_own_choice_and_outcome():
    """Costs 3 and 1 of 1, 0, and 3; the second cannot, and what it tried is of no matter."""
    p = cases()
    b = instance.Batch(
        value=np.zeros((1, 2, 2)), cost=np.array([[[[3], [1]], [[0], [2]]]]),
        ladder=np.zeros((1, 1, 1, 1), dtype=np.int64), table=np.zeros(3, dtype=np.int64),
        capacity=np.array([[1], [0], [3]]), first=p.first, group=p.group,
        level=p.level[:2], mode=np.zeros((1, 1), dtype=np.int64),
        allowed=np.ones((1, 2), dtype=bool),
    )  # fmt: skip
    choice, outcome = np.array([[0, 0], [1, 1], [0, 0]]), np.full(3, 77)
    feasible.fit_all(b, choice, outcome, 1)
    assert outcome.tolist() == [FOUND, IMPOSSIBLE, FOUND]
    assert choice[[0, 2]].tolist() == [[1, 0], [0, 0]]
