"""The solver against HiGHS, and on the hard cases of the field."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from d2ft_fl.knapsack import Problem, solve


def problem(seed, items=12, groups=3, options=3, resources=3, share=0.4, ties=False):
    draw = np.random.default_rng(seed)
    costs = np.cumsum(draw.integers(1, 100, (items, options, resources)), axis=1)
    values = np.cumsum(draw.random((items, options)), axis=1)
    if ties:
        costs, values = np.broadcast_to(costs[:1], costs.shape).copy(), values * 0 + [0, 1, 3]
    costs[:, 0] = 0
    values[:, 0] = 0.0
    levels = np.minimum(np.arange(options), 2)
    openings = draw.integers(0, 60, (groups, 2, resources))
    everything = costs[:, -1].sum(axis=0) + openings.sum(axis=(0, 1))
    return Problem(
        values=values,
        costs=costs.astype(np.int64),
        capacities=(everything * share).astype(np.int64),
        groups=np.sort(draw.integers(0, groups, items)),
        levels=levels,
        openings=openings.astype(np.int64),
        allowed=np.ones((items, options), dtype=bool),
        default=np.zeros(items, dtype=np.int64),
    )


def fields_of(p):
    return {f.name: getattr(p, f.name) for f in fields(p)}


def optimum(p):
    """The exact optimum by mixed-integer programming, openings as binaries."""
    items, options = p.values.shape
    groups, level_count, resources = p.openings.shape
    x, y = items * options, groups * level_count
    one = np.zeros((items, x + y))
    for i in range(items):
        one[i, i * options : (i + 1) * options] = 1
    budget = np.concatenate([p.costs.reshape(x, resources), p.openings.reshape(y, resources)]).T
    links = []
    for i in range(items):
        for k in range(options):
            for m in range(p.levels[k]):
                row = np.zeros(x + y)
                row[i * options + k], row[x + p.groups[i] * level_count + m] = 1, -1
                links.append(row)
    constraints = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(budget, -np.inf, p.capacities),
        LinearConstraint(np.array(links), -np.inf, 0),
    ]
    gain = -np.concatenate([p.values.ravel(), np.zeros(y)])
    upper = np.concatenate([p.allowed.ravel().astype(float), np.ones(y)])
    result = milp(
        gain, constraints=constraints, integrality=np.ones(x + y), bounds=Bounds(0, upper)
    )
    assert result.success
    return -result.fun


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.03, 0.1, 0.3, 0.6, 0.9]), st.booleans())
def test_never_over_capacity_and_never_above_its_own_bound(seed, share, ties):
    p = problem(seed, share=share, ties=ties)
    solution = solve(p)
    assert (p.used(solution.choice) <= p.capacities).all()
    assert solution.value == pytest.approx(p.value(solution.choice))
    assert solution.value <= solution.bound + 1e-9


def test_bound_holds_and_gap_is_small_against_highs():
    gaps = []
    for seed in range(40):
        p = problem(seed, items=24, groups=4, share=[0.1, 0.3, 0.5, 0.8][seed % 4])
        solution, best = solve(p), optimum(p)
        assert solution.bound >= best - 1e-6
        assert solution.value <= best + 1e-6
        gaps.append(1 - solution.value / best)
    # Prices, repair and fill: a few percent on small, setup-heavy instances.
    assert np.mean(gaps) <= 0.03
    assert np.max(gaps) <= 0.15


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_the_same_problem_has_the_same_solution(seed):
    a, b = solve(problem(seed)), solve(problem(seed))
    assert np.array_equal(a.choice, b.choice)
    assert a.bound == b.bound


def test_what_fits_whole_is_taken_whole():
    p = problem(1, share=1.0)
    assert (solve(p).choice == p.values.argmax(axis=1)).all()


@pytest.mark.parametrize("capacity", [-1, 0])
def test_a_capacity_that_fits_nothing_gives_the_defaults(capacity):
    p = problem(2)
    broke = Problem(**{**fields_of(p), "capacities": np.full(3, capacity)})
    assert (solve(broke).choice == 0).all()


def test_one_item_one_resource():
    p = Problem(
        values=np.array([[0.0, 5.0]]),
        costs=np.array([[[0], [7]]]),
        capacities=np.array([10]),
        groups=np.array([0]),
        levels=np.array([0, 1]),
        openings=np.array([[[3]]]),
        allowed=np.ones((1, 2), dtype=bool),
        default=np.array([0]),
    )
    assert solve(p).choice.tolist() == [1]  # 7 and the opening of 3 fit exactly
    tight = Problem(**{**fields_of(p), "capacities": np.array([9])})
    assert solve(tight).choice.tolist() == [0]


def test_disallowed_options_are_never_chosen():
    p = problem(5, share=0.9)
    allowed = p.allowed.copy()
    allowed[::2, 2] = False
    choice = solve(Problem(**{**fields_of(p), "allowed": allowed})).choice
    assert (choice[::2] < 2).all()
