"""One round's plan: all clients' assignments, what it leaves behind, and how it travels."""

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ft_fl import holdings, wire
from d2ft_fl.budgets import Budget
from d2ft_fl.costs import RANK_BYTES, RESOURCES
from d2ft_fl.federation import Federation, State
from d2ft_fl.holdings import has_fixed
from d2ft_fl.planner import Assignment, Participant
from d2ft_fl.subnets import Architecture, pack_for


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

    @cached_property
    def trained(self) -> np.ndarray:
        """How many clients train each subnet: int64 [blocks, heads]."""
        return np.stack([a.schedule.trained for a in self.assignments]).sum(axis=0, dtype=np.int64)

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


def held_after(
    arch: Architecture,
    state: State,
    plan: Plan,
    answered: Container[int],
    changed: np.ndarray,
) -> dict[int, np.ndarray]:
    """What clients have of what never changes; of one that failed nothing is taken for sure.

    Args:
        changed: Subnets of which it did change after all: bool [blocks, heads].
    """
    found = dict(state.holds)
    if not has_fixed(arch):
        return found
    for a in plan.working:
        if a.client in answered:
            sent = a.schedule.resident | bool(a.passes)
            found[a.client] = found.get(a.client, False) | sent
        else:
            found.pop(a.client, None)
    return {client: own & ~changed for client, own in found.items()}


def last_trained(state: State, plan: Plan, answered: Container[int]) -> np.ndarray:
    """The round in which each subnet was last trained, once these clients answered a plan.

    Returns:
        int64 [blocks, heads], 0 for never.
    """
    trained = [a.schedule.trained & (a.client in answered) for a in plan.assignments]
    return np.where(np.stack(trained).any(axis=0), plan.round, state.last_trained)


def encode_assignment(
    federation: Federation, state: State, a: Assignment, budget: Budget | None = None
) -> bytes:
    """The message that tells a client what to do, with the slices that it needs.

    Args:
        budget: What it is held to in this round, where that is not its own.
    """
    carried = a.schedule
    if a.passes:
        carried = federation.costs.everything()  # they run everything
    meta = {
        "round": state.round + 1,
        "client": a.client,
        "operations": a.schedule.operations.astype("int8").tobytes().hex(),
        "shape": list(a.schedule.operations.shape),
        "passes": [a.passes.scored, a.passes.viewed],
        "examples": a.examples,
        "accumulate": a.accumulate,
        "calibrate": federation.calibrates(state.round + 1),
        "keeps": [r for r in RESOURCES if r in federation.keeps],
    }
    if budget is not None:
        meta["budget"] = budget.to_json()
    if a.schedule.ranks is not None:
        meta["ranks"] = a.schedule.ranks.astype(f"<u{RANK_BYTES}").tobytes().hex()
    holds = federation.holds(state, a.client)
    if holds is not None:
        meta["holds"] = np.packbits(holds).tobytes().hex()
        meta["digests"] = holdings.write(carried, state.digests)
    tensors = pack_for(federation.arch, state.weights, carried, holds)
    if not a.passes and state.means.known is not None:
        weights = federation.model_weights(state)
        tensors |= state.means.offsets(federation.own or federation.arch, weights, a.schedule)
    return wire.encode(tensors, meta)
