"""The round as a pure function: plan from state and reports, fold replies into the next state.

Back ends only carry blobs: Flower (``server_app``) and a plain loop (``local``) drive the same
functions, and give the same result for the same seed.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from d2ft_fl import wire
from d2ft_fl.aggregation import Sums, Update
from d2ft_fl.budgets import Budget
from d2ft_fl.compensation import MeanBook, MeanSums
from d2ft_fl.config import RunConfig
from d2ft_fl.costs import RESOURCES, Cost, CostModel
from d2ft_fl.errors import ReplyError, RunError
from d2ft_fl.planner import Assignment, Participant, Planner
from d2ft_fl.scores import KINDS, MEASURED, TENSOR, ScoreBook, subnet_scores
from d2ft_fl.subnets import Architecture, Operation, Schedule, pack_for

__all__ = ["Assignment", "Federation", "Participant", "Report", "Round", "State"]


@dataclass(frozen=True)
class Report:
    """What a client says of itself before a round."""

    client: int
    examples: int
    budget: Budget


@dataclass(frozen=True)
class State:
    """What one round hands to the next.

    Attributes:
        round: Rounds finished.
        weights: The global model, float32 by state-dict name.
        scores: What scoring passes have told.
        means: What subnets add on average, where compensation is on.
        last_trained: int64 [blocks, heads], the round in which each subnet was last trained, 0 for
            never; ``None`` before the first round.
    """

    round: int
    weights: dict[str, Tensor]
    scores: ScoreBook = field(default_factory=ScoreBook)
    means: MeanBook = field(default_factory=MeanBook)
    last_trained: np.ndarray | None = None


@dataclass(frozen=True)
class Federation:
    """What stays the same over a run."""

    config: RunConfig
    arch: Architecture

    @cached_property
    def costs(self) -> CostModel:
        """The cost model, of a round that neither compensates nor calibrates."""
        config = self.config
        device = config.torch_device().type
        kinds = len(config.score_kinds())
        options = config.local_options()
        return CostModel(self.arch, options, config.slots, device, score_kinds=kinds)

    def calibrates(self, round: int) -> bool:
        """Whether clients measure what subnets add on average in this round."""
        return self.config.compensation and (round - 1) % max(1, self.config.score_every) == 0

    def costs_of(self, state: State) -> CostModel:
        """The cost model of the round after ``state``."""
        return self.cost_models[state.means.known is not None, self.calibrates(state.round + 1)]

    @cached_property
    def cost_models(self) -> dict[tuple[bool, bool], CostModel]:
        """By whether shortcuts are compensated, and whether clients calibrate."""
        return {
            (compensated, calibrating): replace(
                self.costs, compensated=compensated, calibrating=calibrating
            )
            for compensated, calibrating in product((False, True), (False, True))
        }

    def planner_of(self, state: State) -> Planner:
        """The planner of the round after ``state``."""
        return self._planners[state.means.known is not None, self.calibrates(state.round + 1)]

    @cached_property
    def _planners(self) -> dict[tuple[bool, bool], Planner]:
        """By their cost models' keys."""
        c = self.config
        return {
            key: Planner(
                costs,
                method=c.planner,
                forward_weight=c.forward_weight,
                frozen_weight=c.frozen_weight,
                coupling=c.coupling,
                spread_clients=c.spread_clients * c.clients,
                least_clients=c.least_clients,
            )
            for key, costs in self.cost_models.items()
        }

    @cached_property
    def strategy(self) -> Any:
        """The strategy's module."""
        return self.config.load_strategy()

    @property
    def keeps_budgets(self) -> bool:
        """Whether the strategy promises to keep budgets."""
        return bool(getattr(self.strategy, "KEEPS_BUDGETS", True))

    def participant(self, report: Report) -> Participant:
        """A client with its budgets resolved."""
        full = self.costs.full_cost(report.examples)
        capacity = report.budget.capacity(full)
        return Participant(report.client, report.examples, report.budget, capacity)


