"""What a federation would do, without training: the plans of the first rounds, and what they cost.

Everything that decides a plan is built as a run builds it: model, weights, budgets, scores. Rounds
follow each other as if every client answered. Nothing is trained, so weights stay, and scores that
clients would measure stay at their prior, which falls with depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from d2ft_fl.aggregation.mean_compensation import MeanBook
from d2ft_fl.budgets.budget import DEADLINE, LIMITS, UNLIMITED, ClientDescription
from d2ft_fl.budgets.process_memory import resident
from d2ft_fl.budgets.sources import MEASURED, BudgetSource
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.resources import RESOURCES, Cost, workload_variance
from d2ft_fl.data.federated_data import open_data
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.report.format import UNNAMED, quantity
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import plan_round
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.rounds.plan import Plan, cached_after
from d2ft_fl.subnets.schedule import Operation, Schedule

NONE = "none"


@dataclass(frozen=True)
class ClientPreview:
    """One client in one round.

    Attributes:
        client: Its number. device: The name of its budget.
        examples: That it trains on. local: That it has.
        policy: How it runs the schedule.
        operations: Subnets by operation, the mean over slots; adds up to all subnets.
        trained_layers: Layers of which every subnet is FULL in some slot.
        rank: Mean over the trained subnets of the ranks they train at; ``None`` where only one rank
            is offered, or nothing trains.
        cost: Predicted, the scoring pass included. full: Of fully fine-tuning on its data.
        shares: Used share of each budget that it has, of ``LIMITS``.
        seconds: Simulated seconds of the round.
        binding: Of the budgets that do not afford full fine-tuning, the one with the highest used
            share, or where the client sits out, the one that allows the least; ``none`` where
            everything is FULL and allowed, or nothing is limited.
        gap: See :class:`d2ft_fl.planning.assignment.Assignment`.
        scored: Examples of its scoring pass. viewed: Among which it selects what to train on.
        sits_out: Whether it does nothing.
    """

    client: int
    device: str
    examples: int
    local: int
    policy: ExecutionPolicy
    operations: dict[str, float]
    trained_layers: int
    rank: float | None
    cost: Cost
    full: Cost
    shares: dict[str, float]
    seconds: float
    binding: str
    gap: float | None
    scored: int
    viewed: int
    sits_out: bool

    @classmethod
    def of(cls, who: Participant, a: Assignment, full: Cost) -> "ClientPreview":
        """From a client, what it is assigned, and the cost of fully fine-tuning on its data."""
        slots = len(a.schedule.operations)
        counts = np.bincount(a.schedule.operations.ravel(), minlength=len(Operation)) / slots
        seconds = 0.0 if a.schedule.sits_out else who.budget.seconds(a.cost)
        used = _shares(who, a.cost, seconds)
        wanted = _shares(who, full, who.budget.seconds(full))
        return cls(
            client=who.client,
            device=who.budget.device or UNNAMED,
            examples=who.examples if a.examples is None else a.examples,
            local=who.local,
            policy=a.policy,
            operations={op.name.lower(): float(counts[op]) for op in Operation},
            trained_layers=int(a.schedule.trained.all(axis=1).sum()),
            rank=a.schedule.mean_rank(),
            cost=a.cost,
            full=full,
            shares=used,
            seconds=seconds,
            binding=_binding(used, wanted, a.schedule),
            gap=a.gap,
            scored=a.probes.scored,
            viewed=a.probes.viewed,
            sits_out=a.schedule.sits_out,
        )

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def _shares(who: Participant, cost: Cost, seconds: float) -> dict[str, float]:
    """Return what share a cost is of each budget that a client has."""
    allowed = dict(zip(RESOURCES, who.capacity.tolist(), strict=True))
    out = {r: getattr(cost, r) / max(1, a) for r, a in allowed.items() if a < UNLIMITED}
    if who.budget.deadline is not None:
        out[DEADLINE] = seconds / who.budget.deadline
    return out


def _binding(used: dict[str, float], wanted: dict[str, float], schedule: Schedule) -> str:
    """Return the budget that a client's work comes up against, ``none`` where there is none."""
    everything = (schedule.operations == Operation.FULL).all()
    if schedule.ranks is not None:  # a smaller rank may be what fits
        everything = everything and max(wanted.values(), default=0) <= 1
    if everything and max(used.values(), default=0) <= 1:
        return NONE
    tight = [limit for limit in used if wanted[limit] > 1] or list(used)
    shares = wanted if schedule.sits_out else used
    return max(tight, key=shares.__getitem__, default=NONE)


