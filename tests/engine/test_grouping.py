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


def test_with_factors_heads_that_are_frozen_throughout_run_with_those_that_train():
    rows = [[FULL, FROZEN, FROZEN], [FROZEN, FULL, FROZEN]]
    assert segments(rows, factored=True) == [
        ((0, 1), Status.TRAINS, True, [(0, 1, (0, 2)), (0, 1, (1,))], [(0, 1, (0,))], []),
        ((1, 2), Status.TRAINS, True, [(1, 2, (1, 2)), (1, 2, (0,))], [(1, 2, (1,))], []),
    ]


def test_head_groups_of_a_later_segment_lie_in_its_own_slots():
    """From slot 1 on, head 0 trains, then heads 0 and 1; head 2 is silent in the last two."""
    rows = [
        [SKIP, FULL, SKIP],
        [FULL, FROZEN, SKIP],
        [FULL, FULL, FORWARD],
        [FROZEN, FULL, FORWARD],
    ]
    assert segments(rows, np.array([True] * 4)) == [
        ((0, 1), Status.TRAINS, True, [(0, 1, (1,))], [(0, 1, (1,))], []),
        (
            (1, 4),
            Status.TRAINS,
            True,
            [(1, 4, (1, 0))],
            [(1, 2, (0,)), (2, 3, (1, 0)), (3, 4, (1,))],
            [(2, 4, (2,))],
        ),
    ]


def order_of(*heads, ranks=None):
    """The order in which heads are stored; of each head what it does, slot by slot."""
    return storage_order(np.array(heads, dtype=np.int8).T, ranks)


def test_heads_that_train_in_some_slot_come_before_all_others():
    """Though a head that is frozen throughout is more like one that trains throughout."""
    assert order_of((FROZEN, FROZEN), (FULL, SKIP), (SKIP, SKIP), (SKIP, FORWARD)) == [1, 0, 3]


def test_the_next_head_is_the_nearest_to_the_last_not_to_the_first():
    heads = (FULL, FULL, FULL), (FULL, FULL, SKIP), (FULL, SKIP, SKIP), (SKIP, FULL, FULL)
    assert order_of(*heads) == [0, 1, 2, 3]


def test_to_be_alive_in_the_same_slots_counts_more_than_to_do_the_same():
    assert order_of((FULL,), (FORWARD,), (FROZEN,)) == [0, 2, 1]
    # From (FROZEN, FROZEN) on: alive in one slot of two, before alive in none.
    lively = (FULL, FULL), (FROZEN, FROZEN), (FORWARD, SKIP), (FROZEN, FORWARD)
    assert order_of(*lively) == [0, 1, 3, 2]
    # Alike in how alive they are: the one that does the same comes first.
    assert order_of((FULL, FULL), (FULL, FROZEN), (FULL, FULL)) == [0, 2, 1]


def test_heads_of_a_rank_lie_side_by_side_whatever_they_do():
    heads = (FULL, SKIP), (FULL, FULL), (FROZEN, FROZEN), (FULL, SKIP), (SKIP, FULL)
    assert order_of(*heads) == [1, 0, 3, 4, 2]
    assert order_of(*heads, ranks={0: 4, 1: 2, 3: 2, 4: 4}) == [0, 4, 1, 3, 2]
