"""A round's plan: every client's budgets and the scores of subnets in, schedules out.

A subnet chooses in how many of the round's slots it runs FULL (a), FROZEN (z) and FORWARD_ONLY (b),
a + z + b at most the number of slots; which slots those are rotates from subnet to subnet, so that
the work of a slot is even. One slot gives the four operations. Values add up over subnets,

    value(a, z, b) = [ backward a + forward_weight forward (a + z + b)
                       + frozen_weight forward (a + z) ] / slots

what a subnet is worth trained, run, and run without cutting the gradient of what lies below.
``frozen_weight = 0`` is D2FT: then FROZEN is worth no more than FORWARD_ONLY and is not offered.
Below the lowest block that trains there is no gradient to cut: FORWARD_ONLY is worth there what
FROZEN is, at its own price. Which block is the lowest is one *case* of the knapsack for each block.

Costs come from the cost model: once a subnet, whatever the slots, for what it holds and sends;
per slot for FLOPs and activations; openings for blocks (see ``knapsack``). Peak memory is two
resources, the first batch, which finds no optimiser state, and later ones; and it is not additive
(the worst pass, transients): it is priced from below, checked exactly, and what is shown to the
solver shrinks by what was over until the exact cost fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.budgets import UNLIMITED, Budget
from d2ft_fl.costs import (
    ELEMENT,
    MEMORY_MARGIN,
    MESSAGE_HEADER,
    MOMENTS,
    RESOURCES,
    TENSOR_HEADER,
    Cost,
    CostModel,
    scoring_cost,
)
from d2ft_fl.errors import RunError
from d2ft_fl.knapsack import Solution, Spread, Structure, solve, solve_spread
from d2ft_fl.subnets import Kind, Operation, Schedule, effective, slot_sizes

FLOPS, MEMORY, UP, DOWN = range(len(RESOURCES))
LATER = len(RESOURCES)  # the solver's fifth resource: memory of later batches
TIME = LATER + 1  # and its sixth, where clients have deadlines: in ticks
MEMORIES = [MEMORY, LATER]
PLANNERS = ("joint", "two-stage")
COUPLINGS = ("none", "spread", "agenda")
MEMORY_TRIES = 24
CHUNK = 2048  # clients that are solved for at once
TICKS = 2**40  # that a deadline has, long or short: sums stay exact


@dataclass(frozen=True, eq=False)
class Participant:
    """A client as strategies and the planner see it.

    Attributes:
        client: Its number. examples: Its training examples.
        budget: As it reported it.
        capacity: Its budgets resolved, int64 [4] in ``RESOURCES`` order.
    """

    client: int
    examples: int
    budget: Budget
    capacity: np.ndarray


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round, and what that is predicted to cost.

    Attributes:
        client: Its number.
        schedule: Its operations.
        cost: Predicted cost, the scoring pass included.
        score_examples: Examples of the scoring pass it runs before training; 0 for none.
        gap: The schedule's value is within this share of a bound that no schedule of the joint
            problem with these slots exceeds; ``None`` where there is none.
    """

    client: int
    schedule: Schedule
    cost: Cost
    score_examples: int = 0
    gap: float | None = None


@dataclass(frozen=True)
class Patterns:
    """The options of a subnet, and the slots that each means.

    Attributes:
        full, frozen, forward: Slots of each option: int64 [options].
        below: bool [options]: FORWARD_ONLY below the lowest trained block, worth as FROZEN.
        operations: int8 [options, active, slots], by where a subnet's pattern starts.
    """

    full: np.ndarray
    frozen: np.ndarray
    forward: np.ndarray
    below: np.ndarray
    operations: np.ndarray

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, slots: int, active: int, frozen: bool) -> "Patterns":
        """All counts of slots with at most ``active`` slots at work; the first one does nothing."""
        counts = [
            (a, z, b, False)
            for a in range(active + 1)
            for z in range(active + 1 - a if frozen else 1)
            for b in range(active + 1 - a - z)
        ]
        counts += [(0, 0, b, True) for b in range(1, active + 1)] if frozen else []
        operations = np.zeros((len(counts), active, slots), dtype=np.int8)
        for row, (a, z, b, _) in enumerate(counts):
            done = [Operation.FULL] * a + [Operation.FROZEN] * z + [Operation.FORWARD_ONLY] * b
            for shift in range(active):
                operations[row, shift, (np.arange(len(done)) + shift) % active] = done
        a, z, b, below = np.array(counts).T
        return cls(a, z, b, below.astype(bool), operations)

    @property
    def runs(self) -> np.ndarray:
        """Slots in which an option runs at all: int64 [options]."""
        return self.full + self.frozen + self.forward

    @property
    def levels(self) -> np.ndarray:
        """What a block has to be open to: resident, live (where FROZEN is offered), trained."""
        live = 2 * (self.frozen > 0)
        trained = (3 if self.below.any() else 2) * (self.full > 0)
        return np.maximum(np.maximum(live, trained), self.runs > 0).astype(np.int64)


