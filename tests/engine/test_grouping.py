"""Segments and head groups, written out for small schedules."""

import numpy as np

from d2ft_fl.engine.grouping import Status, groups, storage_order
from d2ft_fl.subnets.schedule import Operation

SKIP, FORWARD, FROZEN, FULL = (
    Operation.SHORTCUT, Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL,
)  # fmt: skip
ALWAYS = np.array([True, True, True])


def segments(rows, through=ALWAYS, factored=False):
    """The slots, status and head groups of each segment."""
    operations = np.array(rows, dtype=np.int8)
    order = storage_order(operations)
    found = groups(operations, through[: len(rows)], order, factored)
    return [(g.slots, g.status, g.through, g.alive, g.full, g.silent) for g in found]


def test_slots_that_ask_for_the_same_are_one_segment():
    rows = [[FULL, FORWARD], [FULL, FORWARD], [FULL, FORWARD]]
    whole = [(0, 3, (0,))]
    assert segments(rows) == [((0, 3), Status.TRAINS, True, whole, whole, [(0, 3, (1,))])]


def test_slots_that_differ_in_one_head_alone_are_apart():
    rows = [[FULL, FULL], [FULL, FORWARD], [FULL, FORWARD]]
    assert segments(rows) == [
        ((0, 1), Status.TRAINS, True, [(0, 1, (0, 1))], [(0, 1, (0, 1))], []),
        ((1, 3), Status.TRAINS, True, [(1, 3, (0,))], [(1, 3, (0,))], [(1, 3, (1,))]),
    ]


def test_heads_that_train_and_heads_that_are_frozen_run_together():
    rows = [[FULL, FROZEN], [FROZEN, FULL]]
    assert segments(rows) == [
        ((0, 2), Status.TRAINS, True, [(0, 2, (0, 1))], [(0, 1, (0,)), (1, 2, (1,))], [])
    ]


def test_with_factors_a_frozen_head_of_those_that_train_is_apart():
    rows = [[FULL, FROZEN], [FROZEN, FULL]]
    assert segments(rows, factored=True) == [
        ((0, 1), Status.TRAINS, True, [(0, 1, (0,)), (0, 1, (1,))], [(0, 1, (0,))], []),
        ((1, 2), Status.TRAINS, True, [(1, 2, (1,)), (1, 2, (0,))], [(1, 2, (1,))], []),
    ]


def test_gradient_stops_where_nothing_is_alive_or_nobody_wants_it():
    rows = [[FORWARD, SKIP], [FROZEN, SKIP], [FROZEN, SKIP]]
    found = segments(rows, np.array([True, True, False]))
    assert [(slots, status, through) for slots, status, through, *_ in found] == [
        ((0, 1), Status.SILENT, False), ((1, 2), Status.ALIVE, True), ((2, 3), Status.ALIVE, False),
    ]  # fmt: skip
    assert segments([[SKIP, SKIP]])[0][1] is Status.IDLE


def test_trained_heads_are_stored_first_alike_ones_side_by_side():
    rows = np.array([[FORWARD, FULL, FROZEN, FULL], [FULL, FROZEN, FROZEN, FULL]], dtype=np.int8)
    assert storage_order(rows) == [3, 1, 0, 2]
    assert storage_order(rows, {0: 2, 1: 8, 3: 2}) == [1, 3, 0, 2]