@dataclass(frozen=True)
class Round:
    """What a strategy decides from, and the tools it decides with.

    Attributes:
        federation: Model, costs and configuration.
        state: The global model and scores so far.
        clients: Everyone who takes part, in order.
    """

    federation: Federation
    state: State
    clients: list[Participant]

    @property
    def number(self) -> int:
        """Rounds are counted from 1."""
        return self.state.round + 1

    @property
    def shape(self) -> tuple[int, int]:
        """(blocks, heads)."""
        return self.federation.arch.blocks, self.federation.arch.heads

    def generator(self, client: Participant) -> np.random.Generator:
        """Randomness that depends on seed, round and client only."""
        return np.random.default_rng([self.federation.config.seed, self.number, client.client])

    def scores(self, kind: str) -> np.ndarray:
        """Scores of a kind (see :mod:`d2ft_fl.scores`) with mean 1: float64 [blocks, heads].

        Raises:
            RunError: For an unknown kind, or one that needs a scoring pass and gets none.
        """
        if kind not in KINDS:
            raise RunError(f"score kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
        if kind in MEASURED and kind not in self.federation.config.measured_scores():
            raise RunError(
                f"nobody measures {kind} scores in this run; name {kind} in backward-score or "
                "forward-score, and do not set USES_SCORES = False in the strategy"
            )
        return subnet_scores(kind, self.federation.arch, self.state.weights, self.state.scores)

    def backward_scores(self) -> np.ndarray:
        """Worth of training each subnet, as configured."""
        return self.scores(self.federation.config.backward_score)

    def forward_scores(self) -> np.ndarray:
        """Worth of running each subnet, as configured."""
        return self.scores(self.federation.config.forward_score)

    def agenda(self, backward: np.ndarray) -> np.ndarray:
        """Scores that put this round's agenda before everything else: float64 [blocks, heads].

        The agenda is common to all clients: the subnets that were trained longest ago, as many as
        it takes to train every one within ``agenda-rounds`` rounds, if someone can afford that
        many; of equals those of the block with the highest mean score. What nobody trained in its
        turn stays at the head.
        """
        last = self.state.last_trained
        last = np.zeros(self.shape, dtype=np.int64) if last is None else last
        block, head = np.indices(self.shape)
        worth = -backward.mean(axis=1, keepdims=True) + 0 * backward
        order = np.lexsort([head.ravel(), block.ravel(), worth.ravel(), last.ravel()])
        due = order[: -(-len(order) // self.federation.config.agenda_rounds)]
        first = backward.copy()
        first.flat[due] += 2 * backward.max()
        return first

    def scoring_examples(self, client: Participant) -> int:
        """Examples of a scoring pass that ``client`` would run in this round; 0 for none."""
        config = self.federation.config
        if not config.measured_scores() or (self.number - 1) % config.score_every:
            return 0
        return min(config.score_examples, client.examples)

    def plan(self, backward: np.ndarray, forward: np.ndarray) -> list[Assignment]:
        """Good schedules for these scores that keep every budget of every client.

        Args:
            backward, forward: float64 [blocks, heads], or [clients, blocks, heads] where clients'
                scores differ.
        """
        return self.federation.planner_of(self.state).plan(
            self.clients,
            backward,
            forward,
            rotation=self.number,
            score_examples=[self.scoring_examples(c) for c in self.clients],
        )

    def everything(self) -> Schedule:
        """Every subnet FULL in every slot."""
        return self.federation.costs.everything()

    def assign(self, client: Participant, schedule: Schedule) -> Assignment:
        """A schedule of your own, with its predicted cost; budgets are not looked at."""
        costs = self.federation.costs_of(self.state)
        return Assignment(client.client, schedule, costs.cost(schedule, client.examples))


def plan_round(federation: Federation, state: State, reports: Iterable[Report]) -> "Plan":
    """All clients' assignments of the next round.

    Raises:
        RunError: When the strategy leaves a client out, or breaks a budget that it promised to
            keep.
    """
    started = time.perf_counter()
    clients = [federation.participant(r) for r in sorted(reports, key=lambda r: r.client)]
    assignments = federation.strategy.schedule(Round(federation, state, clients))
    by_client = {a.client: a for a in assignments}
    if sorted(by_client) != [c.client for c in clients] or len(assignments) != len(clients):
        raise RunError(
            f"strategy {federation.config.strategy!r} must give each client one assignment"
        )
    for c in clients:
        over = by_client[c.client].cost.vector() > c.capacity
        if federation.keeps_budgets and over.any():
            names = ", ".join(r for r, o in zip(RESOURCES, over, strict=True) if o)
            raise RunError(
                f"strategy {federation.config.strategy!r} breaks the budget of client {c.client} "
                f"in {names}; use round.plan, or declare KEEPS_BUDGETS = False"
            )
    ordered = [by_client[c.client] for c in clients]
    return Plan(state.round + 1, clients, ordered, time.perf_counter() - started)


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

    def schedules(self) -> np.ndarray:
        """int8 [clients, slots, blocks, heads]."""
        return np.stack([a.schedule.operations for a in self.assignments])


def encode_assignment(federation: Federation, state: State, a: Assignment) -> bytes:
    """The message that tells a client what to do, with the slices that it needs."""
    carried = a.schedule
    if a.score_examples:
        carried = federation.costs.everything()  # the scoring pass runs everything
    meta = {
        "round": state.round + 1,
        "client": a.client,
        "operations": a.schedule.operations.astype("int8").tobytes().hex(),
        "shape": list(a.schedule.operations.shape),
        "score_examples": a.score_examples,
        "calibrate": federation.calibrates(state.round + 1),
        "keeps_budgets": federation.keeps_budgets,
    }
    tensors = pack_for(federation.arch, state.weights, carried)
    if not a.score_examples:
        tensors |= state.means.offsets(federation.arch, state.weights, a.schedule)
    return wire.encode(tensors, meta)


@dataclass(frozen=True)
class ClientRecord:
    """What became of one client in one round."""

    client: int
    device: str
    examples: int
    operations: dict[str, float]  # shares over slots and subnets
    predicted: Cost
    allowed: np.ndarray
    used: Cost | None  # None: sat out or failed
    seconds: float  # simulated
    deadline: float | None  # of these
    wall_seconds: float
    train_loss: float | None
    scored: int
    gap: float | None
    fault: str | None

    @property
    def sat_out(self) -> bool:
        return self.used is None and self.fault is None


class Fold:
    """Folds the replies of one round in, one at a time, in any order."""

    def __init__(self, federation: Federation, state: State, plan: Plan):
        self.federation, self.state, self.plan = federation, state, plan
        examples = sum(sum(federation.costs.slot_totals(c.examples)) for c in plan.clients)
        self.sums = Sums(federation.arch, state.weights, examples)
        self.mean_sums = MeanSums(federation.arch, examples)
        self.pending = {a.client: a for a in plan.working}
        self.participants = {c.client: c for c in plan.clients}
        self.measured: dict[int, tuple[dict[str, np.ndarray], int]] = {}
        self.records: dict[int, ClientRecord] = {}

    def add(self, client: int, blob: bytes) -> None:
        """Validate one reply and add it; a reply that fails is left out and named."""
        try:
            self._add(client, blob)
        except ReplyError as error:
            self.fail(client, str(error))

    def _add(self, client: int, blob: bytes) -> None:
        if client not in self.pending:
            raise ReplyError("an answer nobody waits for")
        tensors, meta = wire.decode(blob)
        if meta.get("error"):
            raise ReplyError(str(meta["error"]))
        try:
            round, sender = int(meta["round"]), int(meta["client"])
            slot_examples = [int(n) for n in meta["slot_examples"]]
            flops, memory, down = (int(meta["used"][k]) for k in ("flops", "memory", "bytes_down"))
            wall, loss = float(meta["used"]["seconds"]), float(meta["loss"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ReplyError(f"the report is incomplete or malformed: {error}") from None
        if (
            not all(0 <= n < 2**62 for n in (flops, memory, down))
            or not np.isfinite([wall, loss]).all()
        ):
            raise ReplyError("the report holds numbers that cannot be")
        if (round, sender) != (self.plan.round, client):
            raise ReplyError(f"an answer to round {round} for client {sender}")
        assignment = self.pending[client]
        participant = self.participants[client]
        expected = self.federation.costs.slot_totals(participant.examples)
        if slot_examples != expected:
            raise ReplyError(f"trained on {sum(slot_examples)} examples, not {sum(expected)}")
        measured = self._measured(tensors) if assignment.score_examples else {}
        schedule, means = assignment.schedule, {}
        if self.federation.calibrates(self.plan.round):
            means = {n: tensors.pop(n) for n in list(tensors) if n.startswith("d2ft.mean.")}
            self.mean_sums.check(schedule, means)
        self.sums.add(Update(schedule, slot_examples, tensors))
        if means:
            self.mean_sums.add(schedule, slot_examples, means)
        del self.pending[client]
        if measured:
            self.measured[client] = (measured, assignment.score_examples)
        used = Cost(flops, memory, len(blob), down)
        self._record(assignment, used, wall_seconds=wall, train_loss=loss)

    def _measured(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Take a client's scores out of its reply: kind -> float64 [blocks, heads]."""
        kinds = self.federation.config.score_kinds()
        return {kind: self._check_scores(kind, tensors.pop(TENSOR + kind, None)) for kind in kinds}

    def _check_scores(self, kind: str, scores: Tensor | None) -> np.ndarray:
        arch = self.federation.arch
        if scores is None:
            raise ReplyError(f"the {kind} scores are missing")
        values = scores.double().numpy()
        if values.shape != (arch.blocks, arch.heads) or not np.isfinite(values).all():
            raise ReplyError(f"the {kind} scores are not a finite [blocks, heads]")
        if (values < 0).any():
            raise ReplyError(f"the {kind} scores are negative")
        return values

    def fail(self, client: int, reason: str) -> None:
        """Leave a client out of this round, with the reason."""
        if assignment := self.pending.pop(client, None):
            self._record(assignment, None, fault=reason)

    def finish(self) -> tuple[State, list[ClientRecord]]:
        """The next state, and what became of every client, in order."""
        for client in list(self.pending):
            self.fail(client, "no answer")
        for assignment in self.plan.assignments:
            if assignment.client not in self.records:
                self._record(assignment, None)
        state = State(
            self.plan.round,
            self.sums.apply(),
            self.state.scores.updated(self.measured, self.federation.config.score_momentum),
            self.mean_sums.apply(self.state.means),
            self._last_trained(),
        )
        return state, [self.records[c.client] for c in self.plan.clients]

    def _last_trained(self) -> np.ndarray:
        arch, before = self.federation.arch, self.state.last_trained
        last = np.zeros((arch.blocks, arch.heads), dtype=np.int64) if before is None else before
        last = last.copy()
        for assignment in self.plan.working:
            if self.records[assignment.client].used is not None:
                last[assignment.schedule.trained] = self.plan.round
        return last

    def _record(
        self,
        assignment: Assignment,
        used: Cost | None,
        wall_seconds: float = 0.0,
        train_loss: float | None = None,
        fault: str | None = None,
    ) -> None:
        participant = self.participants[assignment.client]
        operations = assignment.schedule.operations
        self.records[assignment.client] = ClientRecord(
            client=assignment.client,
            device=participant.budget.device,
            examples=participant.examples,
            operations={
                operation.name.lower(): float((operations == operation).mean())
                for operation in Operation
            },
            predicted=assignment.cost,
            allowed=participant.capacity,
            used=used,
            seconds=participant.budget.seconds(used) if used else 0.0,
            deadline=participant.budget.deadline,
            wall_seconds=wall_seconds,
            train_loss=train_loss,
            scored=assignment.score_examples,
            gap=assignment.gap,
            fault=fault,
        )
