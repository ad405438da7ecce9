"""The solver against HiGHS, brute force and laws, and on the hard cases of the field."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.planning.knapsack import Spread, solve, solve_spread
from d2ft_fl.planning.problem import Structure
from tests.planning.feasibility import hidden
from tests.planning.knapsacks import cases_of, optimum

SHARES = [0.03, 0.1, 0.3, 0.6, 0.9]
quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 100_000)


# -- instances -------------------------------------------------------------------------------


def draw_values(draw, items, options, clients=()):
    """The first option is worth nothing, each later one more."""
    values = np.cumsum(draw.random((*clients, items, options)), axis=-1)
    values[..., 0] = 0.0
    return values


def draw_costs(draw, items, options, resources, tables=()):
    """The first option costs nothing, each later one more."""
    costs = np.cumsum(draw.integers(1, 100, (*tables, items, options, resources)), axis=-2)
    costs[..., 0, :] = 0
    return costs


def draw_structure(draw, items, options, resources, groups=3, tables=1, cases=False):
    """Two levels of openings; with cases, groups below the case's lose their last option."""
    levels = np.minimum(np.arange(options), 2)
    openings = draw.integers(0, 60, (tables, groups, 2, resources))
    of = np.sort(draw.integers(0, groups, items))
    if not cases:
        return Structure(of, levels, openings)
    modes = (np.arange(groups) < np.arange(groups)[:, None]).astype(np.int64)
    allowed = np.ones((2, options), dtype=bool)
    allowed[0, 1] = allowed[1, -1] = False  # a cheap option below, a dear one above
    return Structure(of, levels, openings, modes, allowed)


def instance(seed, items=12, options=4, resources=3, share=0.4, cases=False, groups=3):
    """values, costs, capacities, structure of one client."""
    draw = np.random.default_rng(seed)
    costs, values = draw_costs(draw, items, options, resources), draw_values(draw, items, options)
    structure = draw_structure(draw, items, options, resources, groups, cases=cases)
    everything = costs[:, -1].sum(axis=0) + structure.openings.sum(axis=(0, 1, 2))
    return values, costs, (everything * share).astype(np.int64), structure


def batch(seed, clients=6, tables=3, cases=False):
    """values, costs, capacities, structure, tables of several clients."""
    draw = np.random.default_rng(seed)
    costs, values = draw_costs(draw, 10, 4, 3, (tables,)), draw_values(draw, 10, 4, (clients,))
    structure = draw_structure(draw, 10, 4, 3, tables=tables, cases=cases)
    everything = costs[:, :, -1].sum(axis=1) + structure.openings.sum(axis=(1, 2))
    which = draw.integers(0, tables, clients)
    shares = draw.uniform(0.02, 1.0, (clients, 3))
    return values, costs, (everything[which] * shares).astype(np.int64), structure, which


# -- laws, worked out anew -------------------------------------------------------------------


def used(costs, structure, choice, table=0):
    """What a choice uses, openings included, in Python's own integers."""
    resources = costs.shape[2]
    total, tops = [0] * resources, {}
    for i, k in enumerate(choice.tolist()):
        group, level = int(structure.groups[i]), int(structure.levels[k])
        tops[group] = max(tops.get(group, 0), level)
        total = [t + int(c) for t, c in zip(total, costs[i, k], strict=True)]
    openings = structure.openings[table if len(structure.openings) > 1 else 0]
    for group, top in tops.items():
        for level in range(top):
            total = [t + int(o) for t, o in zip(total, openings[group, level], strict=True)]
    return total


def utility(values, choice):
    return sum(float(values[i, k]) for i, k in enumerate(choice))


def obeys(structure, choice, options):
    items = np.arange(len(choice))
    return any(case[items, choice].all() for case in cases_of(structure, len(choice), options))


def check(solution, values, costs, capacities, structure, table=0):
    """Every law that a solution of one client keeps."""
    fits = used(costs, structure, solution.choice, table)
    assert all(u <= int(c) for u, c in zip(fits, capacities, strict=True))
    assert float(solution.value) == pytest.approx(utility(values, solution.choice))
    assert solution.value <= solution.bound + 1e-9
    assert 0 <= solution.gap <= 1
    assert obeys(structure, solution.choice, values.shape[1])


