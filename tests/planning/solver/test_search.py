"""Search over flips: it finds the best choice, in as few nodes as its rules say."""

from itertools import product

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import prices, search
from tests.planning.solver.rules import repaired
from tests.planning.solver.tiny import (
    NOTHING,
    at_prices,
    blank,
    draw_choice,
    draw_prices,
    drawn,
    for_seeds,
    knapsack,
    right,
    taken,
)


def solved(seed, share=0.5, **sizes):
    """A knapsack with its dual solved at some prices, a case, and levels of groups."""
    p = drawn(seed, **{"items": 4, "options": 3, "share": share, **sizes})
    p.value[:, 0] = np.maximum(p.value[:, 0], -1)
    q = at_prices(p, draw_prices(p, seed))
    prices.relax(p, q)
    return p, q, seed % 3, np.random.default_rng(seed).integers(0, 3, len(p.ladder))


def best_at_prices(p, q, case, opened):
    groups = p.group
    return [int(q.arg[p.mode[case, g], opened[g], i]) for i, g in enumerate(groups)]


def explored(p, q, case, opened, bound, utility, nodes):
    """Depth-first over flips, least regret first: value, choice or None, and the nodes left."""
    base, best = best_at_prices(p, q, case, opened), None
    flips = sorted(
        (q.gains[base[i], i] - q.gains[k, i], i, k)
        for i, k in product(range(len(base)), range(p.value.shape[1]))
        if k != base[i] and p.level[k] <= opened[p.group[i]]
        and p.allowed[p.mode[case, p.group[i]], k]
    )  # fmt: skip

    def look(choice):
        nonlocal utility, best
        if tiny.worth(p, choice) > utility + 1e-12 and tiny.fits(p, choice):
            utility, best = tiny.worth(p, choice), choice

    def visit(start, lost, choice, flipped):
        nonlocal nodes
        for at, (regret, i, k) in enumerate(flips[start:], start):
            if lost + regret >= bound - utility - 1e-12 or not nodes:
                return
            if i not in flipped:
                nodes -= 1
                after = tiny.changed(choice, (i, k))
                look(after)
                visit(at + 1, lost + regret, after, flipped | {i})

    look(base)
    visit(0, 0.0, base, set())
    return utility, best, nodes


@pytest.mark.parametrize("nodes", [0, 1, 2, 5, 17, 1000])
@for_seeds(40)
def test_branches_are_left_where_regrets_use_up_the_bound(seed, nodes):
    p, q, case, opened = solved(seed)
    bound = q.bounds[case] - [0, 0, 0.5, 2][seed % 4]
    start = draw_choice(p, seed)
    utility = NOTHING if seed % 3 else min(bound - 2, 1.0)
    x = taken(p, start)
    value, choice, rest = explored(p, q, case, opened, bound, utility, nodes)
    found = search.search(p, q, x, case, opened, bound, utility, nodes)
    assert found == (value, rest)
    assert x.choice.tolist() == list(start if choice is None else choice)


@for_seeds(25)
def test_with_enough_nodes_the_best_choice_is_found(seed):
    p, q, case, _ = solved(seed, items=4, options=3)
    value, rest = search.search(
        p, q, blank(p), case, np.full(2, 2), sum(q.prices) + 99.0, NOTHING, 9999
    )
    assert value == tiny.optimum(p, case)
    assert rest > 0


def test_flips_that_lose_the_whole_gap_are_not_listed(monkeypatch):
    p = knapsack([[4, 3, 2, 1]], np.zeros((1, 4, 1)), [1])
    q, listed = at_prices(p, [0.0]), []
    prices.relax(p, q)
    insert = search.insert
    monkeypatch.setattr(search, "insert", lambda *a: (listed.append(a[:3]), insert(*a))[1])
    opened = np.zeros(1, dtype=np.int64)
    search.search(p, q, blank(p), 0, opened, 4.0, 2.0, 9)
    assert listed == [(0, 1, 1.0)]


@for_seeds(30)
def test_the_best_choice_at_the_prices_is_repaired(seed):
    p, q, case, opened = solved(seed, share=0.3)
    x = blank(p)
    choice, fits = repaired(p, best_at_prices(p, q, case, opened), case)
    value = search.settle(p, q, x, case, opened)
    assert value == (tiny.worth(p, choice) if fits else NOTHING)
    assert x.choice.tolist() == choice.tolist()
    assert right(p, x)


# -- all of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", [0, 1, 2])
@for_seeds(25)
def test_what_is_found_fits_and_is_bounded(seed, effort):
    p = drawn(seed, items=4, options=3, share=0.4)
    x, at = blank(p), np.full(3, 77.0)
    start = draw_choice(p, seed)
    x.choice[...] = start
    value, bound = search.solve_one(p, x, at, True, effort)
    best = max(tiny.optimum(p, case) for case in range(3))
    assert value <= best <= bound + 1e-12
    if value > NOTHING:
        assert value == tiny.worth(p, x.choice)
        assert tiny.fits(p, x.choice)
        assert any(tiny.obeys(p, x.choice, case) for case in range(3))
        assert effort < 2 or value == best
    if tiny.fits(p, start) and any(tiny.obeys(p, start, case) for case in range(3)):
        assert value >= tiny.worth(p, start)


def look(monkeypatch, bound, utility, epsilon=0.25):
    """Search where a choice of value 4 does not fit, and flips lose 1, 2 and 3."""
    monkeypatch.setattr(search, "EPSILON", epsilon)
    p = knapsack([[4, 3, 2, 1], [0, 0, 0, 0]], [[[1], [0], [0], [0]], [[1]] * 4], [1])
    p.value[1, 1:] = NOTHING
    q, x = at_prices(p, [0.0]), blank(p)
    prices.relax(p, q)
    x.choice[...] = 3, 3
    found = search.search(p, q, x, 0, np.zeros(1, dtype=np.int64), bound, utility, 9)
    return found, x.choice.tolist()


def test_flips_have_to_gain_more_than_rounding(monkeypatch):
    assert look(monkeypatch, 9.0, 2.5) == ((3.0, 6), [1, 0])
    assert look(monkeypatch, 9.0, 2.75) == ((2.75, 6), [3, 3])
    assert look(monkeypatch, 9.0, 3.25) == ((3.25, 6), [3, 3])
    # What a flip loses has to be less than the gap, by more than that.
    assert look(monkeypatch, 4.25, 3.0) == ((3.0, 9), [3, 3])
    assert look(monkeypatch, 4.5, 3.0) == ((3.0, 8), [3, 3])


@pytest.mark.parametrize("utility, kept", [(3.75, True), (3.5, False), (4.25, True)])
def test_the_best_choice_at_the_prices_has_to_gain_more_than_rounding(monkeypatch, utility, kept):
    monkeypatch.setattr(search, "EPSILON", 0.25)
    p = knapsack([[4, 3]], [[[1], [0]]], [1])
    q, x = at_prices(p, [0.0]), blank(p)
    prices.relax(p, q)
    x.choice[...] = 1
    value, _ = search.search(p, q, x, 0, np.zeros(1, dtype=np.int64), 4.0, utility, 0)
    assert (value, int(x.choice[0])) == ((utility, 1) if kept else (4, 0))
