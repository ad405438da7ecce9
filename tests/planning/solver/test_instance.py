"""The solver's arrays: one client's of many, and shares of capacity."""

import numpy as np
import pytest

from tests.planning.solver.interpreted import instance
from tests.planning.solver.tiny import NOTHING, blank, drawn, knapsack, same, taken


def batch(values=3):
    """Three clients, two tables; every array has entries of its own."""
    p = knapsack(
        np.zeros((2, 2)), np.zeros((2, 2, 1)), [0], [[[0], [1]], [[0], [3]]], [0, 1], [0, 1],
        [[0, 1]], [[True, False], [True, True]],
    )  # fmt: skip
    return instance.Batch(
        value=np.arange(values * 4.0).reshape(values, 2, 2),
        cost=np.arange(8).reshape(2, 2, 2, 1),
        ladder=np.arange(8).reshape(2, 2, 2, 1),
        table=np.array([1, 0, 1]),
        capacity=np.array([[5], [6], [7]]),
        **{name: getattr(p, name) for name in ("first", "group", "level", "mode", "allowed")},
    )


def test_some_clients_keep_their_own():
    some = batch().only(np.array([2, 1]))
    assert some.value.tolist() == [[[8, 9], [10, 11]], [[4, 5], [6, 7]]]
    assert some.table.tolist() == [1, 0]
    assert some.capacity.tolist() == [[7], [6]]
    assert some.cost is not None
    assert some.group.tolist() == [0, 1]


def test_values_that_all_clients_share_are_not_cut():
    one = batch(values=1)
    assert one.only(np.array([2, 1])).value is one.value
    assert instance.value_of(one, 2).tolist() == [[0, 1], [2, 3]]


def test_two_clients_have_values_of_their_own():
    two = batch(values=2)
    assert two.only(np.array([1])).value.tolist() == [[[4, 5], [6, 7]]]
    assert instance.value_of(two, 1).tolist() == [[4, 5], [6, 7]]
    assert instance.value_of(two, 0).tolist() == [[0, 1], [2, 3]]


def test_the_knapsack_of_a_client_has_its_table_and_capacity():
    b, value = batch(), np.full((2, 2), 9.0)
    p = instance.instance(b, 1, value)
    assert p.value is value
    assert np.array_equal(p.cost, b.cost[0])
    assert np.array_equal(p.ladder, b.ladder[0])
    assert p.capacity.tolist() == [6]
    assert np.array_equal(instance.instance(b, 2, value).cost, b.cost[1])
    for name in ("first", "group", "level", "mode", "allowed"):
        assert getattr(p, name) is getattr(b, name)


def test_costs_are_shares_of_capacity_and_what_cannot_fit_has_no_value():
    p = knapsack(
        [[1, 2, 3], [4, NOTHING, 6]],
        [[[0, 0], [4, 0], [4, 1]], [[5, 0], [1, 0], [0, 2]]],
        [4, 0],
        [[[0, 0], [2, 3]]],
        level=[0, 1, 1],
    )
    q = instance.priced(p)
    assert q.v.tolist() == [[1, NOTHING], [2, NOTHING], [NOTHING, NOTHING]]
    assert q.w.tolist() == [
        [[0, 1.25], [1, 0.25], [1, 0]],
        [[0, 0], [0, 0], [1, 2]],  # of nothing: as they are
    ]
    assert q.charge.tolist() == [[[0, 0], [0.5, 3]]]
    assert q.scale.tolist() == [0.25, 1.0]
    assert q.prices.tolist() == [0, 0]


@pytest.mark.parametrize("capacity, share", [(-3, 1.0), (0, 1.0), (1, 1.0), (2, 0.5), (8, 0.125)])
def test_a_unit_is_a_share_of_capacity_where_there_is_any(capacity, share):
    p = knapsack([[0.0]], [[[1]]], [capacity])
    assert instance.priced(p).scale.tolist() == [share]
    assert instance.priced(p).w.tolist() == [[[share]]]


def test_arrays_have_the_sizes_of_the_knapsack():
    p = drawn(0, items=7, options=5, resources=6, groups=4, levels=3)
    p = p._replace(mode=np.zeros((8, 4), dtype=np.int64))
    q, x = instance.priced(p), instance.picked(p)
    shapes = {
        "v": (5, 7), "w": (6, 5, 7), "charge": (4, 3, 6), "scale": (6,), "prices": (6,),
        "gains": (5, 7), "some": (6,), "at": (7,), "best": (7,), "arg": (2, 3, 7),
        "nets": (2, 3, 4), "net": (2, 4), "opened": (2, 4), "bounds": (8,),
    }  # fmt: skip
    assert {name: getattr(q, name).shape for name in q._fields} == shapes
    whole = {name for name in q._fields if getattr(q, name).dtype == np.int64}
    assert whole == {"some", "arg", "opened"}
    assert q.at.dtype == np.uint64
    assert [array.shape for array in x] == [(7,), (4, 3), (4,), (6,)]
    assert all(array.dtype == np.int64 for array in x)
    assert instance.NONE == -1  # of no array of 7 or 4


def test_a_choice_is_copied_whole():
    p = drawn(1, groups=3)
    x, y = taken(p, [1, 2, 3, 0, 1]), blank(p)
    instance.copy_picked(x, y)
    assert same(x, y)
    assert not any(np.shares_memory(a, b) for a, b in zip(x, y, strict=True))
    row = np.zeros(2)
    instance.copy(np.array([3.0, 4.0]), row)
    assert row.tolist() == [3, 4]