@dataclass(frozen=True)
class Table:
    """What options and openings cost a client with so many examples.

    Attributes:
        items: int64 [subnets, options, 5].
        openings: int64 [blocks, levels, 5].
        constant: int64 [5], for running anything at all.
    """

    items: np.ndarray
    openings: np.ndarray
    constant: np.ndarray

    def timed(self, budget: Budget) -> "Table":
        """The same with a sixth resource: ticks of the deadline, rounded up; none without one."""
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

        return Table(*map(with_time, (self.items, self.openings, self.constant)))


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
    """

    costs: CostModel
    method: str = "joint"
    forward_weight: float = 1.0
    frozen_weight: float = 0.0
    coupling: str = "none"
    spread_clients: float = 2.0
    least_clients: int = 1

    def plan(
        self,
        clients: Sequence[Participant],
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int = 0,
        score_examples: Sequence[int] | None = None,
    ) -> list[Assignment]:
        """Schedules that keep every budget, of clients in order; sitting out when nothing fits.

        Args:
            clients: Who, on how much data, under which budgets.
            backward, forward: Scores, float64 [blocks, heads], or of every client
                [clients, blocks, heads]; mean 1.
            rotation: Shifts which slots a partly scheduled subnet gets, for example the round.
            score_examples: Examples of a scoring pass of each client to run first, where its
                budgets afford it.
        """
        capacity = np.array([c.capacity for c in clients], dtype=np.int64).reshape(-1, 4)
        wanted = np.array(score_examples or [0] * len(clients))
        scoring = np.array([scoring_cost(self.costs, int(n)).vector() for n in wanted])
        scores = (wanted > 0) & (scoring.reshape(-1, 4) <= capacity).all(axis=1)
        planned: dict[int, Assignment] = {}
        if scores.any():  # what has the whole model sent down gets no compensation on top
            who = np.flatnonzero(scores)
            reserved = capacity[who] - scoring[who] * [1, 0, 1, 0]
            reserved[:, DOWN] = UNLIMITED  # everything travels down for scoring
            found = self._plain._plan(clients, who, reserved, backward, forward, rotation, scoring)
            for index, assignment in zip(who.tolist(), found, strict=True):
                if not assignment.schedule.sits_out:
                    planned[index] = replace(
                        assignment,
                        cost=_together(assignment.cost, scoring[index]),
                        score_examples=int(wanted[index]),
                    )
        who = np.array([i for i in range(len(clients)) if i not in planned], dtype=np.int64)
        found = self._plan(clients, who, capacity[who], backward, forward, rotation)
        planned |= dict(zip(who.tolist(), found, strict=True))
        self._hold(clients, [planned[i] for i in range(len(clients))], capacity)
        return [planned[i] for i in range(len(clients))]

    def _plan(
        self,
        clients: Sequence[Participant],
        who: np.ndarray,
        capacity: np.ndarray,
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int,
        scoring: np.ndarray | None = None,
    ) -> list[Assignment]:
        """Try with all slots active, then with fewer, until something can be trained."""
        if not len(who):
            return []
        arch, slots = self.costs.arch, self.costs.slots
        chosen = [clients[i] for i in who]
        operations = np.zeros((len(who), slots, arch.blocks, arch.heads), dtype=np.int8)
        gaps = np.zeros(len(who))
        left = np.arange(len(who))
        deadlines = np.array(
            [_ticks(c.budget, i, scoring) for i, c in zip(who, chosen, strict=True)]
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
                found, gap = solver.operations(capacity[part], deadlines[part])
                better = found.any(axis=(1, 2, 3)) & (
                    ~operations[part].any(axis=(1, 2, 3)) | (found == Operation.FULL).any((1, 2, 3))
                )
                operations[part[better]], gaps[part[better]] = found[better], gap[better]
            # Running forward without training anything changes only the classifier: still a plan.
            left = np.flatnonzero(~(operations == Operation.FULL).any(axis=(1, 2, 3)))
            if not len(left):
                break
        examples = np.array([c.examples for c in chosen], dtype=np.int64)
        if self.costs.compensated:  # the solver charges every block for skipping
            full = np.broadcast_to(self.costs.everything().operations, operations.shape)
            whole = self.costs.costs(full, examples)
            fits = (whole <= capacity).all(axis=1)
            on_time = [_on_time(c, cost) for c, cost in zip(chosen, whole, strict=True)]
            fits = np.logical_and(fits, on_time)
            operations[fits] = Operation.FULL
        costs = self.costs.costs(operations, examples)
        certified = self.method == "joint" and not self.costs.compensated
        return [
            Assignment(
                c.client,
                Schedule(done),
                Cost(*cost.tolist()),
                gap=float(gap) if certified else None,
            )
            for c, done, cost, gap in zip(chosen, operations, costs, gaps, strict=True)
        ]

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
            if c.budget.deadline is not None and c.budget.seconds(a.cost) > c.budget.deadline:
                raise RunError(
                    f"planner bug: client {a.client} would take {c.budget.seconds(a.cost)} s, "
                    f"allowed are {c.budget.deadline} s"
                )

    def table(self, examples: int, active: int, rotation: int) -> Table:
        """What everything costs with so many examples and active slots."""
        key = examples, active, rotation
        if key not in self._tables:
            patterns = self.patterns(active)
            self._tables[key] = _table(self.costs, patterns, examples, active, rotation)
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[tuple[int, int, int], Table]:
        return {}

    @cached_property
    def _plain(self) -> "Planner":
        """The same without compensation."""
        return replace(self, costs=replace(self.costs, compensated=False))

    def patterns(self, active: int) -> Patterns:
        """The options with so many active slots."""
        offers = self.frozen_weight > 0 and self.method == "joint"
        return Patterns.of(self.costs.slots, active, offers)


def _of(scores: np.ndarray, who: np.ndarray) -> np.ndarray:
    """Scores of some clients [clients or 1, subnets]."""
    rows = scores[who] if scores.ndim == 3 else scores[None]
    return rows.reshape(len(rows), -1)


def _together(cost: Cost, scoring: np.ndarray) -> Cost:
    """A round's cost with a scoring pass before it, as of :func:`d2ft_fl.costs.round_cost`."""
    flops, memory, up, down = scoring.tolist()
    return Cost(cost.flops + flops, max(cost.memory, memory), cost.bytes_up + up, down)


