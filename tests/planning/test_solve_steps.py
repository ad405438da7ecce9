"""How solving goes on: efforts in turn, what is looked for, two stages, and compiling."""

from itertools import product

import numpy as np
import pytest

from d2ft_fl.planning import knapsack
from d2ft_fl.planning.knapsack import (
    Spread,
    SpreadSolution,
    solve,
    solve_spread,
    solve_two_stages,
)
from d2ft_fl.planning.problem import Problem, Structure, checked
from d2ft_fl.planning.solver import feasible, many
from d2ft_fl.util import compile_cache

NONE = -np.inf


# -- efforts ---------------------------------------------------------------------------------

# Of three clients: of how many, at which effort, with which choices, values and bounds.
EFFORTS = [
    ((3, 1), [[1, 0], [2, 0], [0, 1]], [5.0, NONE, 3.0], [9.0, NONE, 8.0]),
    ((2, 2), [[1, 1], [2, 2]], [4.0, 3.0], [8.0, 8.5]),
    ((2, 4), [[2, 1], [0, 2]], [6.0, NONE], [8.5, 7.0]),
]


@pytest.mark.parametrize(
    "effort,choice,value,bound",
    [
        (1, [[1, 0], [-1, -1], [0, 1]], [5, NONE, 3], [9, NONE, 8]),
        # Worth less is not taken, worth as much is.
        (2, [[1, 0], [-1, -1], [2, 2]], [5, NONE, 3], [8, NONE, 8]),
        (3, [[1, 0], [-1, -1], [2, 2]], [5, NONE, 3], [8, NONE, 8]),
        (7, [[2, 1], [-1, -1], [2, 2]], [6, NONE, 3], [8, NONE, 7]),
    ],
)
def test_efforts_are_spent_in_turn_each_on_the_best_so_far(
    effort, choice, value, bound, monkeypatch
):
    left = EFFORTS.copy()
    known = [[0, 0]] * 3, [[1, 0], [0, 1]], [[1, 0], [2, 2]]

    def improved(batch, start, spent):
        began = known[len(EFFORTS) - len(left)]
        expected, choices, values, bounds = left.pop(0)
        assert (len(batch.capacity), spent) == expected
        assert start.tolist() == began
        assert batch.capacity[:, 0].tolist() == ([7, 8, 9] if len(start) == 3 else [7, 9])
        start[:] = choices
        return np.array(values), np.array(bounds)

    monkeypatch.setattr(knapsack, "_improved", improved)
    costs = np.zeros((2, 3, 1), dtype=np.int64)
    found = solve(np.zeros((2, 3)), costs, np.array([[7], [8], [9]]), effort=effort)
    assert found.choice.tolist() == choice
    assert found.value.tolist() == value
    assert found.bound.tolist() == bound


@pytest.mark.parametrize("options,efforts", [({}, [1, 2, 4, 8]), ({"effort": 0}, [0])])
def test_effort_is_8_unless_it_is_given_and_0_is_none(options, efforts, monkeypatch):
    spent = []

    def improved(batch, start, effort):
        spent.append(effort)
        return np.array([1.0]), np.array([2.0])

    monkeypatch.setattr(knapsack, "_improved", improved)
    found = solve(np.zeros((2, 3)), np.zeros((2, 3, 1), dtype=int), np.array([7]), **options)
    assert spent == efforts
    assert (found.choice.tolist(), found.value, found.bound) == ([0, 0], 1.0, 2.0)


# -- what is looked for ----------------------------------------------------------------------


def four_clients():
    zeros = np.zeros((2, 3, 1), dtype=np.int64)
    rooms = np.array([[7], [8], [9], [6]])
    return Problem(*checked(np.zeros((2, 3)), zeros, rooms, None, None)).batch()


