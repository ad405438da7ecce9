"""Exact search: what is struck out is in no choice that fits, and nodes are counted."""

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import exact
from tests.planning.solver.tiny import NOTHING, at_prices, blank, drawn, for_seeds, knapsack


def tight(seed, share=0.4, **sizes):
    """A knapsack whose options all cost, and what a case and capacity leave of each item."""
    p = drawn(seed, **{"items": 4, "options": 3, "share": share, **sizes})
    case = seed % 3
    left = np.array([[tiny.allows(p, case, i, k) for k in range(p.value.shape[1])]
                     for i in range(len(p.value))])  # fmt: skip
    return p, case, left


def possible(p, left):
    """All choices that fit, of options that are left."""
    items = np.arange(len(left))
    return [c for c in tiny.everything(p) if left[items, c].all() and tiny.fits(p, c)]


# -- sums of least costs ---------------------------------------------------------------------


def least(p, left):
    """What items and openings cost at least [R], where each item has an option left."""
    low = np.array([p.cost[i, left[i]].min(axis=0) for i in range(len(left))])
    floor = np.zeros(len(p.ladder), dtype=np.int64)
    for i, g in enumerate(p.group):
        floor[g] = max(floor[g], p.level[left[i]].min())
    return low.sum(axis=0) + p.ladder[np.arange(len(floor)), floor].sum(axis=0), low, floor


def narrowed(p, left):
    """Options that are left when none can be struck out any more; None where nothing fits."""
    left, struck = left.copy(), True
    while struck:
        if not left.any(axis=1).all() or (least(p, left)[0] > p.capacity).any():
            return None
        struck = False
        for i, k in zip(*np.nonzero(left), strict=True):
            alone = left.copy()
            alone[i] = np.arange(left.shape[1]) == k
            need, low, floor = least(p, left)
            g, top = p.group[i], max(floor[p.group[i]], p.level[k])
            need = need - low[i] + p.cost[i, k] - p.ladder[g, floor[g]] + p.ladder[g, top]
            if (need > p.capacity).any():
                left[i, k], struck = False, True
                break
    return left


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6])
@for_seeds(30)
def test_options_are_struck_out_until_sums_of_least_costs_leave_room_for_all(seed, share):
    p, _, left = tight(seed, share, groups=1 + seed % 2, resources=1 + seed % 3)
    wanted, fits = narrowed(p, left), possible(p, left)
    assert exact.narrow(p, left) == (wanted is not None)
    if wanted is None:
        assert not fits
    else:
        assert np.array_equal(left, wanted)
        assert len(possible(p, left)) == len(fits)


def test_an_item_without_options_ends_it():
    p = knapsack(np.zeros((2, 2)), np.zeros((2, 2, 1)), [1])
    assert not exact.narrow(p, np.array([[True, True], [False, False]]))
    assert not exact.narrow(p, np.array([[False, False], [True, True]]))
    assert exact.narrow(p, np.array([[False, True], [True, False]]))


def test_an_opening_that_all_options_need_is_paid_once():
    """Two items need level 2 at least, of a group that is open to 3 levels; 5 is all there is."""
    ladder = [[[0], [1], [4], [5]]]
    p = knapsack(np.zeros((2, 3)), [[[1], [0], [0]], [[0], [1], [1]]], [5], ladder,
                 level=[1, 2, 3])  # fmt: skip
    left = np.array([[True, True, True], [False, True, True]])
    assert exact.narrow(p, left)
    assert left.tolist() == [[False, True, False], [False, True, False]]


# -- prices ----------------------------------------------------------------------------------


def priced_out(p, case, left, at):
    """Options that the dual leaves at some prices, when nothing has a value; whether any may fit.

    Each option is by itself what its item may take: below 0 then, it is in no choice that fits.
    """

    def dual(left):
        value = np.where(left, 0.0, NOTHING)
        return tiny.dual(p._replace(value=value), at)[1][case] + 1e-9 * sum(at)

    keep = left.copy()
    for i, k in zip(*np.nonzero(left), strict=True):
        alone = left.copy()
        alone[i] = np.arange(left.shape[1]) == k
        keep[i, k] = dual(alone) >= 0
    return keep, dual(left) >= 0


@pytest.mark.parametrize("share", [0.2, 0.3, 0.45])
@for_seeds(30)
def test_options_are_struck_out_where_the_dual_is_below_0_with_them(seed, share):
    p, case, left = tight(seed, share)
    if not left.any(axis=1).all():
        left[:, 0] = p.value[:, 0] = 0
        left[:, 0] = True
        p.cost[:, 0] = np.minimum(p.cost[:, 0], p.capacity)
    start = np.random.default_rng(seed).permutation([0.5, 0.25, 1.25])
    wanted, may = priced_out(p, case, left, start / 2)
    fits, q, at = possible(p, left), at_prices(p, start), start.copy()
    assert exact.price_out(p, q, case, left, at, 0) == may
    assert at.tolist() == (start / 2).tolist()
    assert np.array_equal(left, wanted)
    assert len(possible(p, left)) == len(fits)


