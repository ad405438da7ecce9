"""One choice: what it uses, what a flip changes, how it is made to fit, how it is filled."""

from itertools import product

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import choices
from tests.planning.solver.rules import filled, repaired
from tests.planning.solver.tiny import (
    NOTHING,
    blank,
    changed,
    draw_choice,
    draw_prices,
    drawn,
    for_seeds,
    knapsack,
    right,
    same,
    taken,
)


def test_use_levels_and_value_are_counted_anew():
    p = knapsack(
        [[1, 2, 4], [8, 16, 32], [64, 128, 256]],
        [[[1, 0], [2, 0], [3, 0]], [[0, 10], [0, 20], [0, 30]], [[5, 5], [6, 6], [7, 7]]],
        [99, 99],
        [[[0, 0], [100, 200], [300, 500]], [[0, 0], [1000, 2000], [3000, 5000]]],
        group=[0, 0, 1],
        level=[0, 2, 1],
    )
    x = blank(p)
    x.choice[...] = 1, 2, 0
    assert choices.count(p, x) == 2 + 32 + 64
    assert x.counts.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert x.tops.tolist() == [2, 0]
    assert x.used.tolist() == [2 + 0 + 5 + 300, 0 + 30 + 5 + 500]


@for_seeds(5)
def test_every_flip_of_every_choice_is_counted_right(seed):
    p = drawn(seed, items=4, options=3, resources=2, levels=3)
    p = p._replace(value=np.maximum(p.value, -5.0), level=np.array([0, 1, 2])[:3])
    for choice in tiny.everything(p):
        x = blank(p)
        x.choice[...] = choice
        assert choices.count(p, x) == tiny.worth(p, choice)
        assert right(p, x)
        for i, k in product(range(4), range(3)):
            after = taken(p, changed(choice, (i, k)))
            top = choices.level_after(p, x, i, k)
            assert top == after.tops[p.group[i]]
            assert [choices.change(p, x, i, k, r, top) for r in range(2)] == list(
                after.used - x.used
            )
            y = taken(p, choice)
            assert choices.flip(p, y, i, k) == p.value[i, k] - p.value[i, choice[i]]
            assert same(y, after)


@pytest.mark.parametrize("more, fits", [((0, 0), True), ((1, 0), False), ((0, 1), False)])
def test_a_choice_fits_up_to_the_last_unit_of_each_resource(more, fits):
    p = knapsack(np.zeros((1, 1)), np.zeros((1, 1, 2)), [3, 5])
    x = blank(p)
    x.used[...] = p.capacity + np.array(more)
    assert choices.fits(p, x) == fits
    x.used[...] -= 1
    assert choices.fits(p, x)


def test_the_first_case_that_allows_all_is_a_choices_own():
    owned = set()
    for seed in range(20):
        p = drawn(seed)
        for choice in tiny.everything(p)[::13]:
            obeyed = [tiny.obeys(p, choice, case) for case in range(3)]
            assert [choices.obeys(p, choice, case) for case in range(3)] == obeyed
            own = obeyed.index(True) if any(obeyed) else -1
            assert choices.case_of(p, choice) == own
            owned.add(own)
    assert owned == {-1, 0, 1, 2}


# -- repair ----------------------------------------------------------------------------------


@for_seeds(40)
def test_what_is_over_is_repaired_by_flips_that_lose_least_per_relief(seed):
    p = drawn(seed, share=0.4)
    choice, case = draw_choice(p, seed), seed % 3
    x = taken(p, choice)
    done = choices.repair(p, tiny.at_prices(p, [0, 0, 0]), x, case)
    wanted, fits = repaired(p, choice, case)
    assert done == fits
    assert right(p, x)
    assert x.choice.tolist() == wanted.tolist()


def test_repair_ends_with_a_choice_that_fits_and_with_none_that_does():
    ends = {repaired(drawn(s, share=0.4), draw_choice(drawn(s), s), s % 3)[1] for s in range(40)}
    assert ends == {True, False}


@pytest.mark.parametrize("capacity, order", [(0, [0, 1]), (1, [0, 1]), (2, [1, 0])])
def test_relief_is_a_share_of_capacity_where_there_is_any(monkeypatch, capacity, order):
    """The first item loses 2 and relieves a unit: all there is, or half. The other, 9/8 by 3/8."""
    flips, flip = [], choices.flip
    monkeypatch.setattr(choices, "flip", lambda *a: (flips.append(a[2]), flip(*a))[1])
    first = [[0, capacity + 1], [0, capacity]]
    p = knapsack([[2, 0], [1.125, 0]], [first, [[11, 0], [8, 0]]], [8, capacity])
    assert choices.repair(p, tiny.at_prices(p, [0, 0]), taken(p, [0, 0]), 0)
    assert flips == order


def test_of_equal_losses_the_first_flip_is_taken():
    p = knapsack([[1, 0, 0], [1, 0, 0]], [[[4], [2], [2]], [[4], [2], [2]]], [6])
    x = taken(p, [0, 0])
    assert choices.repair(p, tiny.at_prices(p, [0]), x, 0)
    assert x.choice.tolist() == [1, 0]


# -- fill ------------------------------------------------------------------------------------


