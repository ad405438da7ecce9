"""Local search: which flips are listed, and that sets and pairs of them are the best there are."""

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import moves
from tests.planning.solver.rules import filled, regrets
from tests.planning.solver.tiny import (
    NOTHING,
    at_prices,
    blank,
    changed,
    draw_prices,
    drawn,
    for_seeds,
    knapsack,
    right,
    same,
    taken,
)


def problem(seed, **sizes):
    """A knapsack at its prices, and a choice that is allowed in a case, whether it fits or not."""
    p, draw, case = drawn(seed, **{"share": 0.6, **sizes}), np.random.default_rng(seed), seed % 3
    p.value[:, 0], p.cost[:, 0] = 0.0, 0
    may = [[k for k in range(p.value.shape[1]) if tiny.allows(p, case, i, k)]
           for i in range(len(p.value))]  # fmt: skip
    return p, draw_prices(p, seed), np.array([draw.choice(options) for options in may]), case


# -- lists of flips --------------------------------------------------------------------------


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("wanted", [1, 3, 20])
@for_seeds(10)
def test_flips_are_listed_by_what_they_lose_at_the_prices(seed, wanted, single):
    p, prices, choice, case = problem(seed)
    item, option, loss = np.full(wanted, 77), np.full(wanted, 77), np.full(wanted, 77.0)
    x = taken(p, choice)
    listed = moves.least_regrets(p, at_prices(p, prices), x, case, single, item, option, loss)
    flips = regrets(p, prices, choice, case, single)[:wanted]
    assert listed == len(flips)
    found = list(zip(loss[:listed], item[:listed], option[:listed], strict=True))
    assert found == flips
    assert same(x, taken(p, choice))


def test_of_equal_losses_the_first_flips_are_listed():
    p = knapsack([[0, 1, 1], [0, 1, 1], [0, 1, 2]], np.zeros((3, 3, 1)), [1])
    x, q = taken(p, [0, 0, 0]), at_prices(p, [0.0])
    for single, wanted in ((True, [(2, 2), (0, 1)]), (False, [(2, 2), (0, 1)])):
        item, option, loss = np.zeros(2, int), np.zeros(2, int), np.zeros(2)
        assert moves.least_regrets(p, q, x, 0, single, item, option, loss) == 2
        assert list(zip(item, option, strict=True)) == wanted
        assert loss.tolist() == [-2, -1]


def test_a_flip_is_inserted_before_all_that_lose_more():
    item, option, loss = np.full(3, 77), np.full(3, 77), np.full(3, 77.0)
    n = 0
    for step, (i, k, lost, wanted) in enumerate([
        (1, 9, 4.0, [1]), (2, 8, 5.0, [1, 2]), (3, 7, 4.0, [1, 3, 2]), (4, 6, 1.0, [4, 1, 3]),
        (5, 5, 2.0, [4, 5, 1]), (6, 4, 2.0, [4, 5, 6]), (7, 3, 0.0, [7, 4, 5]),
    ]):  # fmt: skip
        n = moves.insert(i, k, lost, item, option, loss, n)
        assert n == min(step + 1, 3)
        assert item[:n].tolist() == wanted
        assert option[:n].tolist() == [10 - i for i in wanted]
    assert loss.tolist() == [0, 1, 2]


# -- sets of flips ---------------------------------------------------------------------------


def best_set(p, choice, flips):
    """What the best set of flips wins, the first in Gray code's order, and the choice then."""
    best, found = 1e-12, choice
    for n in range(1, 2 ** len(flips)):
        some = [(i, k) for j, (_, i, k) in enumerate(flips) if (n ^ n >> 1) >> j & 1]
        after = changed(choice, *some)
        won = tiny.worth(p, after) - tiny.worth(p, choice)
        if won > best and tiny.fits(p, after):
            best, found = won, after
    return (best if found is not choice else 0.0), found


@for_seeds(40)
def test_the_best_set_of_flips_is_taken(seed):
    p, prices, choice, case = problem(seed, items=4 + seed % 2, options=3, groups=1 + seed % 3)
    x = taken(p, choice)
    won = moves.core(p, at_prices(p, prices), x, case, 1)
    wanted, after = best_set(p, choice, regrets(p, prices, choice, case, single=True))
    assert won == wanted
    assert x.choice.tolist() == after.tolist()
    assert right(p, x)


