"""What strategies decide from, :class:`Round`, and the plan of a round, :func:`plan_round`.

Planning is a pure function of the state and of clients' reports, whatever back end carries the
messages. So equal seeds give equal plans.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2ft_fl.aggregation.sums import MOST_STEP
from d2ft_fl.budgets.budget import DEADLINE
from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes, probes_cost, round_cost, with_probes
from d2ft_fl.costs.resources import RESOURCES, Cost, costs_from
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.importance import KINDS, MEASURED, subnet_scores
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.subnets.schedule import Operation, Schedule

__all__ = ["Assignment", "ExecutionPolicy", "Participant", "Round", "most", "plan_round"]


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
        """The number of the round, counted from 1."""
        return self.state.round + 1

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of arrays over subnets: (blocks, heads)."""
        return self.federation.arch.blocks, self.federation.arch.heads

    def generator(self, client: Participant) -> np.random.Generator:
        """Return a generator of random numbers that depend on seed, round and client only.

        Args:
            client: The client that draws.
        """
        return np.random.default_rng([self.federation.config.seed, self.number, client.client])

    def scores(self, kind: str) -> np.ndarray:
        """Return importance scores with mean 1: float64 [blocks, heads].

        Args:
            kind: One of the kinds of :mod:`d2ft_fl.planning.importance`.

        Raises:
            RunError: For an unknown kind, or one that needs scoring probes and gets none.
        """
        if kind not in KINDS:
            raise RunError(f"score kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
        if kind in MEASURED and kind not in self.federation.components.measured_scores:
            raise RunError(
                f"nobody measures {kind} scores in this run; name {kind} in backward-score or "
                "forward-score, or in SCORES where the strategy sets that"
            )
        weights = self.federation.model_weights(self.state) if kind == "magnitude" else {}
        return subnet_scores(kind, self.federation.model_arch, weights, self.state.scores)

    def backward_scores(self) -> np.ndarray:
        """Return the importance of training each subnet, as configured."""
        return self.scores(self.federation.config.backward_score)

    def forward_scores(self) -> np.ndarray:
        """Return the importance of running each subnet, as configured."""
        return self.scores(self.federation.config.forward_score)

    def agenda(self, backward: np.ndarray) -> np.ndarray:
        """Return scores that put this round's agenda first: float64 [blocks, heads].

        The agenda is common to all clients: the subnets that were trained longest ago, as many as
        it takes to train every one within ``agenda-rounds`` rounds, if someone can afford that
        many. Among subnets trained equally long ago, those of the block with the highest mean score
        come first. What nobody trained in its turn stays first.

        Args:
            backward: Scores of training each subnet: float64 [blocks, heads].
        """
        block, head = np.indices(self.shape).reshape(2, -1)
        utility = backward.mean(axis=1)[block]
        last = np.broadcast_to(self.state.last_trained, self.shape).ravel()
        order = np.lexsort([head, block, -utility, last])
        due = order[: -(-len(order) // self.federation.config.agenda_rounds)]
        first = backward.copy()
        first.flat[due] += 2 * backward.max()
        return first

    def probes(self, client: Participant, examples: int | None = None) -> Probes:
        """Return what ``client`` should do with the whole model before it trains in this round.

        Args:
            client: The client.
            examples: On how many examples it trains; None for ``client.examples``.
        """
        config = self.federation.config
        count = client.examples if examples is None else examples
        kinds = self.federation.components.measured_scores
        if not kinds or (self.number - 1) % config.score_every:
            kinds = ()
        scored = min(config.score_examples, count) if kinds else 0
        selects = config.data_selection != "random" and 0 < count < client.local
        return Probes(scored, client.local if selects else 0, kinds)

    def plan(
        self,
        backward: np.ndarray,
        forward: np.ndarray,
        coupled: bool = True,
        method: str | None = None,
    ) -> list[Assignment]:
        """Return assignments of high score that keep every budget of every client.

        Args:
            backward: Scores of training each subnet: float64 [blocks, heads], or [clients, blocks,
                heads] where clients' scores differ.
            forward: Scores of running each subnet, of the same shapes.
            coupled: Whether ``coupling = "spread"`` acts; else each client has its own optimum.
            method: ``joint`` or ``two-stage`` with D2FT's three operations, each client for itself;
                None for what is configured.
        """
        federation = self.federation
        planner = federation.planner_of(self.state, coupled)
        if method is not None:
            weight = federation.config.forward_weight
            planner = federation.planner_under(self.state, DEFAULT_POLICY, weight, 0.0, method)
        return planner.plan(
            self.clients,
            backward,
            forward,
            rotation=self.number,
            probes=[self.probes(c) for c in self.clients],
        )

    def everything(self) -> Schedule:
        """Return the schedule with every subnet FULL in every slot."""
        return self.federation.costs.everything()

    def assign(
        self,
        client: Participant,
        schedule: Schedule,
        examples: int | None = None,
        policy: ExecutionPolicy = DEFAULT_POLICY,
        probes: Probes | None = None,
    ) -> Assignment:
        """Return an assignment of any schedule, with its predicted cost; budgets are not checked.

        Args:
            client: The client.
            schedule: What it runs.
            examples: On how many examples it trains; None for ``client.examples``.
            policy: How it executes the schedule; by default as configured.
            probes: What it does before training; None for what the round asks of clients that
                train.
        """
        count = client.examples if examples is None else examples
        if probes is None:
            probes = NO_PROBES if schedule.sits_out else self.probes(client, count)
        a = Assignment(client.client, schedule, Cost(), probes, examples=count, policy=policy)
        return replace(a, cost=self.cost_of(client, a))

    def cost_of(self, client: Participant, a: Assignment, timed: bool = True) -> Cost:
        """Return what an assignment is predicted to cost.

        Args:
            client: Who does it.
            a: The assignment; what it says of its cost is ignored.
            timed: See :meth:`.CostModel.cost`.
        """
        costs = self.costs_for(client, a.policy)
        examples = client.examples if a.examples is None else a.examples
        return round_cost(costs, a.schedule, examples, a.probes, client.cached, timed)

    def costs_for(self, client: Participant, policy: ExecutionPolicy = DEFAULT_POLICY) -> CostModel:
        """Return the cost model of a client's round, with seconds on its own machine's curve.

        Args:
            client: The client.
            policy: How it executes its schedule.
        """
        return self.federation.costs_of(self.state, policy, client.budget.curve)

    def micro_batch_counts(self, policy: ExecutionPolicy = DEFAULT_POLICY) -> list[int]:
        """Return numbers of micro-batches, ascending: one for each size of the largest micro-batch.

        Args:
            policy: The execution policy that the batch size depends on.
        """
        batch = self.federation.components.training.under(policy).batch_size
        return sorted({-(-batch // size) for size in range(1, batch + 1)})

    def largest(self, client: Participant, schedules: Sequence[Schedule]) -> Assignment:
        """Return the last of some schedules, cheapest first, that every budget of a client affords.

        A client that cannot afford probes of the whole model does without scoring, and draws its
        examples at random. One that affords none of the schedules sits out.

        Args:
            client: The client.
            schedules: What it may run, cheapest first.
        """
        for probes in self.probes(client).alternatives:
            costs = self._costs(client, schedules, probes)
            for schedule, cost in zip(reversed(schedules), reversed(costs), strict=True):
                if client.affords(cost):
                    return Assignment(client.client, schedule, cost, probes)
        return self.sit_out(client)

    def _costs(
        self, client: Participant, schedules: Sequence[Schedule], probes: Probes
    ) -> list[Cost]:
        """Return what schedules cost a client, with the probes before them."""
        costs = self.costs_for(client)
        operations = np.stack([s.operations for s in schedules])
        examples = np.full(len(schedules), client.examples)
        reusable = None if probes else client.cached
        cached = (
            None if reusable is None else np.broadcast_to(reusable, (len(schedules), *self.shape))
        )
        model = costs.uncompensated if probes else costs
        amounts = model.costs(operations, examples, cached)
        training = costs_from(amounts, model.work(operations, examples))
        if not probes:
            return training
        before = probes_cost(costs, probes, client.cached)
        return [with_probes(cost, before) for cost in training]

    def sit_out(self, client: Participant) -> Assignment:
        """Return an assignment with nothing to do.

        Args:
            client: The client that sits out.
        """
        slots = self.federation.config.slots
        return self.assign(client, Schedule.filled(Operation.SHORTCUT, slots, *self.shape))

    def stage(self, limit: int) -> tuple[int, int]:
        """Return the stage of the run, counted from 0, and how many stages there are.

        A stage has ``stage-rounds`` rounds, and the last one goes on. By default stages divide the
        run evenly, to a round; with fewer rounds than ``limit`` there is one stage a round.

        Args:
            limit: The most stages that there may be.
        """
        config = self.federation.config
        if config.stage_rounds:
            return min(limit - 1, (self.number - 1) // config.stage_rounds), limit
        stages = min(limit, config.rounds)
        return min(stages - 1, (self.number - 1) * stages // config.rounds), stages

    def schedule(self, operations: np.ndarray) -> Schedule:
        """Return a schedule that is equal in all slots.

        Args:
            operations: Operations of one slot: int8 [blocks, heads].
        """
        slots = self.federation.config.slots
        return Schedule(np.broadcast_to(operations, (slots, *self.shape)).astype(np.int8))


def most(
    fits: int, over: int, attempt: Callable[[int], Assignment | None], first: int = 0
) -> Assignment | None:
    """Return the assignment of the largest affordable number, searched by bisection.

    Args:
        fits: A number below all that are tried.
        over: A number above all that are tried.
        attempt: Returns the assignment of a number; None where budgets do not afford it. If a
            number is not affordable, no larger one is.
        first: The number that is tried first.

    Returns:
        None where no number that was tried is affordable.
    """
    best, count = None, first
    while over - fits > 1:
        count = count if fits < count < over else (fits + over) // 2
        if (tried := attempt(count)) is None:
            over = count
        else:
            fits, count, best = count, count + 1 if count == first else 0, tried
    return best


def plan_round(federation: Federation, state: State, reports: Iterable[Report]) -> Plan:
    """Return the plan of the next round.

    Args:
        federation: The federation of the round.
        state: The state that the round starts from.
        reports: What clients report before the round.

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


def _assignments(federation: Federation, context: Round) -> list[Assignment]:
    """Return what the strategy assigns, in the order of clients, once it keeps its promises."""
    strategy = f"strategy {federation.config.strategy!r}"
    assignments = federation.strategy.schedule(context)
    by_client = {a.client: a for a in assignments}
    if sorted(by_client) != [c.client for c in context.clients] or len(assignments) != len(
        by_client
    ):
        raise RunError(f"{strategy} must give each client one assignment")
    checked = []
    for client in context.clients:
        assignment = by_client[client.client]
        _check_budgets(strategy, federation.keeps, client, assignment)
        _check_policy(strategy, assignment)
        checked.append(_with_examples(strategy, client, assignment))
    return checked


def _check_budgets(
    strategy: str, keeps: Collection[str], client: Participant, assignment: Assignment
) -> None:
    """Raise RunError where an assignment breaks a budget that the strategy promises to keep."""
    exceeds = assignment.cost.vector() > client.capacity
    over = [name for name, exceeded in zip(RESOURCES, exceeds, strict=True) if exceeded]
    over += [] if client.on_time(assignment.cost) else [DEADLINE]
    if broken := [name for name in over if name in keeps]:
        raise RunError(
            f"{strategy} breaks the budget of client {client.client} in {', '.join(broken)}; use "
            "context.plan, or leave that out of KEEPS"
        )


def _check_policy(strategy: str, assignment: Assignment) -> None:
    """Raise RunError where an assignment's weight or step is out of range."""
    policy = assignment.policy
    for name, value, largest in (
        ("weight", policy.weight, 1e6),
        ("step", policy.step, MOST_STEP),
    ):
        if not 0 < value <= largest:
            raise RunError(
                f"{strategy} gives client {assignment.client} a {name} of {value}; it must be "
                f"above 0, and {largest:g} at most"
            )


def _with_examples(strategy: str, client: Participant, assignment: Assignment) -> Assignment:
    """Return an assignment with its number of examples, once the client has as many.

    Raises:
        RunError: When it asks for more examples than the client has.
    """
    if assignment.examples is None:
        return replace(assignment, examples=client.examples)
    if not 0 <= assignment.examples <= client.local:
        raise RunError(
            f"{strategy} gives client {client.client} {assignment.examples} examples to train on, "
            f"of {client.local}"
        )
    return assignment
