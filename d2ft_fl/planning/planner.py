"""A round's plan: every client's budgets and the scores of subnets in, schedules out.

Utilities of plans are in :mod:`d2ft_fl.planning.objective`, prices of options in
:mod:`d2ft_fl.planning.pricing`. :mod:`d2ft_fl.planning.client_knapsacks` finds schedules that fit
exactly.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes, probes_cost, with_probes
from d2ft_fl.costs.resources import RESOURCES, Cost
from d2ft_fl.errors import RunError
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.client_knapsacks import ClientKnapsacks, costs_of
from d2ft_fl.planning.cost_tables import DOWN, FLOPS, TICKS, UP
from d2ft_fl.planning.objective import Objective
from d2ft_fl.subnets.schedule import Operation, Schedule

CHUNK = 128  # clients that are solved for at once: more take memory, and not less time


@dataclass(frozen=True)
class Planner(Objective):
    """Plans rounds under one cost model; for attributes see :class:`Objective`."""

    def plan(
        self,
        clients: Sequence[Participant],
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int = 0,
        probes: Sequence[Probes] | None = None,
        timed: bool = True,
    ) -> list[Assignment]:
        """Return schedules that keep every budget, of clients in order.

        A client sits out when nothing fits.

        Args:
            clients: Who, on how much data, under which budgets.
            backward: Scores of training, mean 1: float64 [blocks, heads], or of every client
                [clients, blocks, heads].
            forward: Scores of running, in the shape of ``backward``.
            rotation: Shifts which slots a partly scheduled subnet gets, for example the round.
            probes: What each client is to do with the whole model first, where its budgets afford
                that: both, else selecting alone, else none.
            timed: Whether costs say how long clients compute; those of clients with deadlines do
                in any case.

        Raises:
            RunError: When a plan breaks a budget, which is a bug.
        """
        capacity = np.array([c.capacity for c in clients], dtype=np.int64).reshape(len(clients), 4)
        wanted = list(probes or [NO_PROBES] * len(clients))
        planned: dict[int, Assignment] = {}
        selecting = [Probes(viewed=w.viewed) for w in wanted]
        for first in (wanted, selecting) if selecting != wanted else (wanted,):
            planned |= self._plan_after(first, clients, planned, backward, forward, rotation, timed)
        who = np.array([i for i in range(len(clients)) if i not in planned], dtype=np.int64)
        others = self._plan(clients, who, capacity[who], backward, forward, rotation, timed)
        planned |= dict(zip(who.tolist(), others, strict=True))
        in_order = [planned[i] for i in range(len(clients))]
        self._refuse_broken_budgets(clients, in_order, capacity)
        return in_order

    def _plan_after(
        self,
        probes: Sequence[Probes],
        clients: Sequence[Participant],
        planned: Container[int],
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int,
        timed: bool,
    ) -> dict[int, Assignment]:
        """Plan clients that afford their probes, and something to train after them."""
        before = {
            index: probes_cost(self.costs.on(c.budget.curve), probe, c.cached)
            for index, (c, probe) in enumerate(zip(clients, probes, strict=True))
            if probe and index not in planned
        }
        able = {i: cost for i, cost in before.items() if clients[i].affords(cost)}
        if not able:
            return {}
        who = np.array(list(able))
        spent = np.array([cost.vector() for cost in able.values()])
        reserved = np.array([clients[i].capacity for i in who])
        reserved[:, [FLOPS, UP]] -= spent[:, [FLOPS, UP]]
        reserved[:, DOWN] = UNLIMITED  # everything travels down already
        # What has the whole model sent down gets no compensation on top.
        plans = self._uncompensated._plan(
            clients, who, reserved, backward, forward, rotation, timed, able
        )
        return {
            index: replace(a, cost=with_probes(a.cost, able[index]), probes=probes[index])
            for index, a in zip(able, plans, strict=True)
            if not a.schedule.sits_out
        }

    def _plan(
        self,
        clients: Sequence[Participant],
        who: np.ndarray,
        capacity: np.ndarray,
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int,
        timed: bool,
        before: Mapping[int, Cost] | None = None,
    ) -> list[Assignment]:
        """Plan some clients: try with all slots active, then with fewer, until something trains.

        Args:
            clients: All clients of the round.
            who: Which of them are planned: int64 [planned].
            capacity: What they may use: int64 [planned, 4].
            backward: Scores of training, of all clients.
            forward: Scores of running, of all clients.
            rotation: By how much patterns are shifted.
            timed: See :meth:`plan`.
            before: Cost of their probes, which deadlines are less by.
        """
        if not len(who):
            return []
        chosen = [clients[i] for i in who]
        spent = before or {}
        deadlines = np.array([_ticks(clients[i].budget, spent.get(i)) for i in who.tolist()])
        arch, slots = self.costs.arch, self.costs.slots
        drafts = Drafts.empty(len(who), slots, arch.blocks, arch.heads)
        for active in range(slots, 0, -1):
            for part in self._chunks(drafts.untrained()):
                knapsacks = ClientKnapsacks(
                    self,
                    [chosen[i] for i in part],
                    active,
                    rotation,
                    _scores_of(backward, who[part]),
                    _scores_of(forward, who[part]),
                )
                drafts.improve(part, *knapsacks.operations(capacity[part], deadlines[part]))
        if self.costs.compensated:  # the solver charges every block for skipping
            drafts.fill(self._affording_everything(chosen, capacity), arch.rank)
        return self._assignments(chosen, drafts, timed)

    def _chunks(self, left: np.ndarray) -> Iterator[np.ndarray]:
        """Cut clients into those that are solved for at once; coupled ones are so together."""
        step = CHUNK if self.coupling != "spread" else max(1, len(left))
        for start in range(0, len(left), step):
            yield left[start : start + step]

    def _affording_everything(
        self, clients: Sequence[Participant], capacity: np.ndarray
    ) -> np.ndarray:
        """Find clients whose budgets afford everything FULL: bool [clients].

        Args:
            clients: Whose.
            capacity: What they may use: int64 [clients, 4].
        """
        arch, everything = self.costs.arch, self.costs.everything().operations
        full = np.broadcast_to(everything, (len(clients), *everything.shape))
        ranks = np.full((len(clients), arch.blocks, arch.heads), arch.rank)
        examples = np.array([c.examples for c in clients], dtype=np.int64)
        costs = costs_of(self.costs, clients, full, examples, self.stated_ranks(ranks), timed=False)
        on_time = [c.on_time(cost) for c, cost in zip(clients, costs, strict=True)]
        within = np.array([cost.vector() for cost in costs]).reshape(len(costs), 4) <= capacity
        return np.logical_and(within.all(axis=1), on_time)

    def _assignments(
        self, clients: Sequence[Participant], drafts: "Drafts", timed: bool
    ) -> list[Assignment]:
        """Cost drafts exactly, and make assignments of them."""
        examples = np.array([c.examples for c in clients], dtype=np.int64)
        ranks = self.stated_ranks(drafts.ranks)
        costs = costs_of(self.costs, clients, drafts.operations, examples, ranks, timed)
        return [
            Assignment(
                c.client,
                Schedule(operations, self.stated_ranks(ranks)),
                cost,
                gap=float(gap) if certified and operations.any() else None,
            )
            for c, operations, ranks, cost, gap, certified in zip(
                clients,
                drafts.operations,
                drafts.ranks,
                costs,
                drafts.gaps,
                self._certified(clients, examples),
                strict=True,
            )
        ]

    def _certified(self, clients: Sequence[Participant], examples: np.ndarray) -> np.ndarray:
        """Whether the solver's gap bounds how far a plan is from the best: bool [clients].

        Args:
            clients: Who is planned.
            examples: On which clients train: int64 [clients].
        """
        certified = examples >= self.costs.slots
        # How long computing takes has no exact price.
        certified &= np.array([not (c.budget.deadline and c.budget.speed) for c in clients])
        if self.method != "joint" or self.costs.compensated:
            certified[:] = False
        # What is FROZEN below all that trains in its slot has no price.
        if self.costs.slots > 1 and self.frozen_weight:
            certified[:] = False
        return certified

    @staticmethod
    def _refuse_broken_budgets(
        clients: Sequence[Participant], planned: list[Assignment], capacity: np.ndarray
    ) -> None:
        """Check plans against budgets: one that breaks them is a bug, and never sent.

        Raises:
            RunError: With the client, what it would use and what is allowed.
        """
        for c, a, allowed in zip(clients, planned, capacity, strict=True):
            over = a.cost.vector() > allowed
            if over.any():
                raise RunError(
                    f"planner bug: client {a.client} would use {a.cost.vector()[over].tolist()} of "
                    f"{[r for r, o in zip(RESOURCES, over, strict=True) if o]}, allowed are "
                    f"{allowed[over].tolist()}"
                )
            if not c.on_time(a.cost):
                raise RunError(
                    f"planner bug: client {a.client} would take {c.budget.seconds(a.cost)} s, "
                    f"allowed are {c.budget.deadline} s"
                )

    @cached_property
    def _uncompensated(self) -> "Planner":
        """The planner of rounds without compensation."""
        return replace(self, costs=self.costs.uncompensated)


@dataclass
class Drafts:
    """What is planned so far for some clients.

    Attributes:
        operations: int8 [clients, slots, blocks, heads].
        ranks: Of subnets that train: int64 [clients, blocks, heads].
        gaps: How far utilities are from their bounds, as shares: float64 [clients].
    """

    operations: np.ndarray
    ranks: np.ndarray
    gaps: np.ndarray

    @classmethod
    def empty(cls, clients: int, slots: int, blocks: int, heads: int) -> "Drafts":
        """Return drafts in which nobody does anything."""
        return cls(
            np.zeros((clients, slots, blocks, heads), dtype=np.int8),
            np.zeros((clients, blocks, heads), dtype=np.int64),
            np.zeros(clients),
        )

    def untrained(self) -> np.ndarray:
        """Return the clients that train nothing: int64 [untrained].

        Running forward without training anything changes only the classifier: that is a plan, but
        fewer slots may do better.
        """
        return np.flatnonzero(~(self.operations == Operation.FULL).any(axis=(1, 2, 3)))

    def improve(
        self, part: np.ndarray, operations: np.ndarray, ranks: np.ndarray, gaps: np.ndarray
    ) -> None:
        """Take over new schedules of some clients: those that train, or replace nothing.

        Args:
            part: Whose: int64 [part].
            operations: int8 [part, slots, blocks, heads].
            ranks: int64 [part, blocks, heads].
            gaps: float64 [part].
        """
        nothing = ~self.operations[part].any(axis=(1, 2, 3))
        trains = (operations == Operation.FULL).any(axis=(1, 2, 3))
        better = operations.any(axis=(1, 2, 3)) & (nothing | trains)
        self.operations[part[better]] = operations[better]
        self.ranks[part[better]] = ranks[better]
        self.gaps[part[better]] = gaps[better]

    def fill(self, who: np.ndarray, rank: int) -> None:
        """Have some clients, bool [clients], train everything at one rank."""
        self.operations[who] = Operation.FULL
        self.ranks[who] = rank


def _scores_of(scores: np.ndarray, who: np.ndarray) -> np.ndarray:
    """Return scores of some clients: [clients or 1, subnets].

    Args:
        scores: Of all: [blocks, heads], or [clients, blocks, heads].
        who: Which clients: int64 [clients].
    """
    rows = scores[who] if scores.ndim == 3 else scores[None]
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _ticks(budget: Budget, before: Cost | None) -> int:
    """Return a client's ticks, less those of its probes, and one for the rounding of seconds."""
    if budget.deadline is None:
        return UNLIMITED
    spent = budget.seconds(before) if before else 0.0
    return int(TICKS * max(-1.0, 1 - spent / budget.deadline)) - 1
