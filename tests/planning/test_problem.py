"""The knapsack's arrays: openings, what is taken off beforehand, starts, and what is refused."""

import numpy as np
import pytest

from d2ft_fl.planning.problem import (
    MOST,
    Problem,
    Solution,
    Structure,
    checked,
    starting_choices,
    used,
)

NOTHING = -np.inf


def problem(values, costs, capacities, structure=None, tables=None):
    return Problem(*checked(values, np.array(costs), np.array(capacities), structure, tables))


# -- structure -------------------------------------------------------------------------------


def openings(tables=2, groups=3, levels=2, resources=5):
    shape = tables, groups, levels, resources
    return np.random.default_rng(0).integers(1, 100, shape)


def test_a_ladder_has_the_sums_of_openings_up_to_each_level():
    charges = openings()
    ladder = Structure(np.zeros(1), np.zeros(1), charges).ladder
    assert ladder.shape == (2, 3, 3, 5)
    for t, g, m in np.ndindex(2, 3, 3):
        assert ladder[t, g, m].tolist() == charges[t, g, :m].sum(axis=0).tolist()


def test_a_plain_structure_is_one_group_that_costs_nothing():
    plain = Structure.plain(2, 3, 4)
    assert plain.groups.tolist() == [0, 0]
    assert plain.levels.tolist() == [0, 0, 0]
    assert plain.openings.shape == (1, 1, 0, 4)


def test_what_choices_use_are_costs_and_ladders_of_their_own_tables():
    """Group 1 has no items: it stays closed."""
    draw = np.random.default_rng(1)
    charges, costs = openings(), draw.integers(0, 100, (2, 4, 3, 5))
    groups, levels = np.array([0, 0, 2, 2]), np.array([0, 2, 1])
    choice, tables = draw.integers(0, 3, (6, 4)), np.array([1, 0, 1, 1, 0, 0])

    def by_hand(own, row):
        expected = []
        for c, t in enumerate(tables):
            total = sum(costs[t, i, k] for i, k in enumerate(choice[c]))
            for group, top in ((0, max(levels[choice[c, :2]])), (2, max(levels[choice[c, 2:]]))):
                total = total + own[row(t), group, :top].sum(axis=0)
            expected.append(total.tolist())
        return expected

    each = used(choice, costs, Structure(groups, levels, charges), tables)
    assert each.tolist() == by_hand(charges, lambda t: t)
    # Openings may be the same for all, whatever the costs.
    shared = used(choice, costs, Structure(groups, levels, charges[1:]), tables)
    assert shared.tolist() == by_hand(charges[1:], lambda t: 0)


# -- solutions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value,bound,gap",
    [
        (3.0, 4.0, 0.25),
        (-5.0, -4.0, 0.25),
        (0.25, 0.5, 0.5),
        (0.0, 0.0, 0.0),
        (4.0 + 1e-9, 4.0, 0.0),  # of rounding
        (-5.0, 1.0, 1.0),
        (NOTHING, 3.0, 1.0),
        (NOTHING, NOTHING, 1.0),
    ],
)
def test_a_gap_is_what_a_value_may_be_short_of_as_a_share_of_the_bound(value, bound, gap):
    solution = Solution(np.zeros(2), np.float64(value), np.float64(bound))
    assert solution.gap == gap
    assert solution.feasible == np.isfinite(value)


def test_each_client_has_its_gap():
    value, bound = np.array([3.0, NOTHING, 1.0]), np.array([4.0, 2.0, 1.0])
    assert Solution(np.zeros((3, 2)), value, bound).gap.tolist() == [0.25, 1.0, 0.0]


# -- what is taken off -----------------------------------------------------------------------

# Two tables of two items with three options and two resources.
COSTS = [
    [[[3, 1], [2, 5], [9, 9]], [[0, 4], [6, 3], [7, 7]]],
    [[[0, 0], [1, 1], [2, 2]], [[5, 8], [6, 7], [9, 7]]],
]