def test_a_choice_is_looked_for_where_none_is_known_and_improved_on_where_found(monkeypatch):
    """Of clients 0 to 3 nothing fits for 0, 1 and 3 at first; for 0 it is known that nothing can.

    For 1 a choice is found, for 3 it is not.
    """
    asked = []

    def solve_all(batch, choice, values, bounds, effort):
        asked.append((batch.capacity[:, 0].tolist(), choice.tolist(), effort))
        if len(choice) == 4:
            choice[:], values[:] = [[0, 0], [0, 1], [0, 2], [1, 0]], [NONE, NONE, 3.0, NONE]
            bounds[:] = [NONE, 5.0, 6.0, 7.0]
        else:
            choice[:], values[:], bounds[:] = [[2, 1]], [1.0], [4.0]

    def fit_all(batch, choice, outcome, effort):
        asked.append((batch.capacity[:, 0].tolist(), choice.tolist(), effort))
        choice[:] = [[1, 1], [1, 2]]
        outcome[:] = [feasible.FOUND, feasible.UNKNOWN]

    monkeypatch.setattr(many, "solve_all", solve_all)
    monkeypatch.setattr(feasible, "fit_all", fit_all)
    choice = np.full((4, 2), 2)
    value, bound = knapsack._improved(four_clients(), choice, 2)
    assert asked == [
        ([7, 8, 9, 6], [[2, 2]] * 4, 2),
        ([8, 6], [[0, 1], [1, 0]], 2),
        ([8], [[1, 1]], 2),
    ]
    assert choice.tolist() == [[0, 0], [2, 1], [0, 2], [1, 2]]
    assert value.tolist() == [NONE, 1.0, 3.0, NONE]
    assert bound.tolist() == [NONE, 4.0, 6.0, 7.0]


@pytest.mark.parametrize("effort,values", [(0, [NONE, 3.0, 3.0, 3.0]), (1, [3.0] * 4)])
def test_nothing_is_looked_for_without_effort_or_where_all_have_a_choice(
    effort, values, monkeypatch
):
    def solve_all(batch, choice, found, bounds, spent):
        found[:], bounds[:] = values, 5.0

    monkeypatch.setattr(many, "solve_all", solve_all)
    monkeypatch.setattr(feasible, "fit_all", None)
    value, _ = knapsack._improved(four_clients(), np.zeros((4, 2), dtype=np.int64), effort)
    assert value.tolist() == values


def test_where_nothing_can_fit_the_bound_says_so(monkeypatch):
    def solve_all(batch, choice, values, bounds, effort):
        values[:], bounds[:] = NONE, 5.0

    def fit_all(batch, choice, outcome, effort):
        outcome[:] = [feasible.IMPOSSIBLE, feasible.UNKNOWN, feasible.UNKNOWN, feasible.IMPOSSIBLE]

    monkeypatch.setattr(many, "solve_all", solve_all)
    monkeypatch.setattr(feasible, "fit_all", fit_all)
    _, bound = knapsack._improved(four_clients(), np.zeros((4, 2), dtype=np.int64), 1)
    assert bound.tolist() == [NONE, 5.0, 5.0, NONE]


# -- two stages ------------------------------------------------------------------------------

SHARE = np.array([0.0, 0.0, 1.0, 0.5, 1.0])
FIRST = np.array([True, False, True, True, False])


def stages(seed, clients=3, items=3):
    """train, rest, costs, capacities, structure, tables; what trains comes first."""
    draw = np.random.default_rng(seed)
    train = draw.random((clients, items, 1)) * SHARE
    rest = np.cumsum(draw.random((clients, items, 5)), axis=2)
    costs = np.cumsum(draw.integers(1, 9, (2, items, 5, 2)), axis=2)
    costs[:, :, 0], rest[:, :, 0] = 0, 0
    openings = draw.integers(0, 4, (1, 2, 1, 2))
    structure = Structure(np.array([0, 0, 1]), np.minimum(np.arange(5), 1), openings)
    rooms = draw.integers(8, 40, (clients, 2))
    return train, rest, costs, rooms, structure, np.array([1, 0, 1])


