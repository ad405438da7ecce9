"""One round's plan: all clients' assignments, and what clients have after it."""

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
    """The assignments of one round.

    Attributes:
        round: The round, counted from 1.
        clients: Everyone who takes part, in order.
        assignments: What each client does, in the order of ``clients``.
        seconds: How long planning took.
    """

    round: int
    clients: list[Participant]
    assignments: list[Assignment]
    seconds: float = 0.0

    @property
    def working(self) -> list[Assignment]:
        """Assignments of the clients that do not sit out."""
        return [a for a in self.assignments if not a.schedule.sits_out]

    def only(self, clients: Collection[int]) -> "Plan":
        """Return the plan of some of the clients; of none, a plan in which one client sits out.

        Args:
            clients: Numbers of the clients to keep.
        """
        pairs = list(zip(self.clients, self.assignments, strict=True))
        kept = [(c, a) for c, a in pairs if c.client in clients]
        if not kept:
            c, a = pairs[0]
            nothing = Schedule.filled(Operation.SHORTCUT, *a.schedule.operations.shape)
            kept = [(c, Assignment(c.client, nothing, Cost(0, 0, 0, 0), examples=a.examples))]
        return replace(self, clients=[c for c, _ in kept], assignments=[a for _, a in kept])

    @cached_property
    def trained(self) -> np.ndarray:
        """How many clients train each subnet: int64 [blocks, heads]."""
        return np.stack([a.schedule.trained for a in self.assignments]).sum(axis=0, dtype=np.int64)

    def utility(self, judge: Utility, bits_up: int, bits_down: int) -> float:
        """Return the mean utility over clients; see :meth:`.Utility.mean_of`.

        Args:
            judge: What judges clients' rounds.
            bits_up: Bits of changes up, where an assignment does not say.
            bits_down: Bits of weights down, where an assignment does not say.
        """
        policies = [a.policy for a in self.assignments]
        return judge.mean_of(
            self.schedules(),
            np.array([c.local for c in self.clients]),
            np.array([a.examples or 0 for a in self.assignments]),
            [(policy.bits_up or bits_up, policy.bits_down or bits_down) for policy in policies],
        )

    def schedules(self) -> np.ndarray:
        """Return the operations of all clients: int8 [clients, slots, blocks, heads]."""
        operations = np.stack([a.schedule.operations for a in self.assignments])
        return np.ascontiguousarray(operations)  # stacked broadcasts are not contiguous

    def ranks(self, rank: int) -> np.ndarray | None:
        """Return the rank at which each client trains each subnet.

        Args:
            rank: The rank of the architecture, for schedules without ranks.

        Returns:
            int64 [clients, blocks, heads], 0 where a subnet does not train; None where no schedule
            has ranks.
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
    """Return the fixed parameters that clients have cached after a round.

    A client that failed is taken to have none.

    Args:
        arch: The architecture of the round.
        state: The state that the round began with.
        plan: The plan of the round.
        answered: The clients whose replies were aggregated.
        changed: Subnets whose fixed parameters changed in the round: bool [blocks, heads].

    Returns:
        Client -> the subnets whose fixed parameters it has: bool [blocks, heads].
    """
    cached = dict(state.cached)
    if not has_fixed(arch):
        return cached
    for a in plan.working:
        if a.client in answered:
            sent = a.schedule.resident | bool(a.probes)
            cached[a.client] = cached.get(a.client, False) | sent
        else:
            cached.pop(a.client, None)
    return {client: subnets & ~changed for client, subnets in cached.items()}