def test_the_cheapest_of_each_item_is_taken_off_costs_and_capacities():
    """Resource by resource: of item 0 of table 0 that is 2 and 1, of options 1 and 0."""
    found = problem(np.zeros((2, 3)), COSTS, [[20, 30], [40, 50], [60, 70]], None, [1, 0, 1])
    assert found.base.tolist() == [[2 + 0, 1 + 3], [0 + 5, 0 + 7]]
    assert found.costs.tolist() == [
        [[[1, 0], [0, 4], [7, 8]], [[0, 1], [6, 0], [7, 4]]],
        [[[0, 0], [1, 1], [2, 2]], [[0, 1], [1, 0], [4, 0]]],
    ]
    assert found.batch().capacity.tolist() == [[15, 23], [38, 46], [55, 63]]


def test_where_first_options_cost_nothing_nothing_is_taken_off():
    costs = np.array(COSTS)
    costs[:, :, 0] = 0
    found = problem(np.zeros((2, 3)), costs, [[20, 30], [40, 50]])
    assert found.base.tolist() == [[0, 0], [0, 0]]
    assert found.costs.tolist() == costs.tolist()
    assert found.batch().capacity.tolist() == [[20, 30], [40, 50]]
    assert found.cheapest.tolist() == [[0, 0], [0, 0]]
    wide = problem(np.zeros((4, 3)), np.zeros((4, 3, 1), dtype=int), [[9], [9]])
    assert wide.cheapest.tolist() == [[0] * 4] * 2


def test_the_solver_is_given_every_array_in_its_place():
    charges = openings(tables=1, groups=4, levels=1, resources=2)
    structure = Structure(np.array([0, 2]), np.array([0, 1, 1]), charges)
    values = np.arange(18.0).reshape(3, 2, 3)
    given = problem(values, COSTS, [[20, 30], [40, 50], [60, 70]], structure, [1, 0, 1]).batch()
    assert given.value.tolist() == values.tolist()
    assert given.table.tolist() == [1, 0, 1]
    assert given.ladder.shape == (2, 4, 2, 2)
    assert (given.ladder == structure.ladder).all()
    assert given.first.tolist() == [0, 1, 1, 2, 2]
    assert given.group.tolist() == [0, 2]
    assert given.level.tolist() == [0, 1, 1]
    assert given.mode.tolist() == [[0, 0, 0, 0]]
    assert given.allowed.tolist() == [[True, True, True]]
    for part in given:
        assert part.flags.c_contiguous
        assert part.flags.writeable
    modes, allowed = np.array([[0, 1, 1, 0], [1, 0, 0, 0]]), np.array([[1, 0, 1], [0, 1, 1]])
    cases = Structure(structure.groups, structure.levels, charges, modes, allowed)
    given = problem(values[:2], COSTS, [[20, 30], [40, 50]], cases).batch()
    assert given.mode.tolist() == modes.tolist()
    assert given.allowed.tolist() == [[True, False, True], [False, True, True]]


# -- where to start --------------------------------------------------------------------------


def test_the_cheapest_is_the_least_of_the_largest_shares_of_capacity():
    """Of one item: of capacities 10 and 100 option 0 takes 4/10, 1 takes 30/100, 2 takes 5/10.

    Once the least of each resource, 0 and 10, is taken off, that is 4/10, 20/100 and 5/10.
    """
    costs, values = [[[4, 10], [0, 30], [5, 10]]], np.zeros((1, 3))
    assert problem(values, costs, [[10, 100]]).cheapest.tolist() == [[1]]
    # Of capacities 10 and 10 these are 4/10, 20/10 and 5/10; of 100 and 1 4/100, 20 and 5/100.
    rooms = [[10, 100], [10, 10], [100, 1]]
    assert problem(values, costs, rooms).cheapest.tolist() == [[1], [0], [0]]
    # No capacity counts as 1: 4, 20 / 100, 5; then 4 / 100, 20, 5 / 100.
    assert problem(values, costs, [[0, 100], [100, 0]]).cheapest.tolist() == [[1], [0]]
    # And 1 is 1: 1 / 1 is more than 3 / 4.
    assert problem(values, [[[1, 0], [0, 3], [2, 9]]], [[1, 4]]).cheapest.tolist() == [[1]]


def test_the_cheapest_is_none_that_is_forbidden():
    """Of three clients with the same costs, where option 0 is free."""
    costs = [[[0], [2], [1]], [[0], [2], [3]]]
    values = np.zeros((3, 2, 3))
    values[0, 0, 0] = values[2, 1, 0] = values[2, 1, 1] = NOTHING
    found = problem(values, costs, [[9], [9], [9]])
    assert found.cheapest.tolist() == [[2, 0], [0, 0], [0, 2]]
    shared = problem(values[:1], costs, [[9], [9]])
    assert shared.cheapest.tolist() == [[2, 0], [2, 0]]