def test_flips_of_seven_items_are_tried_together_with_effort_one():
    """The eighth item's flip would win as well."""
    value = [[0, 8 - i] for i in range(8)]
    p = knapsack(value, np.zeros((8, 2, 1)), [1])
    x = taken(p, [0] * 8)
    assert moves.core(p, at_prices(p, [0.0]), x, 0, 1) == 8 + 7 + 6 + 5 + 4 + 3 + 2
    assert x.choice.tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("effort, items, flips", [
    (0, 6, 0), (1, 7, 24), (3, 9, 72), (5, 11, 96), (6, 12, 96), (9, 12, 96),
])  # fmt: skip
def test_effort_lengthens_lists_up_to_a_limit(monkeypatch, effort, items, flips):
    asked = []

    def listed(p, q, x, case, single, item, option, regret):
        asked.append((single, case, len(item), len(option), len(regret)))
        return 0

    monkeypatch.setattr(moves, "least_regrets", listed)
    p, prices, choice, _ = problem(0)
    x, q = taken(p, choice), at_prices(p, prices)
    assert moves.core(p, q, x, 1, effort) == 0
    assert moves.pair(p, q, x, 2, effort) == 0
    assert asked == [(True, 1, items, items, items), (False, 2, flips, flips, flips)]
    assert same(x, taken(p, choice))


def test_gray_codes_take_one_flip_a_step():
    assert len(moves.RULER) == 2**12
    seen, current = set(), 0
    for step in range(1, 2**12):
        current ^= 1 << int(moves.RULER[step])
        assert current == step ^ step >> 1
        seen.add(current)
    assert seen == set(range(1, 2**12))


@pytest.mark.parametrize("choice, option, steady", [
    ([1, 1, 0, 0, 0], 1, True),  # two outside hold it open
    ([1, 0, 1, 0, 0], 1, True),  # one does, though one of those that are flipped leaves
    ([0, 0, 1, 1, 0], 1, False),  # only those that are flipped hold it
    ([0, 0, 1, 0, 0], 1, False),
    ([1, 1, 0, 0, 0], 2, False),  # it may open further
    ([0, 0, 0, 0, 0], 3, True),  # closed, and stays closed
    ([0, 0, 0, 0, 0], 1, False),  # closed, and may open
    ([1, 1, 1, 1, 0], 3, True),  # it stays open, though all that are flipped leave
])  # fmt: skip
def test_levels_are_counted_only_where_they_may_change(monkeypatch, choice, option, steady):
    """Items 2 and 3 change between an option and the first: three sets, in Gray code's order."""
    ladder = np.zeros((2, 3, 1), dtype=int)
    ladder[:, 1:] = [[1], [2]]
    p = knapsack(np.tile([0.0, 1, 2, 0.5], (5, 1)), np.zeros((5, 4, 1)), [99], ladder,
                 [0, 0, 0, 0, 1], [0, 1, 2, 0])  # fmt: skip
    new = [0 if choice[i] == option else option for i in (2, 3)]
    flipped, whole = [], moves.flip

    def listed(p, q, x, case, single, item, options, regret):
        item[:2], options[:2] = (2, 3), new
        return 2

    def flip(p, x, i, k):
        flipped.append(i)
        return whole(p, x, i, k)

    monkeypatch.setattr(moves, "least_regrets", listed)
    monkeypatch.setattr(moves, "flip", flip)
    x = taken(p, choice)
    won = moves.core(p, at_prices(p, [0.0]), x, 0, 1)
    assert won == sum(max(p.value[i, k] - p.value[i, choice[i]], 0)
                      for i, k in zip((2, 3), new, strict=True))  # fmt: skip
    assert right(p, x)
    taken_in_the_end = [i for i in (2, 3) if x.choice[i] != choice[i]]
    last = [i for i in (2, 3) if (i in taken_in_the_end) != (i == 3)]  # 3 is, when sets end
    assert flipped == (taken_in_the_end if steady else [2, 3, 2, *last])


# -- pairs -----------------------------------------------------------------------------------


def best_pair(p, choice, flips):
    """What the best flip or pair of flips wins, the first in the list's order, and the choice."""
    best, found = 1e-12, choice
    for a, (_, i, k) in enumerate(flips):
        for some in [[(i, k)], *([(i, k), (j, m)] for _, j, m in flips[a + 1 :] if i != j)]:
            after = changed(choice, *some)
            won = tiny.worth(p, after) - tiny.worth(p, choice)
            if won > best and tiny.fits(p, after):
                best, found = won, after
    return (best if found is not choice else 0.0), found