@dataclass(frozen=True, eq=False)
class RoundPreview:
    """One round.

    Attributes:
        round: Counted from 1.
        clients: In order.
        trained: int64 [blocks, heads], how many clients train each subnet.
        plan_seconds: Wall time of planning.
    """

    round: int
    clients: list[ClientPreview]
    trained: np.ndarray
    plan_seconds: float

    @property
    def working(self) -> list[ClientPreview]:
        """Those who do not sit out."""
        return [c for c in self.clients if not c.sits_out]

    @property
    def coverage(self) -> float:
        """Share of subnets that somebody trains."""
        return float((self.trained > 0).mean())

    @property
    def short_subnets(self) -> int:
        """How many subnets nobody trains."""
        return int((self.trained == 0).sum())

    @property
    def workload_variance(self) -> float:
        """Of the working clients; see :func:`d2ft_fl.costs.resources.workload_variance`."""
        return workload_variance([c.cost.flops for c in self.working])

    @property
    def round_seconds(self) -> float:
        """Simulated seconds until the slowest client is done."""
        return max((c.seconds for c in self.clients), default=0.0)

    @property
    def gaps(self) -> list[float]:
        """Certified gaps, of working clients that have one."""
        return [c.gap for c in self.working if c.gap is not None]

    def classes(self) -> dict[str, list[ClientPreview]]:
        """Clients by device, in the order in which devices first come."""
        found: dict[str, list[ClientPreview]] = {}
        for client in self.clients:
            found.setdefault(client.device, []).append(client)
        return found

    def share_of_full(self, resource: str) -> float:
        """Return what all clients use of a resource, as a share of full fine-tuning by all."""
        used, full = ([getattr(c, kind) for c in self.clients] for kind in ("cost", "full"))
        return sum(getattr(c, resource) for c in used) / sum(getattr(c, resource) for c in full)

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return {
            "round": self.round,
            "clients": [c.to_json() for c in self.clients],
            "trained": self.trained.tolist(),
            "coverage": self.coverage,
            "short_subnets": self.short_subnets,
            "workload_variance": self.workload_variance,
            "round_seconds": self.round_seconds,
            "plan_seconds": self.plan_seconds,
            "gap_mean": float(np.mean(self.gaps)) if self.gaps else None,
            "gap_worst": max(self.gaps, default=None),
        }


