"""A round's plan: every client's budgets and the scores of subnets in, schedules out.

A subnet chooses in how many of the round's slots it runs FULL (a), FROZEN (z) and FORWARD_ONLY (b),
a + z + b at most the number of slots; which slots those are rotates from subnet to subnet, so that
the work of a slot is even. One slot gives the four operations. Values add up over subnets,

    value(a, z, b) = [ backward a + forward_weight forward (a + z + b)
                       + frozen_weight forward (a + z) ] / slots

Under LoRA a subnet also chooses among the ranks r that are offered, R the largest: training is then
worth ``backward a (r / R) ** rank_exponent``. That is a choice, not a measurement: with an exponent
of 0 all ranks are worth the same, with 1 in proportion.

That is what a subnet is worth trained, run, and run without cutting the gradient of what lies
below. ``frozen_weight = 0`` is D2FT: then FROZEN is worth no more than FORWARD_ONLY and is not
offered. Below the lowest block that trains there is no gradient to cut: FORWARD_ONLY is worth there
what FROZEN is, at its own price. Which block is the lowest is one *case* of the knapsack for each
block.

What options cost is in :mod:`d2ft_fl.planning.cost_tables`: peak memory from below; under LoRA
FLOPs and memory in excess, by a known amount at most, which the solver is shown on top of the
budget. Either way exact costs are checked, and what is shown shrinks by what was over until they
fit.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes, probes_cost, with_probes
from d2ft_fl.costs.resources import MEMORY_MARGIN, RESOURCES, Cost
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.cost_tables import (
    DOWN,
    FLOPS,
    MEMORIES,
    MEMORY,
    TICKS,
    TIME,
    Patterns,
    Table,
    shifts_of,
    table_of,
)
from d2ft_fl.planning.knapsack import (
    Solution,
    Spread,
    Structure,
    solve,
    solve_spread,
    solve_two_stages,
    used,
)
from d2ft_fl.subnets.schedule import Operation, Schedule, effective

TRIES = 24  # of shrinking what is shown to the solver
OPTIMISTIC_TRIES = 6  # of them with more FLOPs than the budget has
CHUNK = 128  # clients that are solved for at once: more take memory, and not less time
TABLES = 1024  # kept, of those that clients differ in


@dataclass(frozen=True)
class Planner:
    """Plans rounds under one cost model.

    Attributes:
        costs: The cost model.
        method: ``two-stage`` as D2FT does it, FULL by backward score first, then FORWARD_ONLY by
            forward score in what is left; or ``joint``, which weighs all operations against each
            other.
        forward_weight: What running a subnet is worth beside training it, at equal scores.
        frozen_weight: What leaving the gradient uncut is worth besides; 0 does without FROZEN.
        coupling: ``spread`` gives diminishing returns over clients; else each has its own optimum.
        spread_clients: With ``spread``, at how many clients one more is worth half of the first.
        least_clients: With ``spread``, how many should train every subnet.
        ranks: Of LoRA, offered besides the architecture's, which is the largest.
        rank_exponent: How the worth of training grows with the rank.
    """

    costs: CostModel
    method: str = "joint"
    forward_weight: float = 1.0
    frozen_weight: float = 0.0
    coupling: str = "none"
    spread_clients: float = 2.0
    least_clients: int = 1
    ranks: tuple[int, ...] = ()
    rank_exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.several_ranks and self.method == "two-stage":
            raise ConfigError("planner = 'two-stage' knows one rank: leave lora-ranks empty")

    @property
    def several_ranks(self) -> bool:
        """Whether subnets have ranks of their own."""
        return len(self.offered) > 1

    @cached_property
    def offered(self) -> tuple[int, ...]:
        """The ranks to choose from, ascending; 0 alone without LoRA."""
        most = self.costs.arch.rank
        return tuple(sorted({r for r in self.ranks if 0 < r < most} | {most}))

    def plan(
        self,
        clients: Sequence[Participant],
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int = 0,
        probes: Sequence[Probes] | None = None,
    ) -> list[Assignment]:
        """Schedules that keep every budget, of clients in order; sitting out when nothing fits.

        Args:
            clients: Who, on how much data, under which budgets.
            backward, forward: Scores, float64 [blocks, heads], or of every client
                [clients, blocks, heads]; mean 1.
            rotation: Shifts which slots a partly scheduled subnet gets, for example the round.
            passes: Of each client over the whole model, to run first where its budgets afford them:
                both, else selecting alone, else none.
        """
        capacity = np.array([c.capacity for c in clients], dtype=np.int64).reshape(-1, 4)
        wanted = list(probes or [NO_PROBES] * len(clients))
        planned: dict[int, Assignment] = {}
        selecting = [Probes(viewed=w.viewed) for w in wanted]
        for first in (wanted, selecting) if selecting != wanted else (wanted,):
            planned |= self._plan_after(first, clients, planned, backward, forward, rotation)
        who = np.array([i for i in range(len(clients)) if i not in planned], dtype=np.int64)
        found = self._plan(clients, who, capacity[who], backward, forward, rotation)
        planned |= dict(zip(who.tolist(), found, strict=True))
        self._hold(clients, [planned[i] for i in range(len(clients))], capacity)
        return [planned[i] for i in range(len(clients))]

    def _plan_after(
        self,
        probes: Sequence[Probes],
        clients: Sequence[Participant],
        planned: Container[int],
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int,
    ) -> dict[int, Assignment]:
        """Plans of clients that afford their passes, and something to train after them."""
        before = {
            index: probes_cost(self.costs, own, c.cached)
            for index, (c, own) in enumerate(zip(clients, probes, strict=True))
            if own and index not in planned
        }
        able = {i: cost for i, cost in before.items() if clients[i].affords(cost)}
        if not able:
            return {}
        who = np.array(list(able))
        spent = np.array([cost.vector() for cost in able.values()])
        reserved = np.array([clients[i].capacity for i in who]) - spent * [1, 0, 1, 0]
        reserved[:, DOWN] = UNLIMITED  # everything travels down already
        # What has the whole model sent down gets no compensation on top.
        found = self._plain._plan(clients, who, reserved, backward, forward, rotation, able)
        return {
            index: replace(a, cost=with_probes(a.cost, able[index]), probes=probes[index])
            for index, a in zip(able, found, strict=True)
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
        before: Mapping[int, Cost] | None = None,
    ) -> list[Assignment]:
        """Try with all slots active, then with fewer, until something can be trained."""
        if not len(who):
            return []
        arch, slots = self.costs.arch, self.costs.slots
        chosen = [clients[i] for i in who]
        operations = np.zeros((len(who), slots, arch.blocks, arch.heads), dtype=np.int8)
        ranks = np.zeros((len(who), arch.blocks, arch.heads), dtype=np.int64)
        gaps = np.zeros(len(who))
        left = np.arange(len(who))
        deadlines = np.array(
            [_ticks(c.budget, (before or {}).get(int(i))) for i, c in zip(who, chosen, strict=True)]
        )
        for active in range(slots, 0, -1):
            step = CHUNK if self.coupling != "spread" else max(1, len(left))
            for start in range(0, len(left), step):
                part = left[start : start + step]
                solver = _Chunk(
                    self,
                    [chosen[i] for i in part],
                    active,
                    rotation,
                    _of(backward, who[part]),
                    _of(forward, who[part]),
                )
                found, own, gap = solver.operations(capacity[part], deadlines[part])
                better = found.any(axis=(1, 2, 3)) & (
                    ~operations[part].any(axis=(1, 2, 3)) | (found == Operation.FULL).any((1, 2, 3))
                )
                operations[part[better]], gaps[part[better]] = found[better], gap[better]
                ranks[part[better]] = own[better]
            # Running forward without training anything changes only the classifier: still a plan.
            left = np.flatnonzero(~(operations == Operation.FULL).any(axis=(1, 2, 3)))
            if not len(left):
                break
        examples = np.array([c.examples for c in chosen], dtype=np.int64)
        if self.costs.compensated:  # the solver charges every block for skipping
            full = np.broadcast_to(self.costs.everything().operations, operations.shape)
            most = np.full_like(ranks, arch.rank)
            whole = self.costs.costs(full, examples, _holds(chosen, operations), self._ranks(most))
            on_time = [c.on_time(Cost(*w.tolist())) for c, w in zip(chosen, whole, strict=True)]
            fits = (whole <= capacity).all(axis=1)
            operations[np.logical_and(fits, on_time)] = Operation.FULL
            ranks[np.logical_and(fits, on_time)] = arch.rank
        costs = self.costs.costs(
            operations, examples, _holds(chosen, operations), self._ranks(ranks)
        )
        certified = examples >= slots
        if self.method != "joint" or self.costs.compensated:
            certified[:] = False
        if slots > 1 and self.frozen_weight:  # what is FROZEN below all of its slot has no price
            certified[:] = False
        return [
            Assignment(
                c.client,
                Schedule(done, self._ranks(own)),
                Cost(*cost.tolist()),
                gap=float(gap) if sure and done.any() else None,
            )
            for c, done, own, cost, gap, sure in zip(
                chosen, operations, ranks, costs, gaps, certified, strict=True
            )
        ]

    def _ranks(self, ranks: np.ndarray) -> np.ndarray | None:
        """What schedules say of ranks: nothing where there is one alone."""
        return ranks if self.several_ranks else None

    @staticmethod
    def _hold(
        clients: Sequence[Participant], planned: list[Assignment], capacity: np.ndarray
    ) -> None:
        """A plan that breaks a budget is a bug, never sent."""
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

    def table(
        self, examples: int, active: int, rotation: int, cached: np.ndarray | None = None
    ) -> Table:
        """What everything costs with so many examples and active slots."""
        key = examples, active, rotation, b"" if cached is None else cached.tobytes()
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                self._tables.clear()
            patterns = self.patterns(active)
            self._tables[key] = table_of(self.costs, patterns, examples, active, rotation, cached)
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[tuple[int, int, int, bytes], Table]:
        return {}

    @cached_property
    def _plain(self) -> "Planner":
        """The same without compensation."""
        return replace(self, costs=replace(self.costs, compensated=False))

    def patterns(self, active: int) -> Patterns:
        """The options with so many active slots."""
        offers = self.frozen_weight > 0 and self.method == "joint"
        return Patterns.of(self.costs.slots, active, offers, self.offered)

    def rank_share(self, schedule: Schedule) -> np.ndarray:
        """How far training at its rank counts, of each subnet: float64 [blocks, heads]."""
        most = self.offered[-1]
        if schedule.ranks is None or not most:
            return np.ones(schedule.operations.shape[1:])
        return (schedule.ranks / most) ** self.rank_exponent

    def rank_utility(self, patterns: Patterns) -> np.ndarray:
        """What training is worth at the ranks of options, as a share: float64 [options]."""
        most = self.offered[-1]
        return (patterns.rank / most) ** self.rank_exponent if most else np.ones(len(patterns.full))


def _of(scores: np.ndarray, who: np.ndarray) -> np.ndarray:
    """Scores of some clients [clients or 1, subnets]."""
    rows = scores[who] if scores.ndim == 3 else scores[None]
    return rows.reshape(len(rows), -1)


def _ticks(budget: Budget, before: Cost | None) -> int:
    """A client's ticks, less those of passes before, and one for the rounding of seconds."""
    if budget.deadline is None:
        return UNLIMITED
    spent = budget.seconds(before) if before else 0.0
    return int(TICKS * max(-1.0, 1 - spent / budget.deadline)) - 1


