"""A federation between rounds: what is constant, and the state that one round hands to the next."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np
from torch import Tensor

from d2ft_fl.aggregation.mean_compensation import MeanBook
from d2ft_fl.aggregation.server_optimizer import Moments
from d2ft_fl.budgets.budget import Budget
from d2ft_fl.budgets.matching import matched
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.costs.resources import Cost
from d2ft_fl.lora.config import merged
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.importance import ScoreBook
from d2ft_fl.planning.planner import Planner
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.strategies import Strategy
from d2ft_fl.rounds.tuning import Tuning
from d2ft_fl.subnets.architecture import Architecture, has_fixed
from d2ft_fl.wire.parameter_cache import Digests, digests


@dataclass(frozen=True)
class Report:
    """What a client reports before a round.

    Attributes:
        client: Its number.
        examples: Its training examples.
        budget: What it may spend in the round.
    """

    client: int
    examples: int
    budget: Budget


@dataclass(frozen=True)
class State:
    """What one round hands to the next.

    Attributes:
        round: Rounds finished.
        weights: The global model, float32 by state-dict name.
        scores: Importance scores that scoring probes have measured.
        means: What subnets add on average, where compensation is on.
        last_trained: The round in which each subnet was last trained, 0 for never: int64 [blocks,
            heads]. Before the first round it is a single 0.
        cached: Client -> the subnets whose fixed parameters it has cached: bool [blocks, heads].
        digests: Names of fixed parameters; see :mod:`d2ft_fl.wire.parameter_cache`.
        figures: What the last round's aggregation, or the preparation of this one, reports, by
            name.
        moments: Moments of the server's optimiser, by parameter.
    """

    round: int
    weights: dict[str, Tensor]
    scores: ScoreBook = field(default_factory=ScoreBook)
    means: MeanBook = field(default_factory=MeanBook)
    last_trained: np.ndarray = field(default_factory=lambda: np.zeros((), dtype=np.int64))
    cached: Mapping[int, np.ndarray] = field(default_factory=dict)
    digests: Digests = field(default_factory=dict)
    figures: Mapping[str, float | None] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class Federation:
    """What is constant over rounds that train the same parameters.

    Attributes:
        components: What the options of the run name.
        arch: The architecture of the round: what trains of the model, factors included.
        built: The architecture as the model was built; None where it is ``arch``.
    """

    components: Components
    arch: Architecture
    built: Architecture | None = None

    @property
    def config(self) -> RunConfig:
        """The options of the run."""
        return self.components.config

    @property
    def model_arch(self) -> Architecture:
        """The architecture as the model was built."""
        return self.built or self.arch

    def at(self, round_number: int) -> "Federation":
        """Return the federation of a round, with the architecture that the tuning gives it.

        Args:
            round_number: The round, counted from 1.
        """
        built = self.model_arch
        arch = self.tuning.architecture(built, round_number)
        if arch is self.arch:
            return self
        return self._stages.setdefault(arch, Federation(self.components, arch, built))

    @cached_property
    def _stages(self) -> dict[Architecture, "Federation"]:
        """Federations of rounds with other architectures, by architecture."""
        return {}

    @property
    def tuning(self) -> Tuning:
        """What decides what trains of an assigned model, and how."""
        return self.components.tuning

    def prepared(self, state: State, original: Mapping[str, Tensor]) -> State:
        """Return the state that the next round starts from, with factors and digests.

        Args:
            state: The state after the last round.
            original: The weights that the run began with.
        """
        number = state.round + 1
        state = replace(state, figures={})
        weights, figures = self.tuning.prepare(state.weights, self.arch, number, original)
        if weights is not state.weights:  # a new beginning: no client has cached any of it
            state = State(number - 1, dict(weights), state.scores, state.means, state.last_trained)
            state = replace(state, figures=figures)
        if has_fixed(self.arch) and not state.digests:
            state = replace(state, digests=digests(self.arch, state.weights), cached={})
        return state

    def model_weights(self, state: State) -> Mapping[str, Tensor]:
        """Return the weights of the model as it was built, with factors merged in.

        Args:
            state: The state whose weights are returned.
        """
        if not self.arch.rank:
            return state.weights
        if self._merged.get("of") is not state.weights:
            merged_weights = merged(self.arch, state.weights)
            self._merged.update({"of": state.weights, "is": merged_weights})
        return self._merged["is"]

    @cached_property
    def _merged(self) -> dict[str, dict[str, Tensor]]:
        """The weights that were merged last: before (``of``) and after (``is``)."""
        return {}

    @cached_property
    def costs(self) -> CostModel:
        """The cost model, of a round that neither compensates nor calibrates."""
        config = self.config
        costs = CostModel(self.arch, self.components.training, config.slots, config.device)
        return replace(costs, bits_up=config.upload_bits, bits_down=config.download_bits)

    def calibrates(self, round_number: int) -> bool:
        """Return whether clients measure in a round what subnets add on average.

        Args:
            round_number: The round, counted from 1.
        """
        return (
            self.config.compensation and (round_number - 1) % max(1, self.config.score_every) == 0
        )

    def costs_of(
        self,
        state: State,
        policy: ExecutionPolicy = DEFAULT_POLICY,
        curve: MachineSpeed | None = None,
    ) -> CostModel:
        """Return the cost model of the round after ``state`` under an execution policy.

        Args:
            state: The state that the round starts from.
            policy: How clients execute their schedules.
            curve: The machine on which seconds are counted; None for the package's.
        """
        compensated = state.means.known is not None
        return self.costs_when(compensated, self.calibrates(state.round + 1), policy, curve)

    def costs_when(
        self,
        compensated: bool,
        calibrating: bool,
        policy: ExecutionPolicy = DEFAULT_POLICY,
        curve: MachineSpeed | None = None,
    ) -> CostModel:
        """Return the cost model of rounds with or without compensation and calibration.

        Args:
            compensated: Whether shortcuts are compensated.
            calibrating: Whether clients measure what subnets add on average.
            policy: How clients execute their schedules.
            curve: The machine on which seconds are counted; None for the package's.
        """
        key = compensated, calibrating, policy.priced, curve
        if key not in self._under:
            costs = self.cost_models[compensated, calibrating].under(policy.priced)
            self._under[key] = costs.on(curve)
        return self._under[key]

    @cached_property
    def _under(
        self,
    ) -> dict[tuple[bool, bool, ExecutionPolicy, MachineSpeed | None], CostModel]:
        """Cost models by (compensated, calibrating, execution policy, curve)."""
        return {}

    @cached_property
    def cost_models(self) -> dict[tuple[bool, bool], CostModel]:
        """Cost models by (compensated, calibrating), as configured otherwise."""
        return {
            (compensated, calibrating): replace(
                self.costs, compensated=compensated, calibrating=calibrating
            )
            for compensated, calibrating in product((False, True), (False, True))
        }

    def planner_of(self, state: State, coupled: bool = True) -> Planner:
        """Return the planner of the round after ``state``.

        Args:
            state: The state that the round starts from.
            coupled: Whether ``coupling = "spread"`` acts; else each client is planned alone.
        """
        planners = self._planners if coupled else self._uncoupled
        return planners[state.means.known is not None, self.calibrates(state.round + 1)]

    def planner_under(
        self,
        state: State,
        policy: ExecutionPolicy,
        forward_weight: float,
        frozen_weight: float,
        method: str = "joint",
    ) -> Planner:
        """Return the planner of an execution policy, which plans each client alone.

        Args:
            state: The state that the round starts from.
            policy: How clients execute their schedules.
            forward_weight: The weight of running a subnet, instead of the configured one.
            frozen_weight: The weight of FROZEN, instead of the configured one.
            method: ``joint`` or ``two-stage``.
        """
        costs = self.costs_of(state, policy)
        kind = costs.compensated, costs.calibrating
        key = *kind, policy.priced, forward_weight, frozen_weight, method
        if key not in self._weighted:
            base = self._planners[kind]
            changed = replace(base, costs=costs, method=method, coupling="none")
            self._weighted[key] = replace(
                changed, forward_weight=forward_weight, frozen_weight=frozen_weight
            )
        return self._weighted[key]

    @cached_property
    def _weighted(self) -> dict[tuple[bool, bool, ExecutionPolicy, float, float, str], Planner]:
        """Planners by what :meth:`planner_under` makes them from."""
        return {}

    @cached_property
    def _planners(self) -> dict[tuple[bool, bool], Planner]:
        """Planners as configured, by the keys of :attr:`cost_models`."""
        c = self.config
        return {
            key: Planner(
                costs,
                method=c.planner,
                forward_weight=c.forward_weight,
                frozen_weight=c.frozen_weight,
                coupling=c.coupling,
                spread_clients=c.spread_clients * (c.sample_clients or c.clients),
                least_clients=c.least_clients,
                ranks=c.offered_ranks() if self.arch.rank else (),
                rank_exponent=c.lora_rank_exponent,
            )
            for key, costs in self.cost_models.items()
        }

    @cached_property
    def _uncoupled(self) -> dict[tuple[bool, bool], Planner]:
        """Planners that plan each client alone, by the keys of :attr:`cost_models`."""
        if self.config.coupling != "spread":
            return self._planners
        return {key: replace(planner, coupling="none") for key, planner in self._planners.items()}

    @property
    def strategy(self) -> Strategy:
        """What decides which client runs what."""
        return self.components.strategy

    @property
    def keeps(self) -> tuple[str, ...]:
        """The budgets that the strategy promises to keep, of ``LIMITS``."""
        return self.strategy.keeps

    def participants(self, reports: Iterable[Report], state: State) -> list[Participant]:
        """Return clients in order, with budgets resolved, and matched where that is configured.

        Args:
            reports: What clients report before the round.
            state: The state that the round starts from.
        """
        ordered = sorted(reports, key=lambda r: r.client)
        full = [self.full_cost(r.examples, r.budget) for r in ordered]
        budgets = [r.budget for r in ordered]
        if self.config.match:
            share = self.config.match_share
            # Budgets may change: what clients could match in the first round may be too much later.
            within = state.round > 0
            budgets = matched(self.config.match, share, budgets, full, within)
        return [
            Participant(
                r.client,
                self.config.examples_of(r.examples),
                budget,
                budget.capacity(whole),
                self.cached(state, r.client),
                r.examples,
            )
            for r, budget, whole in zip(ordered, budgets, full, strict=True)
        ]

    def full_cost(self, examples: int, budget: Budget) -> Cost:
        """Return what training everything costs a client, with seconds on its machine's curve.

        Args:
            examples: That it has.
            budget: As it reported it.
        """
        return self._full_costs.setdefault(budget.curve, self.costs.on(budget.curve)).full_cost(
            examples
        )

    @cached_property
    def _full_costs(self) -> dict[MachineSpeed | None, CostModel]:
        """Cost models as configured, by curve."""
        return {}

    def seconds_here(self, state: State, assignments: Iterable[Assignment]) -> dict[int, float]:
        """Return how long clients are predicted to train on this machine, probes left out.

        Args:
            state: The state that the round starts from.
            assignments: Of clients that work.

        Returns:
            Client -> seconds; of nobody where the machine was not measured.
        """
        if (speed := self.components.local_speed) is None:
            return {}
        alike: dict[ExecutionPolicy, list[Assignment]] = {}
        for a in assignments:
            alike.setdefault(a.policy.priced, []).append(a)
        found: dict[int, float] = {}
        for policy, some in alike.items():
            costs = self.costs_of(state, policy, speed)
            operations = np.stack([a.schedule.operations for a in some])
            ranks = [
                costs.ranks(
                    a.schedule.operations[None],
                    None if a.schedule.ranks is None else a.schedule.ranks[None],
                )
                for a in some
            ]
            examples = np.array([a.examples or 0 for a in some])
            seconds = costs.round_seconds.of(operations, examples, np.concatenate(ranks))
            found |= dict(zip((a.client for a in some), seconds.tolist(), strict=True))
        return found

    def cached(self, state: State, client: int) -> np.ndarray | None:
        """Return the subnets whose fixed parameters a client has cached.

        Args:
            state: The state that knows what clients have.
            client: The client's number.

        Returns:
            bool [blocks, heads]; None where the model has no fixed parameters.
        """
        if not has_fixed(self.arch):
            return None
        nothing = np.zeros((self.arch.blocks, self.arch.heads), dtype=bool)
        return state.cached.get(client, nothing)
