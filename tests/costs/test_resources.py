"""Amounts of resources."""

import numpy as np
import pytest

from d2ft_fl.costs.resources import RESOURCES, Cost, costs_from, workload_variance


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


@pytest.mark.parametrize(
    "flops,variance",
    [([2, 6], 0.25), ([1, 1, 4], 0.5), ([0, 3], 1.0), ([5], 0.0), ([0, 0], 0.0), ([], 0.0)],
)
def test_the_variance_of_work_is_in_units_of_the_means_square(flops, variance):
    assert workload_variance(flops) == variance
