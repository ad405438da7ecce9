"""One round's plan: all clients' assignments, and what it leaves behind."""

from collections.abc import Collection, Container
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.costs.resources import Cost
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.utility import Utility
from d2ft_fl.rounds.federation import State
from d2ft_fl.subnets.architecture import Architecture, has_fixed
from d2ft_fl.subnets.schedule import Operation, Schedule


@dataclass(frozen=True)
class Plan:
    """One round's assignments, in the order of ``clients``, and the seconds planning took."""

    round: int
    clients: list[Participant]
    assignments: list[Assignment]
    seconds: float = 0.0

    @property
    def working(self) -> list[Assignment]:
        """Assignments of those who do not sit out."""
        return [a for a in self.assignments if not a.schedule.sits_out]

    def only(self, clients: Collection[int]) -> "Plan":
        """Return the same of some of the clients; of none it is one that does nothing."""
        pairs = list(zip(self.clients, self.assignments, strict=True))
        kept = [(c, a) for c, a in pairs if c.client in clients]
        if not kept:
            c, a = pairs[0]
            still = Schedule.filled(Operation.SHORTCUT, *a.schedule.operations.shape)
            kept = [(c, Assignment(c.client, still, Cost(0, 0, 0, 0), examples=a.examples))]
        return replace(self, clients=[c for c, _ in kept], assignments=[a for _, a in kept])

    @cached_property
    def trained(self) -> np.ndarray:
        """How many clients train each subnet: int64 [blocks, heads]."""
        return np.stack([a.schedule.trained for a in self.assignments]).sum(axis=0, dtype=np.int64)

    def utility(self, judge: Utility, bits_up: int, bits_down: int) -> float:
        """Return the mean utility over clients; see :meth:`.Utility.mean_of`.

        Args:
            judge: What judges clients' rounds.
            bits_up, bits_down: Bits of numbers, where an assignment does not say.
        """
        policies = [a.policy for a in self.assignments]
        return judge.mean_of(
            self.schedules(),
            np.array([c.local for c in self.clients]),
            np.array([a.examples or 0 for a in self.assignments]),
            [(policy.bits_up or bits_up, policy.bits_down or bits_down) for policy in policies],
        )

    def schedules(self) -> np.ndarray:
        """int8 [clients, slots, blocks, heads]."""
        found = np.stack([a.schedule.operations for a in self.assignments])
        return np.ascontiguousarray(found)  # stacks of broadcasts are not

    def ranks(self, rank: int) -> np.ndarray | None:
        """At which rank subnets train, 0 for those that do not: int64 [clients, blocks, heads].

        None where no schedule says anything of ranks.

        Args:
            rank: The architecture's, of schedules that say nothing.
        """
        schedules = [a.schedule for a in self.assignments]
        if all(s.ranks is None for s in schedules):
            return None
        return np.stack([s.trained * (rank if s.ranks is None else s.ranks) for s in schedules])


def cached_after(
    arch: Architecture,
    state: State,
    plan: Plan,
    answered: Container[int],
    changed: np.ndarray,
) -> dict[int, np.ndarray]:
    """Return what clients have of what never changes; of one that failed nothing is taken for sure.

    Args:
        changed: Subnets of which it did change after all: bool [blocks, heads].
    """
    found = dict(state.cached)
    if not has_fixed(arch):
        return found
    for a in plan.working:
        if a.client in answered:
            sent = a.schedule.resident | bool(a.probes)
            found[a.client] = found.get(a.client, False) | sent
        else:
            found.pop(a.client, None)
    return {client: own & ~changed for client, own in found.items()}


def last_trained(state: State, plan: Plan, answered: Container[int]) -> np.ndarray:
    """Return the round in which each subnet was last trained, once these clients answered a plan.

    Returns:
        int64 [blocks, heads], 0 for never.
    """
    trained = [a.schedule.trained & (a.client in answered) for a in plan.assignments]
    return np.where(np.stack(trained).any(axis=0), plan.round, state.last_trained)
