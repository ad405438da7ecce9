"""One client's plan: its budget and the scores of subnets in, its schedule out.

A subnet chooses in how many of the round's slots it runs FULL (a) and FORWARD_ONLY (b), a + b at
most the number of slots; which slots those are rotates from subnet to subnet, so that the work of
a slot is even. One slot gives D2FT's three operations. Values add up over subnets,

    value(a, b) = backward * a / slots + forward_weight * forward * (a + b) / slots

costs come from the cost model, a block's openings included (see ``knapsack``). Peak memory is two
resources, the first batch, which finds no optimiser state, and later ones; and it is not
additive (worst slot, copies, transients): it is priced from below, checked exactly, and what is
shown to the solver shrinks by what was over until the exact cost fits.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.costs import (
    ELEMENT,
    MEMORY_MARGIN,
    MESSAGE_HEADER,
    MOMENTS,
    RESOURCES,
    TENSOR_HEADER,
    Cost,
    CostModel,
    round_cost,
    scoring_cost,
)
from d2ft_fl.errors import RunError
from d2ft_fl.knapsack import Problem, Solution, solve
from d2ft_fl.subnets import Kind, Operation, Schedule, slot_sizes

FLOPS, MEMORY, UP, DOWN = range(len(RESOURCES))
LATER = len(RESOURCES)  # the solver's fifth resource: memory of later batches
PLANNERS = ("joint", "two-stage")
RESIDENT, TRAINED = 1, 2  # levels a block is opened to
MEMORY_TRIES = 24
MEMORIES = [MEMORY, LATER]


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round, and what that is predicted to cost.

    Attributes:
        client: Its number.
        schedule: Its operations.
        cost: Predicted cost, the scoring pass included.
        score_examples: Examples of the Fisher pass it runs before training; 0 for none.
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
        full, forward: Slots FULL and FORWARD_ONLY of each option: int64 [options].
        operations: int8 [options, slots]; a subnet rolls its own along the active slots.
    """

    full: np.ndarray
    forward: np.ndarray
    operations: np.ndarray

    @classmethod
    def of(cls, slots: int, active: int) -> "Patterns":
        """All pairs of slot counts with at most ``active`` slots at work."""
        pairs = [(a, b) for a in range(active + 1) for b in range(active + 1 - a)]
        operations = np.zeros((len(pairs), slots), dtype=np.int8)
        for row, (a, b) in enumerate(pairs):
            operations[row, :a] = Operation.FULL
            operations[row, a : a + b] = Operation.FORWARD_ONLY
        full, forward = np.array(pairs).T
        return cls(full, forward, operations)

    def rolled(self, option: int, shift: int, active: int) -> np.ndarray:
        """Operations of a subnet that starts at slot ``shift``: int8 [slots]."""
        out = self.operations[option].copy()
        out[:active] = np.roll(out[:active], shift % active)
        return out