@pytest.mark.parametrize("free", [1, 2])
def test_the_cheapest_is_the_one_that_is_free_wherever_it_stands(free):
    """Of both items, or of one where option 0 of the other is free."""
    costs = np.full((2, 3, 1), 4)
    costs[:, free] = 0
    assert problem(np.zeros((2, 3)), costs, [9]).cheapest.tolist() == [[free, free]]
    costs[1] = [[0], [4], [4]]
    assert problem(np.zeros((2, 3)), costs, [9]).cheapest.tolist() == [[free, 0]]
    costs[0] = 0
    values = np.zeros((2, 3))
    values[0, 0] = NOTHING
    assert problem(values, costs, [9]).cheapest.tolist() == [[1, 0]]


def test_a_start_is_taken_unless_something_of_it_is_missing():
    """The cheapest of item 0 is option 2, of item 1 option 0."""
    whole = problem(np.zeros((2, 3)), [[[2], [3], [1]], [[0], [2], [3]]], [[9], [8]])
    start = np.array([[0, 1], [1, -1]])
    assert starting_choices(whole, start).tolist() == [[0, 1], [2, 0]]
    assert starting_choices(whole, np.array([-1, 1])).tolist() == [[2, 0], [2, 0]]
    assert starting_choices(whole, np.array([1, 0])).tolist() == [[1, 0], [1, 0]]
    assert starting_choices(whole, np.array([2, 0])).tolist() == [[2, 0], [2, 0]]
    own = starting_choices(whole, start[:, ::-1])
    own[:] = 7  # nobody else's
    assert start.tolist() == [[0, 1], [1, -1]]


@pytest.mark.parametrize("start", [[0, 3], [[0, 0]] * 3, [0, 0, 0], [[0], [0]]])
def test_a_start_of_other_shape_or_options_is_refused(start):
    whole = problem(np.zeros((2, 3)), [[[2], [3], [1]], [[0], [2], [3]]], [[9], [8]])
    with pytest.raises(ValueError, match="start must be"):
        starting_choices(whole, np.array(start))


def test_a_start_at_the_only_option_is_one():
    whole = problem(np.zeros((2, 1)), [[[2]], [[0]]], [9])
    assert starting_choices(whole, np.array([0, 0])).tolist() == [[0, 0]]


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["costs", "openings"])
@pytest.mark.parametrize("amount", [-1, 2**62 + 1024])
def test_one_cost_or_opening_out_of_range_is_refused(place, amount):
    costs, charges = np.full((2, 3, 2), 5), openings(1, 1, 2, 2)
    (costs if place == "costs" else charges)[0, 0, 1] = amount
    structure = Structure(np.zeros(2, dtype=np.int64), np.array([0, 1, 2]), charges)
    with pytest.raises(ValueError, match="costs must"):
        problem(np.zeros((2, 3)), costs, [9, 9], structure)


def test_sums_up_to_the_most_are_exact_and_above_it_refused():
    """Of the dearest options of all items and all openings, resource by resource and by table."""
    half, zeros = 2**61, np.zeros((2, 3), dtype=np.int64)
    costs = np.zeros((1, 2, 3, 2), dtype=np.int64)
    costs[0, 0, 1:], costs[0, 1, 1] = half, (6, 5)  # half of either resource
    charges = np.zeros((1, 2, 2, 2), dtype=np.int64)
    charges[0, 0, 0], charges[0, 1, 0] = half - 4096, 2048
    structure = Structure(zeros[0, :2], np.arange(3), charges)
    assert (problem(zeros, costs, [9, 9], structure).base == 0).all()
    several = np.concatenate([costs, costs])  # of which each client has one
    assert len(problem(zeros, several, [[9, 9], [9, 9]], structure).base) == 2
    charges[0, 1, 1, 1] = 8192
    with pytest.raises(ValueError, match="64 bits"):
        problem(zeros, costs, [9, 9], structure)
    with pytest.raises(ValueError, match="64 bits"):
        problem(zeros, np.concatenate([0 * costs, costs]), [[9, 9], [9, 9]], structure)


