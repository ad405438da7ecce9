"""Participants and assignments: what one client of a round may spend, and is to do."""

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
        client: Its number.
        examples: How many examples it trains on in this round, unless a strategy says less.
        budget: As it reported it.
        capacity: Its budgets resolved, int64 [4] in the order of ``RESOURCES``.
        cached: Subnets whose fixed parameters it has: bool [blocks, heads]; None for none.
        local: How many training examples it has in all; 0 for ``examples``.
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
        """Whether a cost takes no longer than the deadline."""
        deadline = self.budget.deadline
        return deadline is None or self.budget.seconds(cost) <= deadline


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round, and what that is predicted to cost.

    Attributes:
        client: Its number.
        schedule: Its operations, and ranks where several are offered.
        cost: Predicted cost, probes included.
        probes: What it does with the whole model before training.
        gap: The schedule's utility is within this share of a bound that no schedule of the joint
            problem with these slots exceeds; None where there is no bound, and for sitting out.
        examples: On how many examples it trains; None for all of the participant's.
        policy: The execution policy under which it runs the schedule.
    """

    client: int
    schedule: Schedule
    cost: Cost
    probes: Probes = NO_PROBES
    gap: float | None = None
    examples: int | None = None
    policy: ExecutionPolicy = DEFAULT_POLICY