@dataclass(frozen=True)
class Planner:
    """Plans single clients under one cost model.

    Attributes:
        costs: The cost model.
        method: ``two-stage`` as D2FT does it, FULL by backward score first, then FORWARD_ONLY by
            forward score in what is left; or ``joint``, which starts from there and weighs all
            operations against each other.
        forward_weight: What running a subnet is worth beside training it, at equal scores.
    """

    costs: CostModel
    method: str = "joint"
    forward_weight: float = 1.0

    def plan(
        self,
        client: int,
        examples: int,
        capacity: np.ndarray,
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int = 0,
        score_examples: int = 0,
    ) -> Assignment:
        """The best schedule found that keeps every budget; sitting out when nothing fits.

        Args:
            client, examples: Who, and on how much data.
            capacity: Its budgets, int64 [4] in ``RESOURCES`` order.
            backward, forward: Scores, float64 [blocks, heads], mean 1.
            rotation: Shifts which slots a partly scheduled subnet gets, for example the round.
            score_examples: Examples of a Fisher pass to run first, where the budget affords it.
        """
        scoring = scoring_cost(self.costs, score_examples)
        if score_examples and (scoring.vector() <= capacity).all():
            # What has the whole model sent down gets no compensation on top.
            plain = replace(self, costs=replace(self.costs, compensated=False))
            reserved = capacity - np.array([scoring.flops, 0, scoring.bytes_up, 0])
            reserved[DOWN] = np.iinfo(np.int64).max // 4  # everything travels down for scoring
            planned = plain._solve(client, examples, reserved, backward, forward, rotation)
            if not planned.schedule.sits_out:
                return self._with_scoring(planned, examples, capacity, score_examples)
        return self._solve(client, examples, capacity, backward, forward, rotation)

    def _with_scoring(
        self, planned: Assignment, examples: int, capacity: np.ndarray, score_examples: int
    ) -> Assignment:
        cost = round_cost(self.costs, planned.schedule, examples, score_examples)
        _hold(cost, capacity, planned.client)
        return Assignment(planned.client, planned.schedule, cost, score_examples, planned.gap)

    def _solve(
        self,
        client: int,
        examples: int,
        capacity: np.ndarray,
        backward: np.ndarray,
        forward: np.ndarray,
        rotation: int,
    ) -> Assignment:
        """Try with all slots active, then with fewer, until something can be trained."""
        slots, arch = self.costs.slots, self.costs.arch
        best: Assignment | None = None
        if self.costs.compensated:  # the solver charges every block for skipping something
            all_full = self.costs.everything()
            cost = self.costs.cost(all_full, examples)
            if (cost.vector() <= capacity).all():
                return Assignment(client, all_full, cost, gap=0.0)
        for active in range(slots, 0, -1):
            candidate = _ClientProblem(self, examples, active, rotation, backward, forward)
            schedule, gap = candidate.schedule(capacity)
            cost = self.costs.cost(schedule, examples)
            _hold(cost, capacity, client)
            planned = Assignment(
                client, schedule, cost, gap=None if self.costs.compensated else gap
            )
            if schedule.trained.any():
                return planned
            if best is None and not schedule.sits_out:
                best = planned
        # Running forward without training anything changes only the classifier: still a plan.
        nothing = Schedule.filled(Operation.SHORTCUT, slots, arch.blocks, arch.heads)
        return best or Assignment(client, nothing, Cost(), gap=0.0)


def _hold(cost: Cost, capacity: np.ndarray, client: int) -> None:
    """A plan that breaks a budget is a bug, never sent."""
    over = cost.vector() > capacity
    if over.any():
        raise RunError(
            f"planner bug: client {client} would use {cost.vector()[over].tolist()} of "
            f"{[r for r, o in zip(RESOURCES, over, strict=True) if o]}, allowed are "
            f"{capacity[over].tolist()}"
        )