@pytest.mark.parametrize("share", [0.4, 0.8])
@for_seeds(40)
def test_the_best_pair_of_flips_is_taken(seed, share):
    p, prices, choice, case = problem(seed, groups=1 + seed % 3, share=share)
    x = taken(p, choice)
    won = moves.pair(p, at_prices(p, prices), x, case, 1)
    wanted, after = best_pair(p, choice, regrets(p, prices, choice, case)[:24])
    assert won == wanted
    assert x.choice.tolist() == after.tolist()
    assert right(p, x)


def test_a_list_that_loses_less_at_first_decides_between_equal_pairs():
    """The pair (0, 1) wins as much as (0, 2), and as 3 alone; the flip of least regret is 3's."""
    p = knapsack([[0, 1], [0, 2], [0, 2], [0, 3]], [[[0], [1]]] * 3 + [[[0], [2]]], [2])
    x = taken(p, [0, 0, 0, 0])
    assert moves.pair(p, at_prices(p, [0.0]), x, 0, 1) == 4
    assert x.choice.tolist() == [0, 1, 1, 0]
    p.value[:3, 1] = 1.5
    x = taken(p, [0, 0, 0, 0])
    assert moves.pair(p, at_prices(p, [0.0]), x, 0, 1) == 3
    assert x.choice.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("move", ["core", "pair"])
def test_where_nothing_is_won_all_stays(move):
    p = knapsack([[0, 1e-12], [0, 0]], np.zeros((2, 2, 1)), [1])
    x = taken(p, [0, 0])
    assert getattr(moves, move)(p, at_prices(p, [0.0]), x, 0, 1) == 0
    assert x.choice.tolist() == [0, 0]


# -- groups closed on trial ------------------------------------------------------------------


def closed(p, prices, choice, case):
    """A choice whose groups were lowered by the rule of ``close``, and what that is worth."""
    won, gain = 0.0, tiny.gains(p, prices)
    for g in range(len(p.ladder)):
        top = tiny.tops(p, choice)[g]  # what is filled may open another
        holders = [i for i in np.flatnonzero(p.group == g) if p.level[choice[i]] == top]
        if top == 0 or len(holders) > 1:
            continue
        (i,) = holders
        lower = [k for k in np.flatnonzero(p.level < top) if tiny.allows(p, case, i, k)]
        if not lower:
            continue
        after = changed(choice, (i, max(lower, key=lambda k: gain[k, i])))
        if tiny.fits(p, after):
            after, _ = filled(p, prices, after, case)
            more = tiny.worth(p, after) - tiny.worth(p, choice)
            if more > 1e-12:
                choice, won = after, won + more
    return won, choice


@for_seeds(80)
def test_a_group_that_one_item_holds_open_is_lowered_where_that_wins(seed):
    p, prices, choice, case = problem(seed, groups=3, items=6, share=0.3 + 0.1 * (seed % 4))
    p.allowed[:, 0] = seed % 5 > 0
    x = taken(p, choice)
    won = moves.close(p, at_prices(p, prices), x, blank(p), case)
    wanted, after = closed(p, prices, choice, case)
    assert won == wanted
    assert x.choice.tolist() == after.tolist()
    assert right(p, x)


def lower(values, choice, allowed=True, level=(0, 0, 1, 1)):
    """What closing wins in two groups, of one item and three; their openings are all capacity."""
    p = knapsack([[0, 0, 0, 0], *values], np.zeros((4, 4, 1)), [4], [[[0], [0]], [[0], [4]]],
                 [0, 1, 1, 1], level, allowed=[[True, allowed, True, True]])  # fmt: skip
    x = taken(p, choice)
    won = moves.close(p, at_prices(p, [1.0]), x, blank(p), 0)
    assert right(p, x)
    return won, x.choice.tolist()


def test_closing_wins_what_the_best_lower_option_is_worth_more():
    assert lower([[2, 3, 1, 0], [0] * 4, [0] * 4], [0, 2, 0, 0]) == (2, [0, 1, 0, 0])
    assert lower([[2, 3, 1, 0], [0] * 4, [0] * 4], [0, 2, 0, 0], False) == (1, [0, 0, 0, 0])
    assert lower([[2, 2, 1, 0], [0] * 4, [0] * 4], [0, 2, 0, 0]) == (1, [0, 0, 0, 0])
    # Two hold it open, or it is not worth it: it stays.
    assert lower([[2, 3, 1, 0], [2, 3, 1, 0], [0] * 4], [0, 2, 2, 0]) == (0, [0, 2, 2, 0])
    assert lower([[0, 0, 1e-12, 0], [0] * 4, [0] * 4], [0, 2, 0, 0]) == (0, [0, 2, 0, 0])
    assert lower([[NOTHING, NOTHING, 1, 0], [0] * 4, [0] * 4], [0, 2, 0, 0]) == (0, [0, 2, 0, 0])