@pytest.mark.parametrize("start, first", [
    ([2.0, 6.0], [0.25, 0.75]), ([0.0, 0.0], [0.5, 0.5]), ([1e-6, 0.0], [0.5, 0.5]),
    ([2e-6, 0.0], [1.0, 0.0]), ([0.25, 0.0], [1.0, 0.0]),
])  # fmt: skip
def test_prices_sum_up_to_1_and_then_take_steps(monkeypatch, start, first):
    asked = []

    def lower(p, q, x, case, steps, length, bound, best):
        asked.append((case, steps, length, bound, best.tolist(), q.v.tolist()))
        best[...] = [0.5, 0.125]
        return 0.0

    monkeypatch.setattr(exact, "lower_prices", lower)
    p = knapsack([[3, 4], [5, 6]], np.ones((2, 2, 2)), [4, 4], mode=[[0], [0]])
    left, at, q = np.array([[True, False], [True, True]]), np.array(start), at_prices(p, [9, 9])
    assert exact.price_out(p, q, 1, left, at, 7)
    assert asked == [(1, 7, 0.03, np.inf, first, [[0, 0], [NOTHING, 0]])]
    assert at.tolist() == q.prices.tolist() == [0.5, 0.125]


@pytest.mark.parametrize("price, may", [
    (2.0**-25, True), (1e-6, True), (2.0**-19, False), (2.0**-16, False), (1.0, False),
])  # fmt: skip
def test_prices_that_fell_to_almost_nothing_say_nothing(monkeypatch, price, may):
    """Five of four units are wanted at least."""

    def lower(p, q, x, case, steps, length, bound, best):
        best[...] = price
        return 0.0

    monkeypatch.setattr(exact, "lower_prices", lower)
    p = knapsack(np.zeros((1, 2)), [[[4], [5]]], [4])._replace(cost=np.array([[[5], [6]]]))
    left = np.ones((1, 2), dtype=bool)
    q = at_prices(p, [0])
    assert exact.price_out(p, q, 0, left, np.ones(1), 1) == may
    assert left.tolist() == [[may, may]]


def test_what_takes_all_capacity_is_not_struck_out(monkeypatch):
    p = knapsack(np.zeros((1, 2)), [[[4], [8]]], [4])
    left = np.ones((1, 2), dtype=bool)
    assert exact.price_out(p, at_prices(p, [0]), 0, left, np.ones(1), 0)
    assert left.tolist() == [[True, False]]
    monkeypatch.setattr(exact, "SURE", 0.0)  # nor without what is left for rounding
    assert exact.price_out(p, at_prices(p, [0]), 0, left, np.ones(1), 0)
    assert left.tolist() == [[True, False]]


# -- both ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sums, by_prices, may, called", [
    ([False], [], False, "n"), ([True, True], [True], True, "npn"),
    ([True, False], [True], False, "npn"), ([True], [False], False, "np"),
])  # fmt: skip
def test_sums_narrow_before_and_after_prices(monkeypatch, sums, by_prices, may, called):
    order, answers = [], {"n": iter(sums), "p": iter(by_prices)}

    def step(name):
        return lambda *given: (order.append((name, *given)), next(answers[name]))[1]

    monkeypatch.setattr(exact, "narrow", step("n"))
    monkeypatch.setattr(exact, "price_out", step("p"))
    p, q, left, at = object(), object(), np.ones((2, 2), dtype=bool), object()
    assert exact.may_fit(p, q, 1, left, at, 7) == may
    assert [call[0] for call in order] == list(called)
    for call in order:
        assert call[1:] == ((p, left) if call[0] == "n" else (p, q, 1, left, at, 7))


def test_where_nothing_is_left_to_choose_prices_are_not_asked(monkeypatch):
    monkeypatch.setattr(exact, "price_out", None)
    p = knapsack(np.zeros((2, 2)), np.ones((2, 2, 1)), [2])
    assert exact.may_fit(p, None, 0, np.array([[True, False], [False, True]]), None, 1)


@pytest.mark.parametrize("left, item", [
    ([[1, 1, 1], [1, 1, 0], [1, 0, 1]], 1), ([[1, 0, 0], [0, 1, 0]], -1),
    ([[1, 0, 0], [1, 1, 1]], 1), ([[0, 0, 0], [0, 1, 1]], 1), ([[1, 1, 1], [1, 1, 1]], 0),
])  # fmt: skip
def test_the_item_with_the_fewest_options_of_two_or_more(left, item):
    assert exact.fewest(np.array(left, dtype=bool)) == item