# -- laws of solve ---------------------------------------------------------------------------


@quick
@given(seeds, st.sampled_from(SHARES), st.booleans(), st.sampled_from([0, 1, 8]))
def test_what_is_returned_fits_obeys_and_is_worth_what_it_says(seed, share, cases, effort):
    values, costs, capacities, structure = instance(seed, share=share, cases=cases)
    solution = solve(values, costs, capacities, structure, effort=effort)
    check(solution, values, costs, capacities, structure)


@quick
@given(seeds, st.booleans(), st.sampled_from([1, 8]))
def test_a_client_alone_and_in_any_batch_gets_the_same(seed, cases, effort):
    values, costs, capacities, structure, tables = batch(seed, cases=cases)
    together = solve(values, costs, capacities, structure, tables, effort=effort)
    again = solve(values, costs, capacities, structure, tables, effort=effort)
    order = np.random.default_rng(seed).permutation(len(values))
    mixed = solve(values[order], costs, capacities[order], structure, tables[order], effort=effort)
    for name in ("choice", "value", "bound"):
        assert np.array_equal(getattr(together, name), getattr(again, name))
        assert np.array_equal(getattr(together, name)[order], getattr(mixed, name))
    for c, table in enumerate(tables):
        own = replace(structure, openings=structure.openings[[table]])
        alone = solve(values[c], costs[table], capacities[c], own, effort=effort)
        assert np.array_equal(alone.choice, together.choice[c])
        assert (alone.value, alone.bound) == (together.value[c], together.bound[c])
        check(alone, values[c], costs[table], capacities[c], own)


@quick
@given(seeds)
def test_without_an_option_that_does_nothing_a_client_gets_the_same_in_any_batch(seed):
    """Where the start is not given, it must not depend on the others' capacities."""
    draw = np.random.default_rng(seed)
    values, costs = draw.random((5, 4, 3)), draw.integers(1, 9, (4, 3, 2))
    capacities = draw.integers(4, 30, (5, 2))
    together = solve(values, costs, capacities, effort=0)
    for c in range(5):
        alone = solve(values[c], costs, capacities[c], effort=0)
        assert np.array_equal(alone.choice, together.choice[c])
        assert (alone.value, alone.bound) == (together.value[c], together.bound[c])


@quick
@given(seeds, st.booleans())
def test_tables_are_costs_written_out(seed, cases):
    values, costs, capacities, structure, tables = batch(seed, cases=cases)
    indexed = solve(values, costs, capacities, structure, tables)
    written = replace(structure, openings=structure.openings[tables])
    out = solve(values, costs[tables], capacities, written)
    assert np.array_equal(indexed.choice, out.choice)
    assert np.array_equal(indexed.value, out.value)
    assert np.array_equal(indexed.bound, out.bound)


@quick
@given(seeds, st.sampled_from(SHARES))
def test_what_is_forbidden_is_never_chosen(seed, share):
    values, costs, capacities, structure = instance(seed, share=share)
    forbidden = np.random.default_rng(seed).random(values.shape) < 0.3
    forbidden[:, 0] = False
    values[forbidden] = -np.inf
    solution = solve(values, costs, capacities, structure)
    assert not forbidden[np.arange(len(values)), solution.choice].any()
    check(solution, values, costs, capacities, structure)


@quick
@given(seeds, st.sampled_from(SHARES))
def test_what_all_options_of_an_item_cost_changes_nothing_but_capacity(seed, share):
    values, costs, capacities, structure = instance(seed, share=share)
    extra = np.random.default_rng(seed).integers(0, 1000, (len(values), 1, costs.shape[2]))
    one = solve(values, costs, capacities, structure)
    other = solve(values, costs + extra, capacities + extra.sum(axis=(0, 1)), structure)
    assert other.value == one.value
    assert other.bound == one.bound
    assert np.array_equal(other.choice, one.choice)


@quick
@given(seeds, st.sampled_from(SHARES), st.booleans())
def test_a_start_is_never_made_worse(seed, share, cases):
    values, costs, capacities, structure = instance(seed, share=share, cases=cases)
    good = solve(values, costs, capacities, structure, effort=8)
    again = solve(values, costs, capacities, structure, start=good.choice, effort=0)
    assert again.value >= good.value
    check(again, values, costs, capacities, structure)


