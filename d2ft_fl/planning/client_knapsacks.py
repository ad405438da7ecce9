"""The knapsacks of many clients' plans: what the solver is shown, and what it chooses.

Tables price peak memory from below, and under LoRA FLOPs and memory in excess, by a known amount at
most, which the solver is shown on top of the budget. The time of computing they price as a sum over
options and opened blocks, which it nearly is. In all cases exact costs are checked, and what is
shown shrinks by what was over until they fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.resources import MEMORY_MARGIN, Cost, costs_from
from d2ft_fl.planning.assignment import Participant
from d2ft_fl.planning.cost_tables import (
    DOWN,
    FLOPS,
    MEMORIES,
    MEMORY,
    TICKS,
    TIME,
    UP,
    Table,
    WorkPrices,
)
from d2ft_fl.planning.knapsack import Spread, solve, solve_spread, solve_two_stages
from d2ft_fl.planning.objective import Objective
from d2ft_fl.planning.patterns import Patterns, pattern_starts
from d2ft_fl.planning.problem import Solution, Structure, used
from d2ft_fl.subnets.schedule import Operation, effective

TRIES = 24  # of shrinking what is shown to the solver
OPTIMISTIC_TRIES = 6  # of them with more FLOPs and time than the budget has
BYTES = [UP, DOWN]
FILLS = 4  # times that more is trained where much of a deadline is left
UNUSED = 0.1  # of a deadline that may be left
HOPE = 8  # one part in so many of the time is shown on top: its prices may be too high


@dataclass(frozen=True)
class ClientKnapsacks:
    """The knapsacks of some clients with a number of active slots.

    Attributes:
        objective: Utilities and prices.
        clients: Who, on how much data, under which budgets.
        active: Slots that may run anything.
        rotation: By how much patterns are shifted.
        backward: Scores of training: float64 [clients or 1, subnets].
        forward: Scores of running: float64 [clients or 1, subnets].
    """

    objective: Objective
    clients: list[Participant]
    active: int
    rotation: int
    backward: np.ndarray
    forward: np.ndarray

    @cached_property
    def patterns(self) -> Patterns:
        """The options of a subnet."""
        return self.objective.patterns(self.active)

    @cached_property
    def examples(self) -> np.ndarray:
        """Examples on which clients train: int64 [clients]."""
        return np.array([c.examples for c in self.clients], dtype=np.int64)

    @cached_property
    def tables(self) -> tuple[list[Table], np.ndarray]:
        """Distinct tables, and the index of each client's; with deadlines one a client."""
        objective, active, rotation = self.objective, self.active, self.rotation % self.active
        tables = [objective.table(c.examples, active, rotation, c.cached) for c in self.clients]
        if any(c.budget.deadline is not None for c in self.clients):
            prices = {
                (c.examples, c.budget.curve): WorkPrices.of(
                    objective.costs.on(c.budget.curve), c.examples
                )
                for c in self.clients
            }
            timed = [
                t.timed(c.budget, prices[c.examples, c.budget.curve])
                for t, c in zip(tables, self.clients, strict=True)
            ]
            return timed, np.arange(len(timed))
        distinct = {id(table): table for table in tables}  # clients share objects
        places = {key: place for place, key in enumerate(distinct)}
        return list(distinct.values()), np.array([places[id(table)] for table in tables])

    @cached_property
    def items(self) -> np.ndarray:
        """What options cost: int64 [tables, subnets, options, resources]."""
        return np.stack([t.items for t in self.tables[0]])

    @cached_property
    def structure(self) -> Structure:
        """Blocks as groups of subnets, their openings, and the cases of the lowest block."""
        arch, patterns = self.objective.costs.arch, self.patterns
        groups = np.repeat(np.arange(arch.blocks), arch.heads)
        openings = np.stack([t.openings for t in self.tables[0]])
        if not patterns.below.any():
            return Structure(groups, patterns.levels, openings)
        # Case l: blocks below l train nothing, and FROZEN costs there what FORWARD_ONLY does.
        modes = (np.arange(arch.blocks) < np.arange(arch.blocks)[:, None]).astype(np.int64)
        below = patterns.below | (patterns.runs == 0)
        return Structure(
            groups, patterns.levels, openings, modes, np.stack([~patterns.below, below])
        )

    @cached_property
    def utilities(self) -> tuple[np.ndarray, np.ndarray]:
        """Utility of training, and the rest: float64 [clients or 1, subnets, options] each."""
        p, slots = self.patterns, self.objective.costs.slots
        uncut = p.full + p.frozen + p.below * p.forward
        weights = self.objective.forward_weight * p.runs + self.objective.frozen_weight * uncut
        train = self.backward[..., None] * self.share
        return train, self.forward[..., None] * (weights / slots)

    @cached_property
    def share(self) -> np.ndarray:
        """How far options train, rank and all: float64 [options]."""
        utility = self.objective.rank_utility(self.patterns)
        return self.patterns.full / self.objective.costs.slots * utility

    def operations(
        self, capacity: np.ndarray, deadlines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose what fits exactly.

        Args:
            capacity: What clients may use: int64 [clients, 4].
            deadlines: Their ticks: int64 [clients].

        Returns:
            Operations and ranks, as of :meth:`_materialise`, and certified gaps, float64 [clients].
        """
        at_most, excess = self._capacities(capacity, deadlines)
        shown = at_most + excess
        which = self.tables[1]
        solution = self._choose(shown, np.arange(len(which)))
        choice, value = solution.choice.copy(), solution.value.copy()
        operations, ranks = self._materialise(choice)
        todo = np.arange(len(which))
        for tried in range(TRIES):
            over = self._over(operations[todo], ranks[todo], todo, capacity, deadlines)
            again = (over > 0).any(axis=1) & operations[todo].any(axis=(1, 2, 3))
            todo, over = todo[again], over[again]
            if not len(todo):
                break
            spent = used(choice[todo], self.items, self.structure, which[todo])
            less = np.where(np.isin(np.arange(over.shape[1]), MEMORIES), over // 3, over)
            lower = np.minimum(shown[todo], spent) - np.maximum(1, less)
            shown[todo] = np.where(over > 0, lower, shown[todo])
            if tried >= OPTIMISTIC_TRIES:
                shown[todo] = np.minimum(shown[todo], at_most[todo])
            fresh = self._choose(shown[todo], todo, solution)
            choice[todo], value[todo] = fresh.choice, fresh.value
            operations[todo], ranks[todo] = self._materialise(fresh.choice)
        operations[todo] = Operation.SHORTCUT  # no choice fits
        value[todo] = -np.inf
        of_its_own = self.objective.coupling != "spread" and self.objective.method != "two-stage"
        if shown.shape[1] > TIME and of_its_own:
            fits = np.flatnonzero(np.isfinite(value))
            for client in fits[[self.clients[i].budget.deadline is not None for i in fits]]:
                value[client] += self._use_time(client, choice, at_most, capacity, deadlines)
            operations[fits], ranks[fits] = self._materialise(choice[fits])
        return operations, ranks, _gaps(value, solution.bound)

    def _use_time(
        self,
        client: int,
        choice: np.ndarray,
        at_most: np.ndarray,
        capacity: np.ndarray,
        deadlines: np.ndarray,
    ) -> float:
        """Train more where a client would leave much of its deadline unused.

        The solver's prices of time can be too high. So subnets become FULL in all slots, those
        first that are worth the most for the time that each takes, as it is found out exactly.

        Args:
            client: Whose choice it is.
            choice: Of all clients: int64 [clients, subnets]. The client's is replaced.
            at_most: What options may use: int64 [clients, the solver's resources].
            capacity: What clients may use: int64 [clients, 4].
            deadlines: Their ticks: int64 [clients].

        Returns:
            What that adds to the choice's value.
        """

        def over_of(tried: np.ndarray) -> np.ndarray:
            who = np.full(len(tried), client)
            over = self._over(*self._materialise(tried), who, capacity, deadlines)
            prices = used(tried, self.items, self.structure, self.tables[1][who])
            over[:, BYTES] = (prices - at_most[client])[:, BYTES]  # which are exact
            return over

        train, rest = (u[client % len(u)] for u in self.utilities)  # one may be everybody's
        utility, places = train + rest, np.arange(choice.shape[1])  # [subnets, options]
        full, before = int(self.share.argmax()), choice[client].copy()
        for _ in range(FILLS):
            now = choice[client]
            gain = utility[:, full] - utility[places, now]
            open_to = np.flatnonzero((now != full) & (gain > 0))
            (left,) = -over_of(now[None])[:, TIME]
            if left <= UNUSED * deadlines[client] or not len(open_to):
                break
            tried = np.repeat(now[None], len(open_to), axis=0)
            tried[np.arange(len(open_to)), open_to] = full
            over = over_of(tried)
            fits = (over <= 0).all(axis=1)
            if not fits.any():
                break
            takes = np.maximum(1, over[:, TIME] + left)[fits]
            order = np.argsort(-gain[open_to][fits] / takes, kind="stable")
            # Together they may take more of something than there is: then the first one does not.
            several = open_to[fits][order][np.cumsum(takes[order]) <= left]
            more = np.repeat(now[None], 2, axis=0)
            more[0, several], more[1, several[0]] = full, full
            choice[client] = more[int(np.argmax((over_of(more) <= 0).all(axis=1)))]
        return float((utility[places, choice[client]] - utility[places, before]).sum())

    def _capacities(
        self, capacity: np.ndarray, deadlines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what options may use, and by how much tables may price them too high.

        Memory counts twice, for first and later batches, without the cost model's margin.

        Args:
            capacity: int64 [clients, 4].
            deadlines: Ticks: int64 [clients].

        Returns:
            int64 [clients, the solver's resources] each.
        """
        tables, which = self.tables
        constant = np.stack([t.constant for t in tables])[which]
        at_most = np.concatenate([capacity, capacity[:, [MEMORY]]], axis=1)
        if constant.shape[1] > TIME:
            at_most = np.concatenate([at_most, deadlines[:, None]], axis=1)
        at_most[:, MEMORIES] -= at_most[:, MEMORIES] // (MEMORY_MARGIN + 1)
        at_most -= constant
        excess = np.stack([t.excess for t in tables])[which]
        if constant.shape[1] > TIME:
            excess[:, TIME] += at_most[:, TIME].clip(0) // HOPE
        return at_most, excess

    def _over(
        self,
        operations: np.ndarray,
        ranks: np.ndarray,
        who: np.ndarray,
        capacity: np.ndarray,
        deadlines: np.ndarray,
    ) -> np.ndarray:
        """Return by how much plans of some clients break budgets.

        Args:
            operations: int8 [who, slots, blocks, heads].
            ranks: int64 [who, blocks, heads].
            who: Which clients: int64 [who].
            capacity: Of all clients: int64 [clients, 4].
            deadlines: Of all clients: int64 [clients].

        Returns:
            int64 [who, the solver's resources]: of those that the solver's prices do not settle;
            the rest is 0.
        """
        costs, examples = self.objective.costs, self.examples[who]
        stated_ranks = self.objective.stated_ranks(ranks)
        over = np.zeros((len(who), self.items.shape[-1]), dtype=np.int64)
        if not any(t.excess.any() for t in self.tables[0]) and over.shape[1] <= TIME:
            memory = costs.memories(operations, examples, stated_ranks)
            over[:, MEMORIES] = (memory - capacity[who, MEMORY])[:, None]
            return over
        clients = [self.clients[i] for i in who]
        exact = costs_of(costs, clients, operations, examples, stated_ranks, timed=False)
        amounts = np.array([cost.vector() for cost in exact])
        over[:, FLOPS] = amounts[:, FLOPS] - capacity[who, FLOPS]
        over[:, MEMORIES] = amounts[:, [MEMORY]] - capacity[who, MEMORY][:, None]
        if over.shape[1] > TIME:
            for row, (client, cost, ticks) in enumerate(
                zip(clients, exact, deadlines[who].tolist(), strict=True)
            ):
                if client.budget.deadline is not None:
                    share = min(2.0, client.budget.seconds(cost) / client.budget.deadline)
                    over[row, TIME] = math.ceil(TICKS * share) - ticks
        return over

    def _choose(
        self, shown: np.ndarray, who: np.ndarray, coupled: Solution | None = None
    ) -> Solution:
        """Choose options of some clients.

        Args:
            shown: What they may use, as shown to the solver: int64 [who, its resources].
            who: Which clients: int64 [who].
            coupled: The first choice of all clients, where this is a later one of some.
        """
        objective, share = self.objective, self.share
        costs, structure, which = self.items, self.structure, self.tables[1][who]
        train, rest = (u[who] if len(u) > 1 else u for u in self.utilities)
        if objective.method == "two-stage":
            only = self.patterns.forward == 0
            return solve_two_stages(train, rest, share, only, costs, shown, structure, which)
        if objective.coupling != "spread":
            return solve(train + rest, costs, shown, structure, which, effort=1)
        weight = self.examples[who] / self.examples.mean()
        if coupled is None:
            spread = Spread(
                self.backward.mean(axis=0),
                share,
                weight,
                objective.spread_clients,
                objective.least_clients,
            )
            return solve_spread(rest, costs, shown, spread, structure, which)
        marginal = self.backward.mean(axis=0) * coupled.marginal  # type: ignore[attr-defined]
        train = marginal[None, :, None] * share * weight[:, None, None]
        # Who is needed for a subnet stays with it, if anything allows that.
        trained = (share[coupled.choice] > 0) & coupled.feasible[:, None]  # [clients, subnets]
        needed = trained[who] & (trained.sum(axis=0) <= objective.least_clients)
        train = train + self.backward.max() * needed[..., None] * (share > 0)
        return solve(train + rest, costs, shown, structure, which, effort=1)

    def _materialise(self, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn choices [clients, subnets] into operations as they run.

        Returns:
            Operations, int8 [clients, slots, blocks, heads], and the ranks of those that train,
            int64 [clients, blocks, heads].
        """
        costs = self.objective.costs
        starts = pattern_starts(costs.arch, self.active, self.rotation)
        columns = self.patterns.operations[choice.clip(0), starts]  # [clients, subnets, slots]
        shape = (len(choice), costs.slots, costs.arch.blocks, costs.arch.heads)
        operations = columns.transpose(0, 2, 1).reshape(shape)
        ranks = self.patterns.rank[choice.clip(0)].reshape(len(choice), *shape[2:])
        return (effective(operations) if self.patterns.below.any() else operations), ranks


def _gaps(value: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Return how far values are from their bounds, as shares from 0 to 1: float64 [clients]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = (1 - value / bound).clip(0.0, 1.0)
    return np.where(bound > 0, gap, 0.0)


def costs_of(
    costs: CostModel,
    clients: Sequence[Participant],
    operations: np.ndarray,
    examples: np.ndarray,
    ranks: np.ndarray | None,
    timed: bool,
) -> list[Cost]:
    """Return what rounds cost clients, each on the curve of its own machine.

    Args:
        costs: The cost model.
        clients: Whose.
        operations: int8 [clients, slots, blocks, heads].
        examples: On which they train: int64 [clients].
        ranks: Those of schedules; see :meth:`.CostModel.ranks`.
        timed: Whether costs say how long all compute, and not only those with a deadline.
    """
    amounts = costs.costs(operations, examples, cached_of(clients, operations), ranks)
    work = np.zeros(len(clients), dtype=np.int64)
    late = [timed or c.budget.deadline is not None for c in clients]
    for curve in {c.budget.curve for c, counts in zip(clients, late, strict=True) if counts}:
        on_it = (c.budget.curve == curve for c in clients)
        who = np.array([*on_it]) & late
        some = None if ranks is None else ranks[who]
        work[who] = costs.on(curve).work(operations[who], examples[who], some)
    return costs_from(amounts, work)


def cached_of(clients: Sequence[Participant], operations: np.ndarray) -> np.ndarray | None:
    """Return the subnets whose fixed parameters clients have.

    Args:
        clients: Whose.
        operations: int8 [clients, slots, blocks, heads], for the shape.

    Returns:
        bool [clients, blocks, heads]; None where nobody has anything.
    """
    if all(c.cached is None for c in clients):
        return None
    nothing = np.zeros(operations.shape[2:], dtype=bool)
    return np.stack([nothing if c.cached is None else c.cached for c in clients])