# -- search ----------------------------------------------------------------------------------


def searched(p, q, case, left, at, nodes):
    """Depth-first search by its rules: a choice, or None, and the nodes left."""
    shares = p.cost / np.maximum(p.capacity, 1)

    def visit(left, at):
        """A choice; or None where nothing fits, or where nodes are 0."""
        nonlocal nodes
        while nodes:
            sizes = left.sum(axis=1)
            if (sizes == 1).all():
                return left.argmax(axis=1)
            i = np.where(sizes > 1, sizes, 99).argmin()
            k = np.where(left[i], shares[i] @ at, np.inf).argmin()
            below, price = left.copy(), at.copy()
            below[i] = np.arange(left.shape[1]) == k
            nodes -= 1
            if exact.may_fit(p, q, case, below, price, 8):
                found = visit(below, price)
                if found is not None or ended:
                    return found
            left[i, k] = False
            if not exact.may_fit(p, q, case, left, at, 8):
                return None
        ended.append(True)
        return None

    ended = []
    found = visit(left.copy(), at.copy())
    return found, nodes + (found is None and not ended)


@pytest.mark.parametrize("nodes", [1, 2, 3, 50])
@for_seeds(30)
def test_search_goes_on_from_the_cheapest_option_of_the_item_with_fewest(seed, nodes):
    p, case, left = tight(seed, 0.3 + 0.02 * (seed % 5), items=5)
    at, fits = np.array([0.5, 0.25, 0.25]), possible(p, left)
    if not exact.narrow(p, left):
        assert not fits
        return
    wanted, rest = searched(p, at_prices(p, at), case, left, at, nodes)
    x = blank(p)
    found, unused = exact.complete(p, at_prices(p, at), x, case, left, at, nodes)
    assert (found, unused) == (wanted is not None, rest)
    if found:
        assert x.choice.tolist() == wanted.tolist()
        assert tiny.fits(p, x.choice)
        assert left[np.arange(5), x.choice].all()
    if nodes == 50:
        assert found == bool(fits)
        assert unused > 0


def walk(monkeypatch, cost, price, fits, nodes):
    """What search finds where ``fits`` tells what may, and every state that it asks about."""
    asked = []

    def may_fit(p, q, case, left, prices, steps):
        asked.append(["".join("01"[n] for n in row) for row in left.astype(int)])
        assert (case, steps) == (2, 8)
        return fits(left)

    monkeypatch.setattr(exact, "may_fit", may_fit)
    cost = np.array(cost)
    p = knapsack(np.zeros(cost.shape[:2]), cost, [4] * cost.shape[2])
    x, root = blank(p), np.ones(cost.shape[:2], dtype=bool)
    result = exact.complete(
        p, at_prices(p, [0] * cost.shape[2]), x, 2, root, np.array(price), nodes
    )
    assert root.all()
    return result, x.choice.tolist(), asked


def test_every_node_is_one_option_of_one_item(monkeypatch):
    """Two items of two options, both dear first: only the last of four choices may be."""
    both = [[[1], [0]], [[1], [0]]]
    result, choice, asked = walk(monkeypatch, both, [1.0], lambda left: left[:, 0].all(), 9)
    assert asked == [["01", "11"], ["10", "11"], ["10", "01"], ["10", "10"]]
    assert (result, choice) == ((True, 9 - 2), [0, 0])
    result, _, asked = walk(monkeypatch, both, [1.0], lambda left: left.sum() > 2, 9)
    assert asked == [["01", "11"], ["01", "01"], ["01", "10"], ["10", "11"], ["10", "01"],
                     ["10", "10"], ["00", "11"]][: len(asked)]  # fmt: skip
    assert result == (False, 9 - 3 + 1)
    for nodes in (1, 2):
        result, _, asked = walk(monkeypatch, both, [1.0], lambda left: left[:, 0].all(), nodes)
        assert result == (False, 0)


@pytest.mark.parametrize("cost, price, first", [
    ([[1], [1]], [1.0], "10"), ([[2], [1]], [1.0], "01"), ([[2], [1]], [2.0**-70], "01"),
    ([[0, 3], [1, 1]], [0.5, 0.25], "10"), ([[0, 3], [1, 1]], [0.25, 0.5], "01"),
])  # fmt: skip
def test_the_first_of_the_cheapest_options_is_taken(monkeypatch, cost, price, first):
    _, _, asked = walk(monkeypatch, [cost], price, lambda left: True, 1)
    assert asked == [[first]]