def _ticks(budget: Budget, index: int, scoring: np.ndarray | None) -> int:
    """A client's ticks, less those of a scoring pass, and one for the rounding of seconds."""
    if budget.deadline is None:
        return UNLIMITED
    spent = 0.0
    if scoring is not None:
        flops, _, up, down = scoring[index].tolist()
        spent = budget.seconds(Cost(flops, 0, up, down))
    return int(TICKS * max(-1.0, 1 - spent / budget.deadline)) - 1


def _on_time(client: Participant, cost: np.ndarray) -> bool:
    """Whether a client is done with so much before its deadline."""
    deadline = client.budget.deadline
    return deadline is None or client.budget.seconds(Cost(*cost.tolist())) <= deadline


def _shifts(costs: CostModel, active: int, rotation: int) -> np.ndarray:
    """Where each subnet's pattern starts: int64 [subnets]."""
    block, head = np.divmod(np.arange(costs.arch.blocks * costs.arch.heads), costs.arch.heads)
    return (block + head + rotation) % active


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
                planner.table(c.examples, active, rotation).timed(c.budget) for c in self.clients
            ]
            return own, np.arange(len(own))
        distinct, which = np.unique(self.examples, return_inverse=True)
        return [planner.table(int(n), active, rotation) for n in distinct], which

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
        train = self.backward[..., None] * (p.full / slots)
        return train, self.forward[..., None] * (weights / slots)

    def operations(
        self, capacity: np.ndarray, deadlines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Operations that fit exactly, int8 [clients, slots, blocks, heads], and certified gaps."""
        tables, which = self.tables
        constant = np.stack([t.constant for t in tables])[which]
        # The solver's resources: memory twice, without the cost model's own margin.
        shown = np.concatenate([capacity, capacity[:, [MEMORY]]], axis=1)
        if constant.shape[1] > TIME:
            shown = np.concatenate([shown, deadlines[:, None]], axis=1)
        shown[:, MEMORIES] -= -(-shown[:, MEMORIES] // (MEMORY_MARGIN + 1))
        shown -= constant
        solution = self._choose(shown, np.arange(len(which)))
        choice, value = solution.choice.copy(), solution.value.copy()
        operations = self._materialise(choice)
        todo = np.arange(len(which))
        for _ in range(MEMORY_TRIES):
            needs = self.planner.costs.memories(operations[todo], self.examples[todo])
            over = needs - capacity[todo, MEMORY]
            again = (over > 0) & operations[todo].any(axis=(1, 2, 3))
            todo, over = todo[again], over[again]
            if not len(todo):
                break
            used = self._used(choice[todo], which[todo])[:, MEMORIES]
            less = np.maximum(1, over // 2)[:, None]
            shown[np.ix_(todo, MEMORIES)] = np.minimum(shown[np.ix_(todo, MEMORIES)], used) - less
            fresh = self._choose(shown[todo], todo, solution)
            choice[todo], value[todo] = fresh.choice, fresh.value
            operations[todo] = self._materialise(fresh.choice)
        operations[todo] = Operation.SHORTCUT  # nothing was found that fits
        value[todo] = -np.inf
        bound = np.maximum(solution.bound, 0.0)
        idle = ~operations.any(axis=(1, 2, 3))
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = np.where(bound > 0, 1 - value / bound, 0.0)
        return operations, np.where(idle, 0.0, gap.clip(0.0, 1.0))

    def _choose(
        self, shown: np.ndarray, who: np.ndarray, coupled: Solution | None = None
    ) -> Solution:
        """Options of some clients, within what is shown to the solver."""
        tables, which = self.tables
        planner, patterns = self.planner, self.patterns
        costs = np.stack([t.items for t in tables])
        structure, which = self.structure, which[who]
        train, rest = (v[who] if len(v) > 1 else v for v in self.values)
        if planner.method == "two-stage":
            return self._two_stages(train, rest, costs, shown, structure, which)
        if planner.coupling != "spread":
            return solve(train + rest, costs, shown, structure, which, _none(shown, costs), 1)
        share = patterns.full / planner.costs.slots
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
        return solve(train + rest, costs, shown, structure, which, _none(shown, costs), 1)

    def _two_stages(
        self,
        train: np.ndarray,
        rest: np.ndarray,
        costs: np.ndarray,
        shown: np.ndarray,
        structure: Structure,
        which: np.ndarray,
    ) -> Solution:
        """FULL by backward score alone; then FORWARD_ONLY by forward score in what is left."""
        patterns = self.patterns
        only = np.where(patterns.forward == 0, train, -np.inf)
        first = solve(only, costs, shown, structure, which, _none(shown, costs), 1)
        settled = patterns.full[first.choice][..., None] == patterns.full
        rest = np.where(settled, rest, -np.inf)
        return solve(rest, costs, shown, structure, which, first.choice, 1)

    def _used(self, choice: np.ndarray, which: np.ndarray) -> np.ndarray:
        """What the solver counts for choices: int64 [clients, resources]."""
        tables, _ = self.tables
        costs, ladder = np.stack([t.items for t in tables]), self.structure.ladder
        clients, items = choice.shape
        used = costs[which[:, None], np.arange(items), choice].sum(axis=1)
        levels = self.patterns.levels[choice].reshape(clients, ladder.shape[1], -1).max(axis=2)
        return used + ladder[which[:, None], np.arange(ladder.shape[1]), levels].sum(axis=1)

    def _materialise(self, choice: np.ndarray) -> np.ndarray:
        """Operations [clients, slots, blocks, heads] of choices [clients, subnets], as they run."""
        c = self.planner.costs
        shifts = _shifts(c, self.active, self.rotation)
        columns = self.patterns.operations[choice.clip(0), shifts]  # [clients, subnets, slots]
        shape = (len(choice), c.slots, c.arch.blocks, c.arch.heads)
        operations = columns.transpose(0, 2, 1).reshape(shape)
        return effective(operations) if self.patterns.below.any() else operations


def _none(shown: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Everybody does nothing, the first option: int64 [clients, subnets]."""
    return np.zeros((len(shown), costs.shape[1]), dtype=np.int64)


def _table(c: CostModel, p: Patterns, examples: int, active: int, rotation: int) -> Table:
    """Costs of options, of opening blocks to each level, and of running anything at all."""
    arch = c.arch
    first, later = c.batch_extremes(examples)
    # Of each memory: (resource, examples of each slot in its batch, copies of what trains). Without
    # a later batch its memory is still there: the first step makes the optimiser's state.
    running = np.arange(c.slots) < active
    phases = [
        (resource, np.array(slot_sizes(batch, c.slots)) * running, copies)
        for resource, batch, copies in (
            (MEMORY, first, 1),
            (LATER, later, 1 + MOMENTS[c.options.optimizer]),
        )
    ]
    # Passes that a batch is run in: the largest saves no less than their mean.
    parts = [max(1, min(c.options.accumulate, int(sizes.sum()))) for _, sizes, _ in phases]

    totals = np.array(c.slot_totals(examples), dtype=np.int64)
    shifts = _shifts(c, active, rotation)
    head = np.tile(np.arange(arch.heads), arch.blocks)
    flops = c.operation_flops[:, head]  # [operations, subnets]
    does = {op: p.operations == op for op in Operation}  # [options, shifts, slots]
    trained, resident = p.full > 0, p.runs > 0
    sliced = ELEMENT * c.elements.sliced.reshape(-1, 1)
    alive, full = c.saved.alive.sum(axis=0)[head, None], c.saved.full.sum(axis=0)[head, None]

    def count(operation: Operation, sizes: np.ndarray) -> np.ndarray:
        """Examples on which each option of each subnet does this: int64 [subnets, options]."""
        return (does[operation] @ sizes).T[shifts]

    items = np.zeros((len(head), len(p.full), LATER + 1), dtype=np.int64)
    for operation in (Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL):
        items[..., FLOPS] += count(operation, totals) * flops[operation][:, None]
    items[..., UP], items[..., DOWN] = sliced * trained, sliced * resident
    openings = np.zeros((arch.blocks, 3, LATER + 1), dtype=np.int64)  # resident, live, trained
    shared = ELEMENT * c.elements.shared
    openings[:, 0, DOWN] = openings[:, 2, UP] = shared + TENSOR_HEADER * c.block_tensors
    final = c.arch.of_kind(Kind.FINAL)
    outer = final + c.arch.of_kind(Kind.EMBEDDING)
    constant = np.zeros(LATER + 1, dtype=np.int64)
    constant[FLOPS] = c.base_flops * int(totals[:active].sum())
    constant[UP] = ELEMENT * c.elements.final + TENSOR_HEADER * len(final) + MESSAGE_HEADER
    constant[DOWN] = ELEMENT * (c.elements.embedding + c.elements.final)
    constant[DOWN] += TENSOR_HEADER * len(outer) + MESSAGE_HEADER
    constant[DOWN] += 2 * c.slots * arch.blocks * arch.heads
    for (resource, sizes, copies), passes in zip(phases, parts, strict=True):
        total, least = int(sizes.sum()), int(sizes[active - 1])
        n_full = count(Operation.FULL, sizes)
        kept = alive * (n_full + count(Operation.FROZEN, sizes)) + full * n_full
        kept = 0 if c.options.checkpointing else kept // passes
        items[..., resource] = sliced * (resident + copies * trained) + kept
        live, trains = 2 * c.saved.stream * total, 0  # x of both branches, of all examples
        if not c.options.checkpointing:
            live += 2 * c.saved.statistics * least
            trains = 2 * c.saved.narrow * least
        openings[:, 0, resource] = shared
        openings[:, 1, resource] = live // passes
        openings[:, 2, resource] = copies * shared + trains // passes
        held = ELEMENT * (c.elements.embedding + (1 + copies) * c.elements.final)
        images = ELEMENT * total * arch.input_elements
        constant[resource] = held + images + total * c.saved.outer // passes
    if c.calibrating:
        widths = np.array(arch.widths).sum(axis=0)[head][:, None]
        means = ELEMENT * arch.tokens * widths * resident
        for resource in (UP, *MEMORIES):
            items[..., resource] += means
        openings[:, 0, UP] += 2 * TENSOR_HEADER
    if c.compensated:  # at most; a block that skips nothing needs none of it
        skips = ELEMENT * arch.blocks * active * 2 * arch.tokens * arch.dim
        constant[DOWN] += skips + TENSOR_HEADER * arch.blocks
        constant[MEMORIES] += skips
    if not p.below.any():  # nothing is live without being trained
        openings = np.stack([openings[:, 0], openings[:, 1] + openings[:, 2]], axis=1)
    return Table(items, openings, constant)