@dataclass(frozen=True)
class _ClientProblem:
    """The knapsack of one client with a given number of active slots."""

    planner: Planner
    examples: int
    active: int
    rotation: int
    backward: np.ndarray
    forward: np.ndarray

    @cached_property
    def patterns(self) -> Patterns:
        return Patterns.of(self.planner.costs.slots, self.active)

    @cached_property
    def shifts(self) -> np.ndarray:
        """Where each subnet's pattern starts: int64 [subnets]."""
        arch = self.planner.costs.arch
        block, head = np.divmod(np.arange(arch.blocks * arch.heads), arch.heads)
        return (block + head + self.rotation) % self.active

    def schedule(self, capacity: np.ndarray) -> tuple[Schedule, float | None]:
        """The schedule that fits ``capacity`` exactly, and its certified gap."""
        shown = np.append(capacity, capacity[MEMORY])
        shown[MEMORIES] -= -(-shown[MEMORIES] // (MEMORY_MARGIN + 1))  # the model's own margin
        shown -= self._constant
        bound = None
        for _ in range(MEMORY_TRIES):
            solution = self._choose(shown)
            bound = solution.bound if bound is None else bound  # of the problem priced from below
            schedule = self._materialise(solution.choice)
            over = self.planner.costs.memory(schedule, self.examples) - int(capacity[MEMORY])
            if over <= 0 or schedule.sits_out:
                joint = self.planner.method == "joint" and bound > 0
                return schedule, max(0.0, 1 - solution.value / bound) if joint else None
            shown[MEMORIES] = self._used(solution.choice)[MEMORIES].clip(max=shown[MEMORIES])
            shown[MEMORIES] -= max(1, over // 2)
        return self._materialise(np.zeros_like(self.shifts)), None

    def _used(self, choice: np.ndarray) -> np.ndarray:
        """What the solver counts for a choice: int64 [5]."""
        values = np.zeros((len(choice), len(self.patterns.full)))
        return self._problem(values, self._constant, values == 0).used(choice)

    def _choose(self, shown: np.ndarray) -> Solution:
        slots, patterns = self.planner.costs.slots, self.patterns
        runs = (patterns.full + patterns.forward) / slots  # [options]
        weight = self.planner.forward_weight
        train = self.backward.reshape(-1, 1) * patterns.full / slots  # [subnets, options]
        run = self.forward.reshape(-1, 1) * runs
        every = np.ones(train.shape, dtype=bool)
        first = solve(self._problem(train, shown, every & (patterns.forward == 0)))
        chosen = patterns.full[first.choice]
        same = patterns.full[None] == chosen[:, None]  # FULL is settled; FORWARD_ONLY is not
        second = solve(replace(self._problem(run, shown, same), default=first.choice))
        if self.planner.method == "two-stage":
            return second
        return solve(self._problem(train + weight * run, shown, every), start=second.choice)

    def _problem(self, values: np.ndarray, shown: np.ndarray, allowed: np.ndarray) -> Problem:
        levels = np.where(
            self.patterns.full > 0, TRAINED, np.where(self.patterns.forward > 0, RESIDENT, 0)
        )
        arch = self.planner.costs.arch
        groups = np.repeat(np.arange(arch.blocks), arch.heads)
        default = np.zeros(len(groups), dtype=np.int64)
        return Problem(values, self._costs, shown, groups, levels, self._openings, allowed, default)

    @cached_property
    def _phases(self) -> list[tuple[int, np.ndarray, int]]:
        """The two memories: (resource, examples of each slot in its batch, copies of what trains).

        Copies are what is held of a trained tensor beside its value. Without a later batch its
        memory is still there: the first step makes the optimiser's state.
        """
        costs = self.planner.costs
        first, later = costs.batch_extremes(self.examples)
        running = np.arange(costs.slots) < self.active
        return [
            (resource, np.array(slot_sizes(batch, costs.slots)) * running, copies)
            for resource, batch, copies in (
                (MEMORY, first, 1),
                (LATER, later, 1 + MOMENTS[costs.options.optimizer]),
            )
        ]

    def _parts(self, sizes: np.ndarray) -> int:
        """Passes that a batch is run in: its largest saves no less than their mean."""
        return max(1, min(self.planner.costs.options.accumulate, int(sizes.sum())))

    @cached_property
    def _costs(self) -> np.ndarray:
        """Cost of each option of each subnet: int64 [subnets, options, resources]."""
        c, patterns = self.planner.costs, self.patterns
        arch = c.arch
        totals = np.array(c.slot_totals(self.examples), dtype=np.int64)
        rolled = np.stack(
            [
                np.stack([patterns.rolled(k, int(s), self.active) for s in range(self.active)])
                for k in range(len(patterns.full))
            ]
        )  # [options, shifts, slots]
        runs_full = rolled == Operation.FULL
        head = np.tile(np.arange(arch.heads), arch.blocks)
        flops = c.operation_flops[:, head][..., None]  # [operations, subnets, 1]
        full = (runs_full @ totals)[:, self.shifts].T  # [subnets, options]
        forward = ((rolled == Operation.FORWARD_ONLY) @ totals)[:, self.shifts].T
        out = np.zeros((*full.shape, LATER + 1), dtype=np.int64)
        out[..., FLOPS] = full * flops[Operation.FULL] + forward * flops[Operation.FORWARD_ONLY]
        sliced = ELEMENT * c.elements.sliced.reshape(-1, 1)
        trained, resident = patterns.full > 0, patterns.full + patterns.forward > 0
        saved = (c.saved.alive + c.saved.full).sum(axis=0)[head][:, None]
        for resource, sizes, copies in self._phases:
            held = sliced * (resident + copies * trained)
            examples = (runs_full @ sizes)[:, self.shifts].T
            kept = 0 if c.options.checkpointing else saved * examples // self._parts(sizes)
            out[..., resource] = held + kept
        out[..., UP] = sliced * trained
        out[..., DOWN] = sliced * resident
        if c.calibrating:
            widths = np.array(arch.widths).sum(axis=0)[head][:, None]
            means = ELEMENT * arch.tokens * widths * resident
            for resource in (UP, *MEMORIES):
                out[..., resource] += means
        return out

    @cached_property
    def _openings(self) -> np.ndarray:
        """Cost of opening each block to RESIDENT, then TRAINED: int64 [blocks, 2, resources]."""
        c = self.planner.costs
        shared = ELEMENT * c.elements.shared
        headers = TENSOR_HEADER * np.array(
            [sum(p.block == b for p in c.arch.parameters) for b in range(c.arch.blocks)]
        )
        out = np.zeros((c.arch.blocks, 2, LATER + 1), dtype=np.int64)
        out[:, 0, DOWN] = out[:, 1, UP] = shared + headers
        out[:, 0, UP] = 2 * TENSOR_HEADER * c.calibrating
        for resource, sizes, copies in self._phases:
            out[:, 0, resource] = shared
            saved = 2 * c.saved.stream * int(sizes.sum())  # x of both branches, of all examples
            if not c.options.checkpointing:
                saved += 2 * (c.saved.statistics + c.saved.narrow) * int(sizes[self.active - 1])
            out[:, 1, resource] = copies * shared + saved // self._parts(sizes)
        return out

    @cached_property
    def _constant(self) -> np.ndarray:
        """Cost of running anything at all: int64 [resources]."""
        c = self.planner.costs
        e, final = c.elements, c.arch.of_kind(Kind.FINAL)
        outer = final + c.arch.of_kind(Kind.EMBEDDING)
        out = np.zeros(LATER + 1, dtype=np.int64)
        out[FLOPS] = c.base_flops * sum(c.slot_totals(self.examples)[: self.active])
        out[UP] = ELEMENT * e.final + TENSOR_HEADER * len(final) + MESSAGE_HEADER
        out[DOWN] = ELEMENT * (e.embedding + e.final) + TENSOR_HEADER * len(outer)
        out[DOWN] += MESSAGE_HEADER + 2 * c.slots * c.arch.blocks * c.arch.heads
        for resource, sizes, copies in self._phases:
            examples = int(sizes.sum())
            held = ELEMENT * (e.embedding + (1 + copies) * e.final)
            images = ELEMENT * examples * c.arch.input_elements
            out[resource] = held + images + examples * c.saved.outer // self._parts(sizes)
        if c.compensated:  # at most; a block that skips nothing needs none of it
            sets = c.arch.blocks * self.active
            skips = ELEMENT * sets * 2 * c.arch.tokens * c.arch.dim
            out[DOWN] += skips + TENSOR_HEADER * c.arch.blocks
            out[MEMORIES] += skips
        return out

    def _materialise(self, choice: np.ndarray) -> Schedule:
        c = self.planner.costs
        columns = [
            self.patterns.rolled(int(option), int(shift), self.active)
            for option, shift in zip(choice, self.shifts, strict=True)
        ]
        operations = np.stack(columns, axis=1)  # [slots, subnets]
        return Schedule(operations.reshape(c.slots, c.arch.blocks, c.arch.heads))
