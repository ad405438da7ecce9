"""Tables of what the planner's options cost, as the knapsack's items, openings and constant.

How they are priced is in :mod:`d2ft_fl.planning.pricing`.
"""

from dataclasses import dataclass

import numpy as np

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.subnets.schedule import Operation, Schedule

FLOPS, MEMORY, UP, DOWN = range(len(RESOURCES))
LATER = len(RESOURCES)  # the solver's fifth resource: memory of later batches
TIME = LATER + 1  # and its sixth, where clients have deadlines: ticks of each client's own
MEMORIES = [MEMORY, LATER]
TICKS = 2**40  # of a deadline


@dataclass(frozen=True)
class WorkPrices:
    """Work (``Cost.work``) as a sum over options and openings: near, not exact.

    It is exact for one FULL head in the last block, in every block, and for everything FULL; and
    for one that is FULL above others that are FORWARD_ONLY.

    Attributes:
        begins: Of running anything.
        resident: Of a block in which anything runs.
        live: Of one through which gradient passes, besides.
        per_flop: Of a FLOP.
    """

    begins: float
    resident: float
    live: float
    per_flop: float

    @classmethod
    def of(cls, costs: CostModel, examples: int) -> "WorkPrices":
        """Return the prices of a round.

        Args:
            costs: The cost model.
            examples: On which a client trains.
        """
        every = costs.everything().operations
        column = np.zeros_like(every)
        column[:, :, -1] = Operation.FULL
        above = np.zeros_like(every)
        above[:, :, -1] = Operation.FORWARD_ONLY
        one = np.zeros_like(every)
        one[:, -1, -1] = above[:, -1, -1] = Operation.FULL
        four = np.stack([one, above, column, every])
        work = costs.work(four, np.full(4, examples)).astype(float)
        flops = np.array([costs.flops(Schedule(o), examples) for o in four], dtype=float)
        rate = (work[3] - work[2]) / max(1.0, flops[3] - flops[2])
        fixed = np.maximum(0.0, work - rate * flops)
        others = max(1, costs.arch.blocks - 1)
        resident, trained = (max(0.0, (fixed[i] - fixed[0]) / others) for i in (1, 2))
        live = max(0.0, trained - resident)
        return cls(max(0.0, fixed[0] - resident - live), resident, live, float(rate))


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

    def timed(self, budget: Budget, prices: WorkPrices) -> "Table":
        """Return the table with a sixth resource: ticks of the deadline, rounded up.

        Ticks are 0 without a deadline. Those of computing are near, not exact.

        Args:
            budget: Of the client.
            prices: Of computing.
        """
        traffic = budget.bandwidth_up, budget.bandwidth_down
        rates = np.array([budget.speed, None, *traffic, None], float)
        each = np.zeros(5)
        if budget.deadline is not None:
            with np.errstate(over="ignore"):
                np.divide(TICKS / budget.deadline, rates, out=each, where=rates > 0)
            each = np.minimum(each, 1e300)
        tick = each[FLOPS]
        each[FLOPS] *= prices.per_flop
        opening = np.zeros(self.openings.shape[:2])
        opening[:, :2] = prices.resident * tick, prices.live * tick

        def with_time(costs: np.ndarray, before: float | np.ndarray = 0.0) -> np.ndarray:
            with np.errstate(over="ignore"):
                time = np.ceil(np.minimum(costs @ each + before, TICKS + 1)).astype(np.int64)
            return np.concatenate([costs, time[..., None]], axis=-1)

        return Table(
            with_time(self.items),
            with_time(self.openings, opening),
            with_time(self.constant, prices.begins * tick),
            with_time(self.excess),
        )