def spent(choice, costs, structure):
    total = sum(costs[i, k] for i, k in enumerate(choice))
    for group in (0, 1):
        if any(k for i, k in enumerate(choice) if structure.groups[i] == group):
            total = total + structure.openings[0, group, 0]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_two_stages_settle_what_trains_before_the_rest(seed):
    """Against all 125 choices of each client, one stage after the other."""
    train, rest, costs, rooms, structure, tables = stages(seed)
    shared = rest[:1]
    for others in (rest, shared):
        found = solve_two_stages(train, others, SHARE, FIRST, costs, rooms, structure, tables)
        for c, t in enumerate(tables):
            fit = [
                choice
                for choice in product(range(5), repeat=3)
                if (spent(choice, costs[t], structure) <= rooms[c]).all()
            ]
            own = others[c if len(others) > 1 else 0]

            def worth(choice, values):
                return sum(values[i, k] for i, k in enumerate(choice))

            one = [choice for choice in fit if FIRST[list(choice)].all()]
            settled = max(one, key=lambda choice: worth(choice, train[c]))
            same = [ch for ch in fit if (SHARE[list(ch)] == SHARE[list(settled)]).all()]
            best = max(same, key=lambda choice: worth(choice, own))
            assert tuple(found.choice[c]) == best
            assert found.value[c] == pytest.approx(worth(best, train[c]) + worth(best, own))
        assert found.bound is found.value


def test_of_two_stages_who_cannot_do_anything_has_no_value():
    train, rest, costs, rooms, structure, tables = stages(0)
    rooms[1] = -1
    found = solve_two_stages(train, rest, SHARE, FIRST, costs, rooms, structure, tables)
    assert found.choice[1].tolist() == [-1, -1, -1]
    assert np.isneginf(found.value).tolist() == [False, True, False]


def test_both_stages_take_little_effort_and_the_second_starts_from_the_first(monkeypatch):
    asked = []

    def solved(values, costs, capacities, structure, tables, start=None, effort=8):
        asked.append((start, effort))
        return solve(values, costs, capacities, structure, tables, start, effort)

    monkeypatch.setattr(knapsack, "solve", solved)
    train, rest, *others = stages(1)
    solve_two_stages(train, rest, SHARE, FIRST, *others)
    assert [effort for _, effort in asked] == [1, 1]
    assert asked[0][0] is None
    assert asked[1][0].shape == (3, 3)


# -- coupled ---------------------------------------------------------------------------------


def test_by_default_every_item_wants_one_client_in_three_sweeps():
    spread = Spread(np.ones(1), np.ones(1), np.ones(1), 2.0)
    assert (spread.least, spread.sweeps) == (1, 3)


@pytest.mark.parametrize(
    "total,bound,gap",
    [(3.0, 4.0, 0.25), (0.25, 0.5, 0.5), (4.1, 4.0, 0.0), (0.0, 0.0, 0.0), (-2.0, -1.0, 0.0)],
)
def test_a_gap_of_all_together_is_a_share_of_the_bound(total, bound, gap):
    solution = SpreadSolution(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), total, bound)
    assert solution.total_gap == gap


def pair(**changes):
    """Two clients, three items and three options, of which the last trains whole, one half."""
    draw = np.random.default_rng(3)
    values, costs = 0.1 * draw.random((2, 3, 3)), draw.integers(1, 9, (3, 3, 2))
    values[:, :, 0], costs[:, 0] = 0, 0
    weight, train = np.array([0.5, 1.5]), np.array([0.4, 0.9, 0.6])
    spread = {"train": train, "share": np.array([0.0, 0.5, 1.0]), "weight": weight}
    rooms = np.array([[9, 9], [12, 10]])
    return values, costs, rooms, Spread(**{**spread, "reference": 0.7, **changes})


def test_the_bound_of_all_together_is_of_all_bounds_and_what_returns_are_above_their_slopes():
    """h(n) is at most h(m) + h'(m) (n - m), where m is as reached."""
    values, costs, rooms, spread = pair()
    found = solve_spread(values, costs, rooms, spread)
    expected = total = 0.0
    for i, train in enumerate(spread.train):
        amount = sum(
            n * spread.share[k] for n, k in zip(spread.weight, found.choice[:, i], strict=True)
        )
        slope = 1 / (1 + amount / 0.7)
        assert found.marginal[i] == pytest.approx(slope)
        returns = 0.7 * np.log(1 + amount / 0.7)
        expected += train * (returns - slope * amount)
        total += train * returns + sum(values[c, i, found.choice[c, i]] for c in range(2))
    assert amount > 0
    assert found.total == pytest.approx(total)
    assert found.total_bound == pytest.approx(expected + found.bound.sum())