@quick
@given(seeds)
def test_a_start_that_does_not_fit_or_is_none_is_no_harm(seed):
    values, costs, capacities, structure = instance(seed, share=0.3)
    for start in (np.full(len(values), 3), np.full(len(values), -1)):
        check(
            solve(values, costs, capacities, structure, start=start),
            values, costs, capacities, structure,
        )  # fmt: skip


def test_a_start_must_name_options():
    values, costs, capacities, structure = instance(0)
    with pytest.raises(ValueError, match="start"):
        solve(values, costs, capacities, structure, start=np.full(len(values), 4))
    with pytest.raises(ValueError, match="start"):
        solve(values, costs, capacities, structure, start=np.zeros(3, dtype=np.int64))


# -- against HiGHS ---------------------------------------------------------------------------

KINDS = {  # mean and worst gap to the optimum at effort 1, then at effort 8, twice what was found
    "plain": ({"groups": 1, "share": 0.5}, (0.006, 0.03), (0.001, 0.005)),
    "openings": ({}, (0.002, 0.01), (0.001, 0.005)),
    "cases": ({"cases": True}, (0.004, 0.03), (0.001, 0.005)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_near_the_optimum_and_bounded_by_more_than_it(kind):
    settings, *limits = KINDS[kind]
    gaps = []
    for seed in range(20):
        share = [0.1, 0.3, 0.5, 0.8][seed % 4]
        problem = instance(seed, items=20, **{"groups": 4, "share": share, **settings})
        best = optimum(*problem)
        found = [solve(*problem, effort=effort) for effort in (1, 8)]
        for solution in found:
            assert solution.value <= best + 1e-6 <= solution.bound + 2e-6
        gaps.append([1 - s.value / best for s in found])
    for effort, (mean, worst) in enumerate(limits):
        assert np.mean(gaps, axis=0)[effort] <= mean
        assert np.max(gaps, axis=0)[effort] <= worst


def mknapcb(seed, items, resources, tightness):
    """P. C. Chu and J. E. Beasley, Journal of Heuristics 4, 1998: take an item, or not."""
    draw = np.random.default_rng(seed)
    weight = draw.integers(0, 1001, (items, resources))
    value = weight.mean(axis=1) + 500 * draw.random(items)
    costs = np.stack([0 * weight, weight], axis=1)
    capacities = (tightness * weight.sum(axis=0)).astype(np.int64)
    return np.stack([0 * value, value], axis=1), costs, capacities


def khan(seed, items, options, resources):
    """S. Khan et al., Studia Informatica 2002: values follow costs, capacity is half the most."""
    draw = np.random.default_rng(seed)
    costs = draw.integers(0, 11, (items, options, resources))
    prices = draw.integers(0, 11, resources)
    values = (costs @ prices + draw.integers(0, 3 * resources * 5 + 1, (items, options))) * 1.0
    return values, costs, (costs.mean(axis=1).sum(axis=0)).astype(np.int64)


PUBLIC = {
    "mknapcb1": [mknapcb(s, 100, 5, t) for s, t in enumerate((0.25, 0.5, 0.75))],
    "mknapcb2": [mknapcb(s, 250, 5, t) for s, t in enumerate((0.25, 0.5, 0.75))],
    "khan": [khan(s, 30, 5, 5) for s in range(3)],
}


@pytest.mark.parametrize("family", PUBLIC)
def test_instances_as_published_are_solved_within_half_a_percent(family):
    """On the mean, of the best that HiGHS finds in a second each."""
    gaps = []
    for problem in PUBLIC[family]:
        solution, best = solve(*problem), optimum(*problem, seconds=1.0)
        check(solution, *problem, Structure.plain(*problem[1].shape))
        assert best <= solution.bound + 1e-6
        gaps.append(1 - solution.value / best)
    assert np.mean(gaps) <= 0.005


# -- hard cases ------------------------------------------------------------------------------


def test_one_client_one_item_one_option():
    solution = solve(np.array([[2.5]]), np.array([[[7]]]), np.array([7]))
    assert (solution.choice.tolist(), solution.value, solution.gap) == ([0], 2.5, 0)
    assert not solve(np.array([[2.5]]), np.array([[[7]]]), np.array([6])).feasible


def test_an_item_and_its_opening_fit_exactly_or_not_at_all():
    values, costs = np.array([[0.0, 5.0]]), np.array([[[0], [7]]])
    structure = Structure(np.array([0]), np.array([0, 1]), np.array([[[[3]]]]))
    assert solve(values, costs, np.array([10]), structure).choice.tolist() == [1]
    assert solve(values, costs, np.array([9]), structure).choice.tolist() == [0]


def test_a_resource_that_nothing_needs_changes_nothing():
    values, costs, capacities, structure = instance(3)
    wider = np.concatenate([costs, 0 * costs[..., :1]], axis=2)
    openings = np.concatenate([structure.openings, 0 * structure.openings[..., :1]], axis=3)
    for room in (0, 5):
        other = solve(
            values, wider, np.append(capacities, room), replace(structure, openings=openings)
        )
        assert other.value == pytest.approx(
            solve(values, costs, capacities, structure).value, rel=0.01
        )
        check(
            other, values, wider, np.append(capacities, room), replace(structure, openings=openings)
        )


def test_where_nothing_costs_anything_the_best_is_taken():
    values = draw_values(np.random.default_rng(0), 12, 4)
    solution = solve(values, np.zeros((12, 4, 3), dtype=np.int64), np.zeros(3, dtype=np.int64))
    assert (solution.choice == 3).all()
    assert solution.gap == 0


def test_what_fits_whole_is_taken_whole():
    values, costs, capacities, structure = instance(1, share=1.0)
    assert (solve(values, costs, capacities, structure).choice == 3).all()


@pytest.mark.parametrize("resource", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_one_binding_resource(resource, seed):
    values, costs, capacities, structure = instance(seed, share=1.0)
    capacities[resource] *= 0.4
    solution, best = (
        solve(values, costs, capacities, structure),
        optimum(values, costs, capacities, structure),
    )
    check(solution, values, costs, capacities, structure)
    assert solution.value >= 0.99 * best


@pytest.mark.parametrize("afford", range(13))
def test_of_items_that_are_all_alike_as_many_are_taken_as_fit(afford):
    """Ties everywhere: 12 items that cost 7 and 11."""
    values = np.tile([0.0, 1.0], (12, 1))
    costs = np.tile(np.array([[0, 0], [7, 11]]), (12, 1, 1))
    solution = solve(values, costs, np.array([7 * afford + 6, 11 * afford]))
    assert solution.value == afford
    assert solution.bound >= afford


@pytest.mark.parametrize("afford", range(1, 6))
def test_budgets_that_afford_a_few_items(afford):
    gaps = []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        values = np.stack([np.zeros(40), 1 + draw.random(40)], axis=1)
        weight = draw.integers(80, 121, (40, 3))
        costs = np.stack([0 * weight, weight], axis=1)
        capacities = np.full(3, 110 * afford)
        solution, best = solve(values, costs, capacities), optimum(values, costs, capacities)
        check(solution, values, costs, capacities, Structure.plain(40, 2, 3))
        assert best <= solution.bound + 1e-9
        gaps.append(1 - solution.value / best)
    assert np.mean(gaps) <= 0.03
    assert np.max(gaps) <= 0.08


def test_without_any_capacity_what_is_free_is_taken():
    values, costs, _, structure = instance(2)
    assert (solve(values, costs, np.zeros(3, dtype=np.int64), structure).choice == 0).all()
    costs[4, 1] = 0  # but its group has to be opened
    structure.openings[...] = np.maximum(structure.openings, 1)
    assert (solve(values, costs, np.zeros(3, dtype=np.int64), structure).choice == 0).all()
    free = replace(structure, openings=0 * structure.openings)
    assert solve(values, costs, np.zeros(3, dtype=np.int64), free).choice.tolist() == [
        int(i == 4) for i in range(12)
    ]


@pytest.mark.parametrize("capacity", [-1, -(2**40)])
@pytest.mark.parametrize("resource", range(3))
def test_where_nothing_fits_nothing_is_chosen(capacity, resource):
    values, costs, capacities, structure = instance(2)
    capacities[resource] = capacity
    for cases in (structure, instance(2, cases=True)[3]):
        solution = solve(values, costs, capacities, cases)
        assert (solution.choice == -1).all()
        assert solution.value == -np.inf
        assert not solution.feasible
        assert solution.gap == 1


def test_one_client_that_cannot_does_not_disturb_the_others():
    values, costs, capacities, structure, tables = batch(5)
    broke = capacities.copy()
    broke[2] = -1
    whole, some = (solve(values, costs, c, structure, tables) for c in (capacities, broke))
    others = np.arange(len(tables)) != 2
    assert np.array_equal(whole.choice[others], some.choice[others])
    assert (some.choice[2] == -1).all()
    assert some.gap[2] == 1


def test_an_item_that_may_take_nothing_makes_all_impossible():
    values, costs, capacities, structure = instance(2)
    values[3] = -np.inf
    solution = solve(values, costs, capacities, structure)
    assert not solution.feasible
    assert solution.gap == 1


def test_a_case_may_forbid_what_is_cheapest():
    values, costs = np.array([[5.0, 1.0]]), np.array([[[0], [1]]])
    structure = Structure(
        np.array([0]),
        np.zeros(2, dtype=np.int64),
        np.zeros((1, 1, 0, 1), dtype=np.int64),
        np.array([[0]]),
        np.array([[False, True]]),
    )
    assert solve(values, costs, np.array([1]), structure).choice.tolist() == [1]
    assert not solve(values, costs, np.array([0]), structure).feasible


@pytest.mark.parametrize("cost", [2**62 + 1024, 2**63 - 1, -1])
def test_costs_beyond_what_is_exact_are_refused(cost):
    with pytest.raises(ValueError, match="costs must"):
        solve(np.array([[0.0, 1.0]]), np.array([[[0], [cost]]]), np.array([9]))


@pytest.mark.parametrize("items", [1, 2, 4])
@pytest.mark.parametrize("room", [2**60, 2**61, 2**62, 2**63 - 1])
def test_huge_costs_are_exact(items, room):
    values = np.tile([0.0, 1.0], (items, 1))
    costs = np.tile(np.array([[0], [2**60]]), (items, 1, 1))
    solution = solve(values, costs, np.array([room]))
    check(solution, values, costs, [room], Structure.plain(items, 2, 1))
    assert solution.value == min(items, -(-room // 2**60))


@pytest.mark.parametrize("items", [5, 8, 16])
def test_costs_whose_sum_could_wrap_around_are_refused(items):
    """Sixteen costs of 2**60 sum up to 0 in 64 bits."""
    costs = np.tile(np.array([[0], [2**60]]), (items, 1, 1))
    with pytest.raises(ValueError, match="64 bits"):
        solve(np.tile([0.0, 1.0], (items, 1)), costs, np.array([2**61]))


def test_capacities_beyond_all_costs_are_no_limit():
    values, costs, _, structure = instance(1)
    endless = np.full(3, np.iinfo(np.int64).max)
    assert (solve(values, costs, endless, structure).choice == 3).all()
    endless = np.full(3, np.iinfo(np.uint64).max)
    assert (solve(values, costs, endless, structure).choice == 3).all()


V, W, CAP = np.zeros((3, 2)), np.zeros((3, 2, 1), dtype=np.int64), np.array([1])


@pytest.mark.parametrize(
    "change,words",
    [
        ({"costs": W.astype(float)}, "integers"),
        ({"capacities": np.array([1.5])}, "integers"),
        ({"values": np.zeros((4, 2))}, "do not fit"),
        ({"costs": np.zeros((3, 3, 1), dtype=int)}, "do not fit"),
        ({"costs": np.zeros((3, 2, 2), dtype=int)}, "do not fit"),
        ({"values": np.zeros(3)}, "do not fit"),
        ({"capacities": np.array([[1], [1]]), "values": np.zeros((3, 3, 2))}, "do not fit"),
        ({"capacities": np.ones((3, 1), dtype=int), "costs": np.stack([W, W])}, "do not fit"),
        ({"tables": np.array([1])}, "do not fit"),
        ({"tables": np.array([-1])}, "do not fit"),
        ({"tables": np.array([0, 0])}, "do not fit"),
        ({"values": V + np.nan}, "finite"),
        ({"values": V + np.inf}, "finite"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, words):
    arguments = {"values": V, "costs": W, "capacities": CAP, **change}
    with pytest.raises(ValueError, match=words):
        solve(**arguments)


@pytest.mark.parametrize(
    "groups,words",
    [([0, 0], "each of 3 items"), ([1, 0, 0], "ascending"), ([0, 1, 0], "ascending")],
)
def test_groups_that_do_not_ascend_are_refused(groups, words):
    none = np.zeros((1, 2, 0, 1), dtype=np.int64)
    structure = Structure(np.array(groups), np.zeros(2, dtype=np.int64), none)
    with pytest.raises(ValueError, match=words):
        solve(V, W, CAP, structure)


# -- clients coupled -------------------------------------------------------------------------


def coupled(seed, clients=8, items=10, share=0.4, least=1, reference=2.0):
    """values, costs, capacities, spread, structure: option 2 trains half, option 3 whole."""
    draw = np.random.default_rng(seed)
    costs = draw_costs(draw, items, 4, 3)
    values = 0.2 * draw_values(draw, items, 4, (clients,))
    structure = draw_structure(draw, items, 4, 3)
    everything = costs[:, -1].sum(axis=0) + structure.openings.sum(axis=(0, 1, 2))
    shares = share * draw.uniform(0.7, 1.3, (clients, 1))
    train, weight = 0.5 + draw.random(items), draw.uniform(0.5, 1.5, clients)
    spread = Spread(train, np.array([0.0, 0.0, 0.5, 1.0]), weight, reference, least)
    return values, costs, (everything * shares).astype(np.int64), spread, structure


def together(values, spread, choice):
    """What choices are worth together, by the formula."""
    own = sum(utility(v, c) for v, c in zip(values, choice, strict=True))
    returns = 0.0
    for i, train in enumerate(spread.train):
        count = sum(n * spread.share[k] for n, k in zip(spread.weight, choice[:, i], strict=True))
        returns += train * spread.reference * np.log(1 + count / spread.reference)
    return own + returns


def uncoupled(values, costs, capacities, spread, structure):
    """Everybody trains as if alone."""
    train = spread.train[:, None] * spread.share * spread.weight[:, None, None]
    return solve(values + train, costs, capacities, structure, effort=1)


@quick
@given(seeds, st.sampled_from(SHARES), st.integers(1, 3))
def test_coupled_choices_fit_and_are_worth_what_they_say(seed, share, least):
    values, costs, capacities, spread, structure = coupled(seed, share=share, least=least)
    solution = solve_spread(values, costs, capacities, spread, structure)
    slope = spread.train * solution.marginal
    for c, choice in enumerate(solution.choice):
        fits = used(costs, structure, choice)
        assert all(u <= int(room) for u, room in zip(fits, capacities[c], strict=True))
        priced = values[c] + slope[:, None] * spread.share * spread.weight[c]
        assert solution.value[c] == pytest.approx(utility(priced, choice))
    assert (solution.value <= solution.bound + 1e-9).all()
    assert solution.total == pytest.approx(together(values, spread, solution.choice))
    assert solution.total <= solution.total_bound + 1e-9
    assert 0 <= solution.total_gap <= 1
    amount = spread.weight @ spread.share[solution.choice]
    assert solution.marginal == pytest.approx(1 / (1 + amount / spread.reference))


def test_the_same_coupled_clients_choose_the_same():
    one, other = (solve_spread(*coupled(4)) for _ in range(2))
    assert np.array_equal(one.choice, other.choice)
    assert (one.total, one.total_bound) == (other.total, other.total_bound)


def test_coupled_clients_are_worth_more_together_and_spread_out():
    gains, reached, alone = [], [], []
    for seed in range(12):
        problem = coupled(seed, share=0.3)
        values, _, _, spread, _ = problem
        solution, before = solve_spread(*problem), uncoupled(*problem)
        gains.append(solution.total / together(values, spread, before.choice))
        reached.append((spread.share[solution.choice] > 0).any(axis=0).mean())
        alone.append((spread.share[before.choice] > 0).any(axis=0).mean())
    assert np.mean(gains) > 1.04
    assert np.min(gains) > 0.98
    assert np.mean(reached) > np.mean(alone) + 0.3


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_item_gets_its_least_clients_where_budgets_plainly_allow_it(seed, least):
    """Twelve clients that afford about half of all items each: six an item."""
    values, costs, capacities, spread, structure = coupled(seed, clients=12, share=0.6, least=least)
    solution = solve_spread(values, costs, capacities, replace(spread, sweeps=6), structure)
    assert ((spread.share[solution.choice] > 0).sum(axis=0) >= least).all()


def test_coupled_choices_against_all_that_there_are():
    """Two clients, three items, four options: 4096 pairs of choices."""
    gaps, slack = [], []
    for seed in range(10):
        problem = coupled(seed, clients=2, items=3, share=0.6, reference=0.7)
        values, costs, capacities, spread, structure = problem
        fit = [
            [
                np.array(choice)
                for choice in product(range(4), repeat=3)
                if (np.array(used(costs, structure, np.array(choice))) <= room).all()
            ]
            for room in capacities
        ]
        best = max(together(values, spread, np.stack(pair)) for pair in product(*fit))
        solution = solve_spread(*problem)
        assert solution.total <= best + 1e-9
        assert solution.total_bound >= best - 1e-9
        gaps.append(1 - solution.total / best)
        slack.append(solution.total_bound / best - 1)
    assert np.mean(gaps) <= 0.05
    assert np.max(gaps) <= 0.15
    assert np.mean(slack) <= 0.4  # items are few, so the relaxation is wide


def test_a_coupled_client_that_cannot_do_anything_is_left_out_of_the_total():
    values, costs, capacities, spread, structure = coupled(1)
    capacities[3] = -1
    solution = solve_spread(values, costs, capacities, spread, structure)
    assert (solution.choice[3] == -1).all()
    assert solution.value[3] == -np.inf
    others = np.arange(len(values)) != 3
    less = replace(spread, weight=spread.weight[others])
    assert solution.total == pytest.approx(together(values[others], less, solution.choice[others]))
    assert solution.total <= solution.total_bound < np.inf


@pytest.mark.parametrize(
    "change,words",
    [
        ({"train": np.ones(4)}, "train"),
        ({"weight": np.ones(4)}, "weight"),
        ({"share": np.ones(4)}, "option 0"),
        ({"share": np.zeros(3)}, "share"),
        ({"reference": 0.0}, "reference"),
    ],
)
def test_a_spread_that_does_not_fit_is_refused(change, words):
    values, costs, capacities, spread, structure = coupled(1)
    with pytest.raises(ValueError, match=words):
        solve_spread(values, costs, capacities, replace(spread, **change), structure)


def test_an_option_0_that_costs_something_is_refused_where_clients_are_coupled():
    values, costs, capacities, spread, structure = coupled(1)
    with pytest.raises(ValueError, match="option 0"):
        solve_spread(values, costs + 1, capacities, spread, structure)


# -- compiled and interpreted ----------------------------------------------------------------


def answers():
    """Solutions of a few tiny instances, floats to the last bit."""
    found = []
    for seed, cases in product(range(4), (False, True)):
        share = SHARES[1 + seed % 4]
        problem = instance(seed, items=6, share=share, cases=cases)
        for effort in (1, 3):
            s = solve(*problem, effort=effort)
            found.append([s.choice.tolist(), s.value.hex(), s.bound.hex()])
    for seed in range(3):
        s = solve(*hidden("small", seed, (4, 5)), effort=2)
        found.append([s.choice.tolist(), s.value.hex(), s.bound.hex()])
    for seed in range(2):
        s = solve_spread(*coupled(seed, clients=3, items=4))
        floats = [*s.value, *s.bound, *s.marginal, s.total, s.total_bound]
        found.append([s.choice.tolist(), [float(f).hex() for f in floats]])
    return found


def test_compiled_and_interpreted_are_the_same_to_the_last_bit():
    code = (
        "import json; from tests.planning.test_knapsack import answers; "
        "print(json.dumps(answers()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == json.loads(json.dumps(answers()))
