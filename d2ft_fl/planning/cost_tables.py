"""Tables of what the planner's options cost, as the knapsack's items, openings and constant.

How they are priced is in :mod:`d2ft_fl.planning.pricing`.
"""

from dataclasses import dataclass

import numpy as np

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.costs.resources import RESOURCES

FLOPS, MEMORY, UP, DOWN = range(len(RESOURCES))
LATER = len(RESOURCES)  # the solver's fifth resource: memory of later batches
TIME = LATER + 1  # and its sixth, where clients have deadlines: ticks of each client's own
MEMORIES = [MEMORY, LATER]
TICKS = 2**40  # of a deadline


@dataclass(frozen=True)
class Table:
    """What options and openings cost a client with some number of examples.

    Attributes:
        items: Of each option of each subnet: int64 [subnets, options, 5].
        openings: Of opening a block to each level: int64 [blocks, levels, 5].
        constant: Of running anything at all: int64 [5].
        excess: By how much the sum can at most be above what a plan costs: int64 [5].
    """

    items: np.ndarray
    openings: np.ndarray
    constant: np.ndarray
    excess: np.ndarray

    def timed(self, budget: Budget) -> "Table":
        """Return the table with a sixth resource: ticks of the deadline, rounded up.

        Ticks are 0 without a deadline.
        """
        rates = np.array([budget.speed, 0, budget.bandwidth_up, budget.bandwidth_down, 0], float)
        each = np.zeros(5)
        if budget.deadline is not None:
            with np.errstate(over="ignore"):
                np.divide(TICKS / budget.deadline, rates, out=each, where=rates > 0)
            each = np.minimum(each, 1e300)

        def with_time(costs: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):
                time = np.ceil(np.minimum(costs @ each, TICKS + 1)).astype(np.int64)
            return np.concatenate([costs, time[..., None]], axis=-1)

        return Table(*map(with_time, (self.items, self.openings, self.constant, self.excess)))
