"""A federation between rounds: what stays the same, and what one round hands to the next."""

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
from d2ft_fl.lora.config import merged
from d2ft_fl.planning.assignment import Participant
from d2ft_fl.planning.importance import ScoreBook
from d2ft_fl.planning.planner import Planner
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.strategies import Strategy
from d2ft_fl.rounds.tuning import Tuning
from d2ft_fl.subnets.architecture import Architecture, has_fixed
from d2ft_fl.wire.parameter_cache import Digests, digests


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
        digests: Names of fixed parameters; see :mod:`d2ft_fl.wire.parameter_cache`.
        figures: What the last round's folding, or a new beginning, has to report, by name.
        moments: Of the server's optimiser, by parameter.
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
    """What stays the same over rounds that train alike.

    Attributes:
        components: What the options of the run stand for.
        arch: The model, and what trains of it.
        own: The model itself; ``arch``, if not told.
    """

    components: Components
    arch: Architecture
    own: Architecture | None = None

    @property
    def config(self) -> RunConfig:
        """The options of the run."""
        return self.components.config

    def at(self, round_number: int) -> "Federation":
        """Return the federation of a round: the tuning says what trains in it."""
        own = self.own or self.arch
        arch = self.tuning.architecture(own, round_number)
        if arch is self.arch:
            return self
        return self._stages.setdefault(arch, Federation(self.components, arch, own))

    @cached_property
    def _stages(self) -> dict[Architecture, "Federation"]:
        return {}

    @property
    def tuning(self) -> Tuning:
        """What decides what trains of an assigned model, and how."""
        return self.components.tuning

    def prepared(self, state: State, original: Mapping[str, Tensor]) -> State:
        """Return the state that the next round starts from: factors begin, digests are made.

        Args:
            original: The weights that the run began with.
        """
        number = state.round + 1
        state = replace(state, figures={})
        weights, figures = self.tuning.prepare(state.weights, self.arch, number, original)
        if weights is not state.weights:  # a new beginning: nobody has anything of it
            state = State(number - 1, dict(weights), state.scores, state.means, state.last_trained)
            state = replace(state, figures=figures)
        if has_fixed(self.arch) and not state.digests:
            state = replace(state, digests=digests(self.arch, state.weights), cached={})
        return state

    def model_weights(self, state: State) -> Mapping[str, Tensor]:
        """Return the model's own weights, factors merged in."""
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
        costs = CostModel(self.arch, self.components.training, config.slots, config.device)
        return replace(costs, bits_up=config.upload_bits, bits_down=config.download_bits)

    def calibrates(self, round_number: int) -> bool:
        """Whether clients measure what subnets add on average in this round."""
        return (
            self.config.compensation and (round_number - 1) % max(1, self.config.score_every) == 0
        )

    def costs_of(self, state: State, policy: ExecutionPolicy = DEFAULT_POLICY) -> CostModel:
        """Return the cost model of the round after ``state`` under an execution policy."""
        compensated = state.means.known is not None
        return self.costs_when(compensated, self.calibrates(state.round + 1), policy)

    def costs_when(
        self, compensated: bool, calibrating: bool, policy: ExecutionPolicy = DEFAULT_POLICY
    ) -> CostModel:
        """Return the cost model of rounds in which this is so; see :meth:`costs_of`."""
        key = compensated, calibrating, policy.priced
        if key not in self._under:
            self._under[key] = self.cost_models[compensated, calibrating].under(policy.priced)
        return self._under[key]

    @cached_property
    def _under(self) -> dict[tuple[bool, bool, ExecutionPolicy], CostModel]:
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

    def planner_of(self, state: State, coupled: bool = True) -> Planner:
        """Return the planner of the round after ``state``; uncoupled, clients are planned alone."""
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
        """Return the planner of an execution policy, with other weights than configured."""
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
        return {}

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
                spread_clients=c.spread_clients * (c.sample_clients or c.clients),
                least_clients=c.least_clients,
                ranks=c.offered_ranks() if self.arch.rank else (),
                rank_exponent=c.lora_rank_exponent,
            )
            for key, costs in self.cost_models.items()
        }

    @cached_property
    def _uncoupled(self) -> dict[tuple[bool, bool], Planner]:
        if self.config.coupling != "spread":
            return self._planners
        return {key: replace(planner, coupling="none") for key, planner in self._planners.items()}

    @property
    def strategy(self) -> Strategy:
        """What decides which client runs what."""
        return self.components.strategy

    @property
    def keeps(self) -> tuple[str, ...]:
        """Of ``LIMITS``, the budgets that the strategy promises to keep."""
        return self.strategy.keeps

    def participants(self, reports: Iterable[Report], state: State) -> list[Participant]:
        """Clients in order, with their budgets resolved, and matched where that is configured."""
        ordered = sorted(reports, key=lambda r: r.client)
        full = [self.costs.full_cost(r.examples) for r in ordered]
        budgets = [r.budget for r in ordered]
        if self.config.match:
            share = self.config.match_share
            # A mean that clients had in the first round may be out of reach in a later one.
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

    def cached(self, state: State, client: int) -> np.ndarray | None:
        """Subnets whose fixed parameters a client has: bool [blocks, heads]; None if none are."""
        if not has_fixed(self.arch):
            return None
        nothing = np.zeros((self.arch.blocks, self.arch.heads), dtype=bool)
        return state.cached.get(client, nothing)
