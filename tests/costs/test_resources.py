"""Amounts of resources."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.costs.probe_costs import Probes, probes_cost
from d2ft_fl.costs.resources import RESOURCES, Cost, costs_from, workload_variance
from tests.conftest import all_of, cost_model
from tests.costs.by_parameters import UNEVEN
from tests.costs.test_round_memory import peak_of_round
from tests.costs.test_round_seconds import MACHINE


def test_amounts_have_an_order():
    cost = Cost(flops=1, memory=2, bytes_up=3, bytes_down=4, work=5)
    assert cost.vector().tolist() == [1, 2, 3, 4]
    assert cost.vector().dtype == np.int64
    assert list(cost.amounts().items()) == list(zip(RESOURCES, [1, 2, 3, 4], strict=True))
    assert costs_from(np.array([[1, 2, 3, 4], [6, 7, 8, 9]]), np.array([5, 10])) == [
        cost,
        Cost(6, 7, 8, 9, 10),
    ]
    assert Cost() == Cost(0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="longer"):
        costs_from(np.array([[1, 2, 3, 4]]), np.array([5, 10]))


@pytest.mark.parametrize(
    "flops,variance",
    [([2, 6], 0.25), ([1, 1, 4], 0.5), ([0, 3], 1.0), ([5], 0.0), ([0, 0], 0.0), ([], 0.0)],
)
def test_the_variance_of_work_is_in_units_of_the_means_square(flops, variance):
    assert workload_variance(flops) == variance


def test_work_is_at_most_2_to_the_60_and_memory_has_a_margin_of_one_in_32():
    """However slow a machine is; a handful of such work is an int64 still."""
    costs = replace(cost_model(UNEVEN), machine=replace(MACHINE, passes=1e30))
    everything = all_of(UNEVEN)
    cost = costs.cost(everything, 5)
    assert cost.work == probes_cost(costs, Probes(scored=1)).work == 2**60
    assert cost.memory == peak_of_round(costs, everything, 5)
    nothing = replace(everything, operations=0 * everything.operations)
    assert costs.work(nothing.operations[None], np.array([5])).tolist() == [0]
