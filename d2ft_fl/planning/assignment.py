"""One client of a round: what it may spend, and what it is assigned."""

from dataclasses import dataclass

import numpy as np

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes
from d2ft_fl.costs.resources import Cost
from d2ft_fl.subnets.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Participant:
    """A client as strategies and the planner see it.

    Attributes:
        client: Its number. examples: What it trains on in this round, unless a strategy says less.
        budget: As it reported it.
        capacity: Its budgets resolved, int64 [4] in ``RESOURCES`` order.
        holds: bool [blocks, heads], subnets whose fixed parameters it has; None for none.
        local: All its training examples; those of the round, if not told.
    """

    client: int
    examples: int
    budget: Budget
    capacity: np.ndarray
    cached: np.ndarray | None = None
    local: int = 0

    def __post_init__(self) -> None:
        if not self.local:
            object.__setattr__(self, "local", self.examples)

    def affords(self, cost: Cost) -> bool:
        """Whether a cost is within every budget, deadline included."""
        return bool((cost.vector() <= self.capacity).all()) and self.on_time(cost)

    def on_time(self, cost: Cost) -> bool:
        """Whether it is done with so much before its deadline."""
        deadline = self.budget.deadline
        return deadline is None or self.budget.seconds(cost) <= deadline


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round, and what that is predicted to cost.

    Attributes:
        client: Its number.
        schedule: Its operations, and ranks where several are offered.
        cost: Predicted cost, passes before training included.
        passes: What it does with the whole model before training.
        examples: On how many examples it trains; None for all of the participant's.
        way: How it runs the schedule.
        gap: The schedule's value is within this share of a bound that no schedule of the joint
            problem with these slots exceeds; ``None`` where there is none, and for sitting out.
    """

    client: int
    schedule: Schedule
    cost: Cost
    probes: Probes = NO_PROBES
    gap: float | None = None
    examples: int | None = None
    policy: ExecutionPolicy = DEFAULT_POLICY