def _holds(clients: Sequence[Participant], operations: np.ndarray) -> np.ndarray | None:
    """What clients have: bool [clients, blocks, heads]; None where nobody has anything."""
    if all(c.cached is None for c in clients):
        return None
    nothing = np.zeros(operations.shape[2:], dtype=bool)
    return np.stack([nothing if c.cached is None else c.cached for c in clients])


@dataclass(frozen=True)
class _Chunk:
    """The knapsacks of some clients with a given number of active slots."""

    planner: Planner
    clients: list[Participant]
    active: int
    rotation: int
    backward: np.ndarray
    forward: np.ndarray

    @cached_property
    def patterns(self) -> Patterns:
        return self.planner.patterns(self.active)

    @cached_property
    def examples(self) -> np.ndarray:
        return np.array([c.examples for c in self.clients], dtype=np.int64)

    @cached_property
    def tables(self) -> tuple[list[Table], np.ndarray]:
        """Distinct tables, and which is each client's. With deadlines each client has its own."""
        planner, active, rotation = self.planner, self.active, self.rotation % self.active
        if any(c.budget.deadline is not None for c in self.clients):
            own = [
                planner.table(c.examples, active, rotation, c.cached).timed(c.budget)
                for c in self.clients
            ]
            return own, np.arange(len(own))
        tables = [planner.table(c.examples, active, rotation, c.cached) for c in self.clients]
        distinct = {id(table): table for table in tables}  # clients share objects
        places = {key: place for place, key in enumerate(distinct)}
        return list(distinct.values()), np.array([places[id(table)] for table in tables])

    @cached_property
    def items(self) -> np.ndarray:
        """What options cost: int64 [tables, subnets, options, resources]."""
        return np.stack([t.items for t in self.tables[0]])

    @cached_property
    def structure(self) -> Structure:
        arch, patterns = self.planner.costs.arch, self.patterns
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
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """What training is worth, and the rest: float64 [clients or 1, subnets, options] each."""
        p, slots = self.patterns, self.planner.costs.slots
        uncut = p.full + p.frozen + p.below * p.forward
        weights = self.planner.forward_weight * p.runs + self.planner.frozen_weight * uncut
        train = self.backward[..., None] * self.share
        return train, self.forward[..., None] * (weights / slots)

    @cached_property
    def share(self) -> np.ndarray:
        """How far options train, rank and all: float64 [options]."""
        utility = self.planner.rank_utility(self.patterns)
        return self.patterns.full / self.planner.costs.slots * utility

    def operations(
        self, capacity: np.ndarray, deadlines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What fits exactly, as of :meth:`_materialise`, and certified gaps."""
        tables, which = self.tables
        constant = np.stack([t.constant for t in tables])[which]
        # The solver's resources: memory twice, without the cost model's own margin.
        shown = np.concatenate([capacity, capacity[:, [MEMORY]]], axis=1)
        if constant.shape[1] > TIME:
            shown = np.concatenate([shown, deadlines[:, None]], axis=1)
        shown[:, MEMORIES] -= shown[:, MEMORIES] // (MEMORY_MARGIN + 1)
        shown -= constant
        at_most = shown.copy()
        shown += np.stack([t.excess for t in tables])[which]
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
            less = np.where(np.isin(np.arange(over.shape[1]), MEMORIES), over // 2, over)
            lower = np.minimum(shown[todo], spent) - np.maximum(1, less)
            shown[todo] = np.where(over > 0, lower, shown[todo])
            if tried >= OPTIMISTIC_TRIES:
                shown[todo] = np.minimum(shown[todo], at_most[todo])
            fresh = self._choose(shown[todo], todo, solution)
            choice[todo], value[todo] = fresh.choice, fresh.value
            operations[todo], ranks[todo] = self._materialise(fresh.choice)
        operations[todo] = Operation.SHORTCUT  # nothing was found that fits
        value[todo] = -np.inf
        bound = np.maximum(solution.bound, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = np.where(bound > 0, 1 - value / bound, 0.0)
        return operations, ranks, gap.clip(0.0, 1.0)

    def _over(
        self,
        operations: np.ndarray,
        ranks: np.ndarray,
        who: np.ndarray,
        capacity: np.ndarray,
        deadlines: np.ndarray,
    ) -> np.ndarray:
        """By how much plans of some clients break budgets: int64 [who, the solver's resources].

        Of resources that the solver's prices do not settle; the rest is 0.
        """
        costs, examples, own = self.planner.costs, self.examples[who], self.planner._ranks(ranks)
        over = np.zeros((len(who), self.items.shape[-1]), dtype=np.int64)
        if not any(t.excess.any() for t in self.tables[0]):
            memory = costs.memories(operations, examples, own)
            over[:, MEMORIES] = (memory - capacity[who, MEMORY])[:, None]
            return over
        clients = [self.clients[i] for i in who]
        exact = costs.costs(operations, examples, _holds(clients, operations), own)
        over[:, FLOPS] = exact[:, FLOPS] - capacity[who, FLOPS]
        over[:, MEMORIES] = exact[:, [MEMORY]] - capacity[who, MEMORY][:, None]
        if over.shape[1] > TIME:
            for row, (client, cost, ticks) in enumerate(
                zip(clients, exact, deadlines[who], strict=True)
            ):
                if client.budget.deadline is not None:
                    seconds = client.budget.seconds(Cost(*cost.tolist()))
                    share = min(2.0, seconds / client.budget.deadline)
                    over[row, TIME] = math.ceil(TICKS * share) - ticks
        return over

    def _choose(
        self, shown: np.ndarray, who: np.ndarray, coupled: Solution | None = None
    ) -> Solution:
        """Options of some clients, within what is shown to the solver."""
        planner, patterns, share = self.planner, self.patterns, self.share
        costs, structure, which = self.items, self.structure, self.tables[1][who]
        train, rest = (v[who] if len(v) > 1 else v for v in self.values)
        if planner.method == "two-stage":
            only = patterns.forward == 0
            return solve_two_stages(train, rest, share, only, costs, shown, structure, which)
        if planner.coupling != "spread":
            return solve(train + rest, costs, shown, structure, which, effort=1)
        weight = self.examples[who] / self.examples.mean()
        if coupled is None:
            spread = Spread(
                self.backward.mean(axis=0),
                share,
                weight,
                planner.spread_clients,
                planner.least_clients,
            )
            return solve_spread(rest, costs, shown, spread, structure, which)
        marginal = self.backward.mean(axis=0) * coupled.marginal  # type: ignore[attr-defined]
        train = marginal[None, :, None] * share * weight[:, None, None]
        # Who is needed for a subnet stays with it, if anything allows that.
        trained = share[coupled.choice.clip(0)] > 0  # [clients, subnets]
        needed = trained[who] & (trained.sum(axis=0) <= planner.least_clients)
        train = train + self.backward.max() * needed[..., None] * (share > 0)
        return solve(train + rest, costs, shown, structure, which, effort=1)

    def _materialise(self, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choices [clients, subnets] as they run.

        Returns:
            Operations, int8 [clients, slots, blocks, heads], and the ranks of those that train,
            int64 [clients, blocks, heads].
        """
        c = self.planner.costs
        shifts = shifts_of(c, self.active, self.rotation)
        columns = self.patterns.operations[choice.clip(0), shifts]  # [clients, subnets, slots]
        shape = (len(choice), c.slots, c.arch.blocks, c.arch.heads)
        operations = columns.transpose(0, 2, 1).reshape(shape)
        ranks = self.patterns.rank[choice.clip(0)].reshape(len(choice), *shape[2:])
        return (effective(operations) if self.patterns.below.any() else operations), ranks
