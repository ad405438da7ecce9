"""How a batch is cut into micro-batches: by hand, by its laws, and for many clients at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.costs.round_memory import cut_in_micro_batches, sizes_of_slots
from d2ft_fl.subnets.schedule import micro_batches, slot_sizes


def test_a_batch_is_cut_evenly_and_slots_that_run_nothing_do_not_count():
    assert micro_batches([15], [True], 2) == [[8], [7]]
    assert micro_batches([2], [True], 3) == [[1], [1]]
    assert micro_batches([0], [True], 2) == []
    assert micro_batches([4, 4, 4], [True, False, True], 2) == [[4, 0, 0], [0, 0, 4]]


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 40), st.data())
def test_every_example_runs_once_and_the_cut_for_many_clients_is_the_same(
    slots, parts, batch, data
):
    active = data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    sizes = slot_sizes(batch, slots)
    running = [size * on for size, on in zip(sizes, active, strict=True)]
    cut = micro_batches(sizes, active, parts)
    totals = [sum(part) for part in cut]
    assert np.sum(cut, axis=0).tolist() == (running if cut else 0)
    assert len(cut) == min(parts, sum(running))
    assert not totals or max(totals) - min(totals) <= 1
    at_once = sizes_of_slots(np.array([batch]), slots) * np.array([active])
    (found,) = cut_in_micro_batches(at_once, np.array([parts]))
    assert [part for part in found.tolist() if any(part)] == cut
