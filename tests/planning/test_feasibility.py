"""A choice that fits is found where there is one, and more effort is never worth less."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.planning.knapsack import solve
from d2ft_fl.planning.problem import Problem, Structure, checked, used
from d2ft_fl.planning.solver import feasible
from tests.planning.feasibility import FAMILIES, hidden, highs_fits
from tests.planning.knapsacks import cases_of

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 100_000)
EFFORTS = (0, 1, 2, 4, 8)


def keeps_the_laws(choice, values, costs, capacities, structure):
    """Whether a choice is within capacity, allowed in a case and not forbidden."""
    items = np.arange(len(choice))
    spent = used(choice[None], costs[None], structure, np.zeros(1, dtype=np.int64))[0]
    cases = cases_of(structure, *values.shape)
    return (
        (spent <= capacities).all()
        and np.isfinite(values[items, choice]).all()
        and any(case[items, choice].all() for case in cases)
    )


def tiny(seed, cases=False):
    """Four items with three options each: often nothing fits, or just so, with nothing to spare."""
    draw = np.random.default_rng(seed)
    values, costs = draw.random((4, 3)), draw.integers(1, 30, (4, 3, 3))
    values[draw.random((4, 3)) < 0.1] = -np.inf
    structure = Structure(
        np.array([0, 0, 1, 1]), np.array([0, 1, 2]), draw.integers(0, 20, (1, 2, 2, 3))
    )
    if cases:
        allowed = np.array([[True, False, True], [False, True, True]])
        structure = replace(structure, modes=np.array([[0, 1], [1, 1]]), allowed=allowed)
    if seed % 2:
        choice = draw.integers(0, 3, (1, 4))
        capacities = used(choice, costs[None], structure, np.zeros(1, dtype=np.int64))[0]
        return values, costs, capacities, structure
    whole = costs.mean(axis=1).sum(axis=0) + structure.openings.sum(axis=(0, 1, 2)) / 2
    return values, costs, (whole * draw.uniform(0.7, 1.1)).astype(np.int64), structure


def looked_for(problem, effort=1):
    """What the phase by itself finds: the outcome, and a choice."""
    whole = Problem(*checked(*problem, None))
    choice, outcome = whole.cheapest, np.empty(1, dtype=np.int64)
    feasible.fit_all(whole.batch(), choice, outcome, effort)
    return outcome[0], choice[0]


@quick
@given(seeds, st.booleans())
def test_what_fits_is_found_and_what_does_not_is_proven_impossible(seed, cases):
    """Of 81 choices, one after another."""
    problem = tiny(seed, cases)
    any_fits = any(
        keeps_the_laws(np.array(choice), *problem) for choice in product(range(3), repeat=4)
    )
    outcome, choice = looked_for(problem)
    assert outcome == (feasible.FOUND if any_fits else feasible.IMPOSSIBLE)
    assert not any_fits or keeps_the_laws(choice, *problem)
    solution = solve(*problem)
    assert solution.feasible == any_fits
    assert any_fits or solution.bound == -np.inf


def test_where_nodes_run_out_nothing_is_claimed():
    """A choice is planted, which this effort does not find."""
    solution = solve(*hidden("plain", 305, (5, 30)), effort=1)
    assert not solution.feasible
    assert solution.bound > -np.inf


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_choices_are_found_and_more_effort_is_never_worth_less(family):
    """Seven instances each; the figures of a hundred: ``python -m tests.planning.feasibility``."""
    small = "small" in family or "no cheap" in family
    for seed in range(306, 313):
        problem = hidden(family, seed, (5, 12) if small else (5, 30))
        solutions = [solve(*problem, effort=effort) for effort in EFFORTS]
        values = [solution.value for solution in solutions]
        assert np.isfinite(values[-1])
        assert all(more >= less for less, more in pairwise(values))
        for solution in solutions:
            assert solution.value <= solutions[-1].bound
            assert not solution.feasible or keeps_the_laws(solution.choice, *problem)


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([0.97, 0.99, 1.0]))
def test_what_highs_finds_is_found(seed, share):
    """Capacities that are not above what is planted, and below: some fit nothing."""
    values, costs, capacities, structure = hidden("small", seed, (5, 8))
    problem = values, costs, (share * capacities).astype(np.int64), structure
    assert solve(*problem).feasible == highs_fits(problem, 10.0)


@pytest.mark.parametrize("family", ["plain", "cases"])
def test_a_client_for_whom_nothing_fits_at_first_gets_the_same_alone_and_beside_others(family):
    values, costs, capacities, structure = hidden(family, 302, (8, 12))
    shares = np.array([1.0, 0.5, 3.0, 1.02, 0.98])[:, None]
    several = (shares * capacities).astype(np.int64)
    together = solve(values, costs, several, structure, effort=4)
    for c, room in enumerate(several):
        alone = solve(values, costs, room, structure, effort=4)
        assert np.array_equal(alone.choice, together.choice[c])
        assert (alone.value, alone.bound) == (together.value[c], together.bound[c])


@pytest.mark.parametrize("effort,counts", [(3, 2), (7, 4), (9, 8)])
def test_effort_counts_as_the_power_of_two_that_is_not_above_it(effort, counts):
    problem = hidden("openings", 301, (5, 12))
    one, other = solve(*problem, effort=effort), solve(*problem, effort=counts)
    assert np.array_equal(one.choice, other.choice)
    assert (one.value, one.bound) == (other.value, other.bound)


def test_the_start_is_not_forbidden_where_anything_is_not():
    values, costs = np.array([[-np.inf, 0.0, 1.0]] * 2), np.array([[[0], [2], [1]]] * 2)
    values[1] = [0.0, 1.0, 1.0]
    problem = Problem(*checked(values, costs, np.array([9]), None, None))
    assert problem.cheapest.tolist() == [[2, 0]]


def test_clients_that_may_do_nothing_never_need_a_choice_looked_for(monkeypatch):
    """So planners never compile what looks for one, not even for budgets below 0."""
    monkeypatch.setattr(feasible, "fit_all", None)
    for cases in (False, True):
        values, costs, capacities, structure = tiny(1, cases)
        values[:, 0], costs[:, 0] = 0.0, 0
        if cases:
            structure.allowed[:, 0] = True
        rooms = np.stack([capacities, 0 * capacities, 0 * capacities - 1])
        solution = solve(values, costs, rooms, structure)
        assert solution.feasible.tolist() == [True, True, False]