def test_one_sweep_is_a_response_of_each_client_to_those_before(monkeypatch):
    """By all 27 choices of each; what counts is more of the returns of its items."""
    values, costs, rooms, spread = pair(least=0, sweeps=1)
    found = solve_spread(values, costs, rooms, spread, effort=8)
    amount = np.zeros(3)
    for c in range(2):

        def worth(choice):
            more = amount + spread.weight[c] * spread.share[list(choice)]  # noqa: B023
            returns = 0.7 * (np.log1p(more / 0.7) - np.log1p(amount / 0.7))  # noqa: B023
            own = sum(values[c, i, k] for i, k in enumerate(choice))  # noqa: B023
            return own + spread.train @ returns

        fit = [
            choice
            for choice in product(range(3), repeat=3)
            if (sum(costs[i, k] for i, k in enumerate(choice)) <= rooms[c]).all()
        ]
        best = max(fit, key=worth)
        assert tuple(found.choice[c]) == best
        amount += spread.weight[c] * spread.share[list(best)]


@pytest.mark.parametrize("place", [0, 2])
def test_option_0_of_one_item_that_costs_something_is_refused(place):
    values, costs, rooms, spread = pair()
    costs[place, 0, 1] = 1
    with pytest.raises(ValueError, match="option 0"):
        solve_spread(values, costs, rooms, spread)


def test_option_0_that_trains_is_refused():
    values, costs, rooms, spread = pair(share=np.array([0.5, 0.0, 0.0]))
    with pytest.raises(ValueError, match="option 0"):
        solve_spread(values, costs, rooms, spread)


def test_the_solver_is_asked_for_little_effort_unless_more_is_given(monkeypatch):
    asked = []

    def spread_all(batch, *arguments):
        asked.append(arguments[-1])
        for part in arguments[-4:-1]:  # values, bounds and slopes
            part[:] = 0.0

    monkeypatch.setattr(many, "spread_all", spread_all)
    solve_spread(*pair())
    solve_spread(*pair(), effort=4)
    assert asked == [1, 4]


# -- compiling -------------------------------------------------------------------------------


def test_where_the_solver_is_being_compiled_that_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(compile_cache, "wait_for", waits.append)

    def solving(batch, *arguments):
        waits.append("solving" if len(arguments) == 4 else "spreading")
        for part in arguments[-4:-1]:  # what is to be filled
            part[:] = 0

    monkeypatch.setattr(many, "solve_all", solving)
    monkeypatch.setattr(many, "spread_all", solving)
    solve(np.zeros((1, 1)), np.zeros((1, 1, 1), dtype=int), np.zeros(1, dtype=int), effort=0)
    solve_spread(*pair())
    assert waits == ["solve_all", "solving", "spread_all", "spreading"]


@pytest.mark.parametrize(
    "there,alone,coupled",
    [
        ((), False, False),
        (("solve_all",), True, False),
        (("spread_all",), False, False),
        (("solve_all", "spread_all"), True, True),
    ],
)
def test_the_solver_is_compiled_where_all_that_is_needed_is(there, alone, coupled, monkeypatch):
    monkeypatch.setattr(compile_cache, "is_compiled", lambda function: function in there)
    assert knapsack.is_compiled() == alone
    assert knapsack.is_compiled(coupled=True) == coupled


@pytest.mark.parametrize(
    "options,solved", [({}, ["solve"]), ({"coupled": True}, ["solve", "solve_spread"])]
)
def test_compiling_solves_as_much_as_is_needed(options, solved, monkeypatch):
    called = []

    def noted(function):
        def call(*arguments):
            called.append(function.__name__)
            return function(*arguments)

        return call

    for function in (solve, solve_spread):
        monkeypatch.setattr(knapsack, function.__name__, noted(function))
    knapsack.compile_solver(**options)
    assert called == solved