@for_seeds(40)
def test_upgrades_that_fit_are_taken_by_value_per_priced_cost(seed):
    p = drawn(seed, share=0.9)
    choice, case, prices = draw_choice(p, seed) * (seed % 2), seed % 3, draw_prices(p, seed)
    p.value[:, 0] = np.minimum(p.value[:, 0], 1)
    x, q = taken(p, choice), tiny.at_prices(p, prices)
    if not (x.used <= p.capacity).all() or tiny.worth(p, choice) == NOTHING:
        choice = np.zeros(len(choice), dtype=np.int64)
        p.value[:, 0], x = 0.0, taken(p, choice)
        p.cost[:, 0] = 0
        x, q = taken(p, choice), tiny.at_prices(p, prices)
    won = choices.fill(p, q, x, case)
    wanted, worth = filled(p, prices, choice, case)
    assert right(p, x)
    assert x.choice.tolist() == wanted.tolist()
    assert won == worth == tiny.worth(p, wanted) - tiny.worth(p, choice)


def fill(value, cost, capacity, prices, choice):
    p = knapsack(value, cost, capacity)
    x = taken(p, choice)
    won = choices.fill(p, tiny.at_prices(p, prices), x, 0)
    return won, x.choice.tolist()


def test_value_per_price_decides_not_value():
    value, cost = [[0, 4], [0, 3]], [[[0], [4]], [[0], [2]]]
    assert fill(value, cost, [4], [8.0], [0, 0]) == (3, [0, 1])
    assert fill(value, cost, [4], [0.0], [0, 0]) == (4, [1, 0])  # free: by value
    # Cheap and dear together: a rate of 1/16 is taken as well.
    assert fill([[0, 0.5]], [[[0], [8]]], [8], [8.0], [0]) == (0.5, [1])


def test_nothing_is_won_by_what_is_worth_as_much():
    assert fill([[1, 1, 1 + 1e-13]], [[[0], [0], [0]]], [1], [1.0], [0]) == (0, [0])
    won, choice = fill([[1, 1, 1.5]], [[[0], [0], [0]]], [1], [1.0], [0])
    assert (won, choice) == (0.5, [2])


def test_of_equal_rates_the_first_upgrade_is_taken():
    assert fill([[0, 2], [0, 2]], [[[0], [1]], [[0], [1]]], [1], [1.0], [0, 0]) == (2, [1, 0])


def test_what_did_not_fit_is_not_tried_again():
    """The dear upgrade fits only after the item beside it was flipped to what costs less."""
    value, cost = [[0, 1], [0, 5]], [[[2], [0]], [[0], [4]]]
    assert fill(value, cost, [4], [1.0], [0, 0]) == (1, [1, 0])


def test_no_item_to_upgrade_is_no_upgrade():
    assert fill([[3, 1]], [[[0], [0]]], [1], [1.0], [0]) == (0, [0])


def test_an_upgrade_that_gains_no_more_than_rounding_is_none(monkeypatch):
    """The cheap option comes first; then the last is worth just as much more as is no gain."""
    value, cost = [[-2, 0, 1]], [[[0], [1], [2]]]
    assert fill(value, cost, [2], [4.0], [0]) == (3, [2])
    monkeypatch.setattr(choices, "EPSILON", 1.0)
    assert fill(value, cost, [2], [4.0], [0]) == (2, [1])


def test_repair_leaves_alone_what_fits():
    p = knapsack([[0, 9]], [[[4], [0]]], [4])
    x = taken(p, [0])
    assert choices.repair(p, tiny.at_prices(p, [0]), x, 0)
    assert x.choice.tolist() == [0]


@pytest.mark.parametrize("more, flipped", [(0, True), (1, True), (2, False)])
def test_repair_takes_no_resource_over_its_capacity(more, flipped):
    """The second resource has one unit left."""
    p = knapsack([[0, 0]], [[[5, 3], [4, 3 + more]]], [4, 4])
    x = taken(p, [0])
    assert choices.repair(p, tiny.at_prices(p, [0, 0]), x, 0) == flipped
    assert x.choice.tolist() == [int(flipped)]


def test_repair_never_makes_worse_what_is_over_already():
    p = knapsack([[0, 0], [0, 0]], [[[5, 5], [0, 6]], [[1, 1], [1, 1]]], [4, 6])
    x = taken(p, [0, 0])
    assert choices.repair(p, tiny.at_prices(p, [0, 0]), x, 0) is False
    p = p._replace(capacity=np.array([4, 5]))  # now the second is over, too
    p.cost[0, 1, 1] = 5
    assert not choices.repair(p, tiny.at_prices(p, [0, 0]), x, 0)
    assert x.choice.tolist() == [1, 0]  # as far as it goes: what is over is no further over


def test_repair_gives_up_after_as_many_flips_as_there_are_options(monkeypatch):
    flips = []
    monkeypatch.setattr(choices, "flip", lambda p, x, i, k: flips.append((i, k)))
    p = knapsack(np.zeros((2, 3)), [[[3], [2], [1]], [[3], [3], [3]]], [4])
    x = taken(p, [0, 0])
    assert not choices.repair(p, tiny.at_prices(p, [0]), x, 0)
    assert flips == [(0, 1)] * 6