@dataclass(frozen=True, eq=False)
class Preview:
    """Some rounds of a federation, planned.

    Attributes:
        config: What was planned.
        blocks: How many blocks the model has.
        heads: How many heads a block has.
        rounds: In order.
        notes: What the reader has to know of them, a sentence each.
        worker_memory: Bytes that a worker process takes before any model, where that is known.
    """

    config: RunConfig
    blocks: int
    heads: int
    rounds: list[RoundPreview]
    notes: list[str]
    worker_memory: int | None = None

    @property
    def subnets(self) -> int:
        """How many subnets the model has."""
        return self.blocks * self.heads

    @cached_property
    def covered_over_rounds(self) -> np.ndarray:
        """In how many of the rounds somebody trains each subnet: int64 [blocks, heads]."""
        return np.stack([r.trained > 0 for r in self.rounds]).sum(axis=0, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return {
            "rounds": [r.to_json() for r in self.rounds],
            "covered_over_rounds": self.covered_over_rounds.tolist(),
            "subnets": self.subnets,
            "blocks": self.blocks,
            "heads": self.heads,
            "notes": self.notes,
            "worker_memory": self.worker_memory,
        }


def preview(
    config: RunConfig,
    examples: int | None = None,
    rounds: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    worker_memory: int | None = None,
) -> Preview:
    """Plan the first rounds of a run.

    Args:
        config: Its options checked (see :func:`.checked_options`).
        examples: What every client has; ``None`` shares the configuration's data out. Where given,
            no more than the number of classes is asked of the data.
        rounds: How many.
        progress: Called with the number of rounds planned, 0 once everything is loaded.
        worker_memory: Bytes that a worker process takes before any model, where that is known.

    Raises:
        ConfigError: When model, data or budgets do not fit.
        RunError: When the strategy fails.
    """
    for option, value in (("--examples", examples), ("--rounds", rounds)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} must be 1 or more")
    components = Components(config)
    adapter = build_adapter(components.model_spec)
    arch = adapter.describe()
    notes = list(adapter.notes)
    if examples is None:
        data = open_data(components.data_spec(adapter.input_shape))
        sizes, notes = [len(part) for part in data.partitions], notes + data.notes
    else:
        sizes = [examples] * config.clients
    federation = Federation(components, arch)
    original = {n: p.detach() for n, p in adapter.model.named_parameters()}
    state = State(0, original)
    source = components.budget_source
    reports: list[Report] = []
    told = worker_memory or resident()
    found: list[RoundPreview] = []
    for number in range(1, rounds + 1):
        progress(number - 1)
        if not reports or source.varies:
            reports = _reports(source, sizes, number)
            if config.budgets == MEASURED:  # of this machine; the rest say what processes take
                reports = [replace(r, budget=r.budget.on(config.device, told)) for r in reports]
        stage = federation.at(number)
        state = stage.prepared(state, original)
        plan = plan_round(stage, state, reports)
        found.append(_round(stage, plan))
        state = follow(stage, state, plan)
    progress(rounds)
    notes += _notes(federation, found, reports, worker_memory)
    return Preview(config, arch.blocks, arch.heads, found, notes, worker_memory)


def _reports(source: BudgetSource, sizes: Sequence[int], round_number: int) -> list[Report]:
    return [
        Report(client, size, source(ClientDescription(client, size, len(sizes)), round_number))
        for client, size in enumerate(sizes)
    ]


def _round(federation: Federation, plan: Plan) -> RoundPreview:
    full = {n: federation.costs.full_cost(n) for n in {c.local for c in plan.clients}}
    clients = [
        ClientPreview.of(c, a, full[c.local])
        for c, a in zip(plan.clients, plan.assignments, strict=True)
    ]
    return RoundPreview(plan.round, clients, plan.trained, plan.seconds)


def follow(federation: Federation, state: State, plan: Plan) -> State:
    """Return the state after a round that everyone answered, as far as plans depend on it."""
    trained = plan.trained > 0
    last = np.where(trained, plan.round, state.last_trained)
    means = state.means
    if federation.calibrates(plan.round) and plan.working:  # from then on shortcuts cost their mean
        means = MeanBook(known=np.zeros(trained.shape, dtype=bool))
    everyone = {c.client for c in plan.clients}
    stacks = bool(federation.arch.rank) and federation.config.lora_aggregation == "stack"
    changed = trained & stacks  # what is merged into a weight changes it
    cached = cached_after(federation.arch, state, plan, everyone, changed)
    return replace(state, round=plan.round, means=means, last_trained=last, cached=cached)


def _notes(
    federation: Federation,
    rounds: list[RoundPreview],
    reports: list[Report],
    worker_memory: int | None,
) -> list[str]:
    config, out = federation.config, []
    if worker_memory is not None:
        out.append(
            f"a worker process takes {quantity(worker_memory, 'B')} before any model; memory here "
            "is of tensors, beside that"
        )
    processes = [r.budget for r in reports if r.budget.of_process]
    if processes:
        bases = [b.memory_base or 0.0 for b in processes]
        least, most = quantity(min(bases), "B"), quantity(max(bases), "B")
        taken = least if least == most else f"{least} to {most}"
        out.append(
            f"{len(processes)} of {len(reports)} clients have a memory budget of their process, of "
            f"which {taken} are taken off for what it holds beside tensors"
        )
    if measured := federation.components.measured_scores:
        out.append(
            f"{' and '.join(measured)} scores are measured in a run; here they stay at their "
            "prior, which falls with depth"
        )
    if lost := [limit for limit in LIMITS if limit not in federation.keeps]:
        out.append(f"strategy {config.strategy!r} does not look at budgets of {', '.join(lost)}")
    if not rounds[0].working:
        out.append(
            "every client sits out round 1, so a run would stop: raise the budgets "
            f"({config.budgets!r}) or take a smaller model or batch-size"
        )
    return out