# -- all together ----------------------------------------------------------------------------


class Steps:
    """Stands in for the steps of ``improve``: each wins what is given, and is noted."""

    def __init__(self, monkeypatch, **won):
        self.called, self.arguments = [], {}
        for name in ("fill", "close", "core", "pair"):
            monkeypatch.setattr(moves, name, self.step(name, iter(won.get(name, ()))))

    def step(self, name, won):
        def step(*arguments):
            self.called.append(name)
            self.arguments[name] = arguments
            return next(won, 0.0)

        return step


ROUND = ["core", "pair", "fill"]


def test_steps_are_repeated_until_nothing_is_won(monkeypatch):
    p, q, x = drawn(0), object(), object()
    steps = Steps(monkeypatch, fill=[1, 2, 4], close=[8], core=[16, 0, 0], pair=[32, 64, 1e-12])
    assert moves.improve(p, q, x, 2, 100.0, 1000.0, 5) == 100 + 1 + 2 + 4 + 8 + 16 + 32 + 64
    assert steps.called == ["fill", "close", *ROUND, *ROUND, "core", "pair"]
    assert steps.arguments["fill"] == (p, q, x, 2)
    assert steps.arguments["core"] == steps.arguments["pair"] == (p, q, x, 2, 5)
    assert steps.arguments["close"][:3] == (p, q, x)
    assert steps.arguments["close"][4] == 2


@pytest.mark.parametrize("effort", [0, 1, 3])
def test_effort_is_how_often_they_are_repeated(monkeypatch, effort):
    steps = Steps(monkeypatch, core=[1] * 9)
    assert moves.improve(drawn(0), None, None, 0, 0.0, 100.0, effort) == effort
    assert steps.called == ["fill", *["close"] * (effort > 0), *ROUND * effort]


def test_groups_without_levels_are_not_closed(monkeypatch):
    steps = Steps(monkeypatch)
    moves.improve(drawn(0, levels=1), None, None, 0, 0.0, 1.0, 1)
    assert steps.called == ["fill", "core", "pair"]


@pytest.mark.parametrize("bound", [4096.0, -4096.0, 0.0])
def test_a_gap_of_a_ten_thousandth_is_left_alone(monkeypatch, bound):
    tolerated = 1e-4 * abs(bound)
    for utility, wanted in ((bound - tolerated - 1e-9, 1), (bound - tolerated + 1e-9, 0)):
        steps = Steps(monkeypatch)
        assert moves.improve(drawn(0), None, None, 0, utility, bound, 3) == utility
        assert steps.called.count("core") == wanted
    steps = Steps(monkeypatch)  # a gap of 0 is as small as what is tolerated of 0
    moves.improve(drawn(0), None, None, 0, bound, bound, 3)
    assert steps.called == ["fill", "close"]


def test_a_gap_of_just_a_ten_thousandth_is_left_alone_too(monkeypatch):
    steps = Steps(monkeypatch)
    moves.improve(drawn(0), None, None, 0, 9999.0, 10000.0, 1)
    assert steps.called == ["fill", "close"]


def test_closing_has_to_gain_more_than_rounding(monkeypatch):
    values = [[2, 3, 1, 0], [0] * 4, [0] * 4]
    monkeypatch.setattr(moves, "EPSILON", 2.0)
    assert lower(values, [0, 2, 0, 0]) == (0, [0, 2, 0, 0])
    monkeypatch.setattr(moves, "EPSILON", 1.75)
    assert lower(values, [0, 2, 0, 0]) == (2, [0, 1, 0, 0])


def test_a_group_without_items_is_not_closed():
    p = knapsack([[0, 1]], [[[0], [1]]], [4], [[[0], [0]], [[0], [0]]], [1], [0, 0])
    x = taken(p, [0])
    assert moves.close(p, at_prices(p, [0]), x, blank(p), 0) == 0
    assert x.choice.tolist() == [0]


@pytest.mark.parametrize("epsilon, won", [(1.0, 0), (0.75, 1)])
@pytest.mark.parametrize("move", ["core", "pair"])
def test_moves_have_to_gain_more_than_rounding(monkeypatch, move, epsilon, won):
    monkeypatch.setattr(moves, "EPSILON", epsilon)
    p = knapsack([[0, 1]], [[[0], [1]]], [1])
    x = taken(p, [0])
    assert getattr(moves, move)(p, at_prices(p, [0]), x, 0, 1) == won
    assert x.choice.tolist() == [won]