def test_one_cost_that_is_the_most_is_exact():
    """A sum of two such, of costs and openings, is within 64 bits."""
    assert problem(np.zeros((1, 2)), [[[0], [2**62]]], [9]).costs.max() == 2**62


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_no_number_is_refused(value):
    values = np.zeros((2, 3))
    values[1, 1] = value
    with pytest.raises(ValueError, match="values must be finite"):
        problem(values, np.zeros((2, 3, 1), dtype=int), [9])


def test_groups_begin_at_0():
    none = np.zeros((1, 2, 0, 1), dtype=np.int64)
    structure = Structure(np.array([-1, 0]), np.zeros(3, dtype=np.int64), none)
    with pytest.raises(ValueError, match="ascending from 0"):
        problem(np.zeros((2, 3)), np.zeros((2, 3, 1), dtype=int), [9], structure)


# -- shapes ----------------------------------------------------------------------------------


def shapes(values=(2, 3), costs=(2, 3, 4), capacities=(4,), tables=None):
    zeros = np.zeros(costs, dtype=np.int32), np.zeros(capacities, dtype=np.uint8)
    return checked(np.zeros(values), *zeros, None, tables)


def test_one_client_is_a_batch_of_one():
    values, costs, capacities, tables, structure = shapes()
    assert (values.shape, costs.shape, capacities.shape) == ((1, 2, 3), (1, 2, 3, 4), (1, 4))
    assert (values.dtype, costs.dtype, capacities.dtype) == (float, np.int64, np.int64)
    assert tables.tolist() == [0]
    assert structure.openings.shape == (1, 1, 0, 4)
    assert (len(structure.groups), len(structure.levels)) == (2, 3)


@pytest.mark.parametrize(
    "costs,tables,expected",
    [
        ((2, 3, 4), None, [0] * 5),
        ((1, 2, 3, 4), None, [0] * 5),
        ((5, 2, 3, 4), None, [0, 1, 2, 3, 4]),
        ((1, 2, 3, 4), [0] * 5, [0] * 5),
        ((3, 2, 3, 4), [2, 0, 1, 1, 2], [2, 0, 1, 1, 2]),
    ],
)
@pytest.mark.parametrize("values", [(2, 3), (1, 2, 3), (5, 2, 3)])
def test_clients_share_tables_and_values_or_have_their_own(values, costs, tables, expected):
    found = shapes(values, costs, (5, 4), tables)
    assert found[3].tolist() == expected
    assert found[0].shape == (values if len(values) == 3 else (1, *values))
    assert found[1].shape == (costs if len(costs) == 4 else (1, *costs))


@pytest.mark.parametrize(
    "changes",
    [
        {"values": (3, 3)},
        {"values": (2, 4)},
        {"values": (2, 2, 3)},
        {"values": (5, 1, 2, 3)},
        {"costs": (2, 3, 5)},
        {"costs": (2, 2, 3, 4)},
        {"costs": (1, 1, 2, 3, 4)},
        {"tables": [0] * 4},
        {"tables": [0, 0, 0, 0, 1]},
        {"tables": [0, -1, 0, 0, 0]},
        {"tables": [[0] * 5]},
        {"costs": (3, 2, 3, 4), "tables": [0, 1, 2, 3, 0]},
    ],
)
def test_shapes_that_do_not_go_together_are_refused(changes):
    with pytest.raises(ValueError, match="do not fit"):
        shapes(**{"capacities": (5, 4), **changes})


def test_capacities_beyond_what_can_be_counted_are_none():
    capacities = np.array([2**63 - 1, MOST, MOST - 1, -3, -MOST - 1, -(2**63)])
    found = checked(np.zeros((1, 1)), np.zeros((1, 1, 6), dtype=int), capacities, None, None)[2]
    assert found.tolist() == [[MOST, MOST, MOST - 1, -3, -MOST, -MOST]]


def test_costs_are_not_copied():
    """They are the largest of all arrays."""
    costs = np.zeros((5, 2, 3, 4), dtype=np.int64)
    found = checked(np.zeros((2, 3)), costs, np.zeros((5, 4), dtype=int), None, None)
    assert np.shares_memory(found[1], costs)


def test_a_structure_that_is_given_is_kept():
    structure = Structure.plain(2, 3, 4)
    zeros = np.zeros((2, 3, 4), dtype=int), np.zeros(4, dtype=int)
    assert checked(np.zeros((2, 3)), *zeros, structure, None)[4] is structure
