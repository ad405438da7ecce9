"""The round as a pure function: plan from state and reports; replies are folded in ``fold``.

Back ends only carry blobs: Flower (``server_app``) and a plain loop (``local``) drive the same
functions, and give the same result for the same seed.
"""

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from d2ft_fl import holdings, wire
from d2ft_fl.budgets import DEADLINE, Budget
from d2ft_fl.compensation import MeanBook
from d2ft_fl.config import RunConfig
from d2ft_fl.costs import RANK_BYTES, RESOURCES, Cost, CostModel
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.holdings import Digests, digests, has_fixed
from d2ft_fl.lora import merged
from d2ft_fl.match import matched
from d2ft_fl.methods import method_of
from d2ft_fl.passes import NO_PASSES, Passes, passes_cost, round_cost, with_passes
from d2ft_fl.planner import Assignment, Participant, Planner
from d2ft_fl.scores import KINDS, MEASURED, ScoreBook, subnet_scores
from d2ft_fl.server_optimizer import Moments
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
            never; before the first round one 0 for all.
        holds: Client -> bool [blocks, heads], subnets whose fixed parameters it has.
        digests: Names of fixed parameters; see :mod:`d2ft_fl.holdings`.
        figures: What the last round's folding, or a new beginning, has to report, by name.
        moments: Of the server's optimiser, by parameter.
    """

    round: int
    weights: dict[str, Tensor]
    scores: ScoreBook = field(default_factory=ScoreBook)
    means: MeanBook = field(default_factory=MeanBook)
    last_trained: np.ndarray = field(default_factory=lambda: np.zeros((), dtype=np.int64))
    holds: Mapping[int, np.ndarray] = field(default_factory=dict)
    digests: Digests = field(default_factory=dict)
    figures: Mapping[str, float | None] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class Federation:
    """What stays the same over rounds that train alike.

    Attributes:
        arch: The model, and what trains of it.
        own: The model itself; ``arch``, if not told.
    """

    config: RunConfig
    arch: Architecture
    own: Architecture | None = None

    def at(self, round: int) -> "Federation":
        """The federation of a round: what trains is for the way of tuning to say."""
        choose = getattr(self.tuning, "architecture", None)
        if choose is None:
            return self
        own = self.own or self.arch
        arch = choose(own, self.config, round)
        return self._stages.setdefault(arch, Federation(self.config, arch, own))

    @cached_property
    def _stages(self) -> dict[Architecture, "Federation"]:
        return {}

    @cached_property
    def tuning(self) -> Any:
        """The module of the way of tuning."""
        return self.config.load_tuning()

    def prepared(self, state: State, original: Mapping[str, Tensor]) -> State:
        """The state as the round after it wants it: factors begin, fixed parameters get names.

        Args:
            original: The weights that the run began with.
        """
        number = state.round + 1
        state = replace(state, figures={})
        if prepare := getattr(self.tuning, "prepare", None):
            weights, figures = prepare(state.weights, self.arch, self.config, number, original)
            if weights is not state.weights:  # a new beginning: nobody has anything of it
                state = State(number - 1, weights, state.scores, state.means, state.last_trained)
                state = replace(state, figures=figures)
        if has_fixed(self.arch) and not state.digests:
            state = replace(state, digests=digests(self.arch, state.weights), holds={})
        return state

    def model_weights(self, state: State) -> Mapping[str, Tensor]:
        """The model's own weights, factors merged in."""
        if not self.arch.rank:
            return state.weights
        if self._merged.get("of") is not state.weights:
            merged_weights = merged(self.arch, state.weights)
            self._merged.update({"of": state.weights, "is": merged_weights})
        return self._merged["is"]

    @cached_property
    def _merged(self) -> dict[str, dict[str, Tensor]]:
        return {}

    @cached_property
    def costs(self) -> CostModel:
        """The cost model, of a round that neither compensates nor calibrates."""
        config = self.config
        device = config.torch_device().type
        kinds = len(config.measured_scores())
        options = config.local_options()
        return CostModel(self.arch, options, config.slots, device, score_kinds=kinds)

    def calibrates(self, round: int) -> bool:
        """Whether clients measure what subnets add on average in this round."""
        return self.config.compensation and (round - 1) % max(1, self.config.score_every) == 0

    def costs_of(self, state: State, accumulate: int | None = None) -> CostModel:
        """The cost model of the round after ``state``.

        Args:
            accumulate: Passes that a batch is run in, if not as many as are configured.
        """
        compensated = state.means.known is not None
        return self.costs_when(compensated, self.calibrates(state.round + 1), accumulate)

    def costs_when(
        self, compensated: bool, calibrating: bool, accumulate: int | None = None
    ) -> CostModel:
        """The cost model of rounds in which this is so; see :meth:`costs_of`."""
        costs = self.cost_models[compensated, calibrating]
        if accumulate is None or accumulate == costs.options.accumulate:
            return costs
        key = compensated, calibrating, accumulate
        if key not in self._accumulating:
            options = replace(costs.options, accumulate=accumulate)
            self._accumulating[key] = replace(costs, options=options)
        return self._accumulating[key]

    @cached_property
    def _accumulating(self) -> dict[tuple[bool, bool, int], CostModel]:
        return {}

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
                ranks=c.offered_ranks() if self.arch.rank else (),
                rank_exponent=c.lora_rank_exponent,
            )
            for key, costs in self.cost_models.items()
        }

    @cached_property
    def strategy(self) -> Any:
        """The strategy's module."""
        return self.config.load_strategy()

    @cached_property
    def keeps(self) -> tuple[str, ...]:
        """Of ``LIMITS``, the budgets that the strategy promises to keep."""
        return method_of(self.strategy, self.config.strategy).keeps

    def participants(self, reports: Iterable[Report], state: State) -> list[Participant]:
        """Clients in order, with their budgets resolved, and matched where that is configured."""
        ordered = sorted(reports, key=lambda r: r.client)
        full = [self.costs.full_cost(r.examples) for r in ordered]
        budgets = [r.budget for r in ordered]
        if self.config.match:
            share = self.config.match_share
            budgets = matched(self.config.match, share, budgets, full)
        return [
            Participant(
                r.client,
                self.config.examples_of(r.examples),
                budget,
                budget.capacity(whole),
                self.holds(state, r.client),
                r.examples,
            )
            for r, budget, whole in zip(ordered, budgets, full, strict=True)
        ]

    def holds(self, state: State, client: int) -> np.ndarray | None:
        """Subnets whose fixed parameters a client has: bool [blocks, heads]; None if none are."""
        if not has_fixed(self.arch):
            return None
        nothing = np.zeros((self.arch.blocks, self.arch.heads), dtype=bool)
        return state.holds.get(client, nothing)


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
                f"nobody measures {kind} scores in this run; name {kind} in SCORES of the strategy"
            )
        weights = self.federation.model_weights(self.state) if kind == "magnitude" else {}
        own = self.federation.own or self.federation.arch
        return subnet_scores(kind, own, weights, self.state.scores)

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
        block, head = np.indices(self.shape).reshape(2, -1)
        worth = backward.mean(axis=1)[block]
        last = np.broadcast_to(self.state.last_trained, self.shape).ravel()
        order = np.lexsort([head, block, -worth, last])
        due = order[: -(-len(order) // self.federation.config.agenda_rounds)]
        first = backward.copy()
        first.flat[due] += 2 * backward.max()
        return first

    def passes(self, client: Participant, examples: int | None = None) -> Passes:
        """What ``client`` should do with the whole model before it trains in this round.

        Args:
            examples: On how many examples it trains; None for ``client.examples``.
        """
        config = self.federation.config
        count = client.examples if examples is None else examples
        scores = config.measured_scores() and not (self.number - 1) % config.score_every
        scored = min(config.score_examples, count) if scores else 0
        selects = config.data_selection != "random" and 0 < count < client.local
        return Passes(scored, client.local if selects else 0)

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
            passes=[self.passes(c) for c in self.clients],
        )

    def everything(self) -> Schedule:
        """Every subnet FULL in every slot."""
        return self.federation.costs.everything()

    def assign(
        self,
        client: Participant,
        schedule: Schedule,
        examples: int | None = None,
        accumulate: int | None = None,
    ) -> Assignment:
        """A schedule of your own, with its predicted cost; budgets are not looked at.

        Args:
            examples: On how many examples it trains; None for ``client.examples``.
            accumulate: Passes that it runs a batch in; None for as many as are configured.
        """
        count = client.examples if examples is None else examples
        passes = NO_PASSES if schedule.sits_out else self.passes(client, count)
        costs = self.federation.costs_of(self.state, accumulate)
        cost = round_cost(costs, schedule, count, passes, client.holds)
        return Assignment(
            client.client, schedule, cost, passes, examples=count, accumulate=accumulate
        )

    def largest(self, client: Participant, schedules: Sequence[Schedule]) -> Assignment:
        """The last of some schedules, cheapest first, that every budget of a client affords.

        A client that cannot afford passes over the whole model does without scoring, and draws its
        examples; one that affords none of the schedules sits out.
        """
        wanted = self.passes(client)
        for passes in dict.fromkeys((wanted, replace(wanted, scored=0), NO_PASSES)):
            costs = self._costs(client, schedules, passes)
            for schedule, cost in zip(reversed(schedules), reversed(costs), strict=True):
                if client.affords(cost):
                    return Assignment(client.client, schedule, cost, passes)
        return self.sit_out(client)

    def _costs(
        self, client: Participant, schedules: Sequence[Schedule], passes: Passes
    ) -> list[Cost]:
        """What schedules cost a client, with passes before them."""
        costs = self.federation.costs_of(self.state)
        operations = np.stack([s.operations for s in schedules])
        examples = np.full(len(schedules), client.examples)
        held = None if passes or client.holds is None else client.holds
        holds = None if held is None else np.broadcast_to(held, (len(schedules), *self.shape))
        model = replace(costs, compensated=False) if passes else costs
        found = [Cost(*row) for row in model.costs(operations, examples, holds).tolist()]
        if not passes:
            return found
        before = passes_cost(costs, passes, client.holds)
        return [with_passes(cost, before) for cost in found]

    def sit_out(self, client: Participant) -> Assignment:
        """Nothing to do for a client in this round."""
        slots = self.federation.config.slots
        return self.assign(client, Schedule.filled(Operation.SHORTCUT, slots, *self.shape))

    def stage(self, stages: int) -> int:
        """In which of so many stages the run is, counted from 0; the last one goes on.

        A stage has ``stage-rounds`` rounds; by default as many as divide the run evenly.
        """
        config = self.federation.config
        each = config.stage_rounds or -(-config.rounds // stages)
        return min(stages - 1, (self.number - 1) // each)

    def schedule(self, operations: np.ndarray) -> Schedule:
        """A schedule that is the same in every slot, from operations int8 [blocks, heads]."""
        slots = self.federation.config.slots
        return Schedule(np.broadcast_to(operations, (slots, *self.shape)).astype(np.int8))


def plan_round(federation: Federation, state: State, reports: Iterable[Report]) -> "Plan":
    """All clients' assignments of the next round.

    Raises:
        RunError: When the strategy raises anything, leaves a client out, or breaks a budget that it
            promised to keep.
    """
    started = time.perf_counter()
    clients = federation.participants(reports, state)
    try:
        assignments = _assignments(federation, Round(federation, state, clients))
    except (ConfigError, RunError):
        raise
    except Exception as error:  # a strategy is anybody's code
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise RunError(
            f"strategy {federation.config.strategy!r} raised {type(error).__name__} in round "
            f"{state.round + 1}: {reason}"
        ) from error
    return Plan(state.round + 1, clients, assignments, time.perf_counter() - started)


def _assignments(federation: Federation, round: Round) -> list[Assignment]:
    """What the strategy assigns, in the order of clients, once it keeps what it promises."""
    assignments = federation.strategy.schedule(round)
    by_client = {a.client: a for a in assignments}
    if sorted(by_client) != [c.client for c in round.clients] or len(assignments) != len(by_client):
        raise RunError(
            f"strategy {federation.config.strategy!r} must give each client one assignment"
        )
    for c in round.clients:
        a = by_client[c.client]
        over = [r for r, o in zip(RESOURCES, a.cost.vector() > c.capacity, strict=True) if o]
        over += [] if c.on_time(a.cost) else [DEADLINE]
        if broken := [name for name in over if name in federation.keeps]:
            raise RunError(
                f"strategy {federation.config.strategy!r} breaks the budget of client {c.client} "
                f"in {', '.join(broken)}; use round.plan, or leave that out of KEEPS"
            )
        if a.examples is None:
            by_client[c.client] = replace(a, examples=c.examples)
        elif not 0 <= a.examples <= c.local:
            raise RunError(
                f"strategy {federation.config.strategy!r} gives client {c.client} {a.examples} "
                f"examples to train on, of {c.local}"
            )
    return [by_client[c.client] for c in round.clients]


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
    plan: "Plan",
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
