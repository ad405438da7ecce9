"""How a batch is cut into micro-batches: by hand, by its laws, and for many clients at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.costs.round_memory import (
    cut_in_micro_batches,
    micro_batch_counts,
    sizes_of_slots,
)
from d2ft_fl.subnets.schedule import Operation, micro_batches, slot_sizes


def test_a_smaller_last_batch_comes_in_fewer():
    whole = [16]
    assert micro_batches([16], [True], whole, 2) == [[8], [8]]
    assert micro_batches([15], [True], whole, 2) == [[8], [7]]
    assert micro_batches([8], [True], whole, 2) == [[8]]
    assert micro_batches([2], [True], whole, 2) == [[2]]
    assert micro_batches([0], [True], whole, 2) == []


def test_no_more_than_their_largest_takes():
    """16 in five are 4, 3, 3, 3, 3: four of 4 take no more memory, and less time."""
    assert micro_batches([16], [True], [16], 5) == [[4]] * 4


def test_slots_that_run_nothing_do_not_count():
    assert micro_batches([4, 4, 4], [True, False, True], [4, 4, 4], 2) == [[4, 0, 0], [0, 0, 4]]
    assert micro_batches([2, 2, 1], [True, False, True], [4, 4, 4], 2) == [[2, 0, 1]]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.integers(1, 40), st.data())
def test_every_example_runs_once_and_in_as_few_parts_as_the_largest_allows(
    batch_size, slots, parts, batch, data
):
    batch_size, batch = max(batch_size, slots), min(batch, max(batch_size, slots))
    active = data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    whole, sizes = slot_sizes(batch_size, slots), slot_sizes(batch, slots)
    of_whole = micro_batches(whole, active, whole, parts)
    cut = micro_batches(sizes, active, whole, parts)
    running = [size * on for size, on in zip(sizes, active, strict=True)]
    assert np.sum(cut, axis=0).tolist() == (running if cut else 0)
    assert len(of_whole) <= parts
    largest = -(-sum(size * on for size, on in zip(whole, active, strict=True)) // parts)
    totals = [sum(part) for part in cut]
    assert not totals or max(totals) - min(totals) <= 1
    assert not totals or max(totals) <= largest
    assert len(totals) <= 1 or sum(totals) > largest * (len(totals) - 1)  # one fewer is too few
    operations = np.full((1, slots, 1, 1), Operation.SHORTCUT, dtype=np.int8)
    operations[0, active] = Operation.FULL
    vector = sizes_of_slots(np.array([batch]), slots) * np.array([active])
    counts = micro_batch_counts(batch_size, operations, vector.sum(axis=1), np.array([parts]))
    assert counts[0] == len(cut)
    if cut:
        assert cut_in_micro_batches(vector, counts)[0].tolist() == cut
