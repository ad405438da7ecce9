"""The line of ``rounds.jsonl`` that says what became of a round."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2ft_fl.budgets.budget import UNLIMITED
from d2ft_fl.costs.resources import RESOURCES, workload_variance
from d2ft_fl.planning.importance import subnet_scores
from d2ft_fl.planning.utility import Utility
from d2ft_fl.records.client_record import ClientRecord
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.tasks.metrics import MetricSpec


def round_line(
    federation: Federation,
    state: State,
    plan: Plan,
    records: Sequence[ClientRecord],
    figures: Mapping[str, float] | None,
    wall_seconds: float,
) -> dict[str, Any]:
    """Describe a finished round as JSON.

    Args:
        federation: The federation in this round.
        state: The state that the round ended with.
        plan: The plan that clients followed.
        records: What became of each client.
        figures: The task's figures of the global model; None where it was not evaluated.
        wall_seconds: Time that the round took here.
    """
    worked = [r for r in records if r.used is not None]
    metrics = MetricSpec.of(federation.components.task)
    return {
        "round": state.round,
        **metrics.entries(figures),
        "train_loss": _train_loss(worked),
        **_resources(federation, plan, worked),
        **_coverage(state, plan),
        "workload_variance": workload_variance([r.used.flops for r in worked if r.used]),
        "clients_per_subnet": float(plan.trained.mean()),
        "trained": plan.trained.tolist(),
        "round_seconds": max((r.seconds for r in records), default=0.0),
        "wall_seconds": wall_seconds,
        "plan_seconds": plan.seconds,
        "utility": _utility(federation, state, plan),
        "clients": len(records),
        "worked": len(worked),
        "sat_out": sum(r.sat_out for r in records),
        "scored": sum(r.scored > 0 for r in worked),
        "faults": [f"client {r.client}: {r.failure}" for r in records if r.failure],
        "violations": _violations(worked),
        "flops_as_predicted": sum(r.predicted.flops == r.used.flops for r in worked if r.used),
        **state.figures,
    }


def planned_line(
    federation: Federation,
    state: State,
    plan: Plan,
    records: Sequence[ClientRecord],
    figures: Mapping[str, float] | None,
    rate: float,
) -> dict[str, Any]:
    """Describe a round with noise by nothing that clients sent, and not by who was drawn.

    The line says ``planned``. Amounts of all clients together, and how many take part, are expected
    ones: those of all clients' plans times the chance of a draw.

    Args:
        federation: The federation in this round.
        state: The state that the round ended with; its weights have noise.
        plan: The plan of all clients, drawn or not.
        records: What each client would use by this plan.
        figures: The task's figures of the global model; None where it was not evaluated.
        rate: The chance that a client is drawn.
    """
    line = round_line(federation, state, plan, records, figures, 0.0)
    expected = {key: rate * line[key] for key in ("clients", "worked", "sat_out")}
    for resource in RESOURCES:
        line[resource]["full_total"] *= rate
    unknown = dict.fromkeys(("train_loss", "wall_seconds", "flops_as_predicted"))
    return {**line, **expected, **unknown, "planned": True}


def _train_loss(worked: Sequence[ClientRecord]) -> float:
    """Return the mean training loss over all examples of the clients that trained."""
    losses = [(r.train_loss, r.examples) for r in worked if r.train_loss is not None]
    return sum(x * n for x, n in losses) / max(1, sum(n for _, n in losses))


def _coverage(state: State, plan: Plan) -> dict[str, Any]:
    """Return the share of subnets trained now and so far, and the longest time without training."""
    last = state.last_trained
    return {
        "coverage": float((plan.trained > 0).mean()),
        "covered_so_far": float((last > 0).mean()),
        "longest_untrained": int((state.round - last).max()),
    }


def _resources(
    federation: Federation, plan: Plan, worked: Sequence[ClientRecord]
) -> dict[str, dict[str, Any]]:
    """Return by resource what was used, what budgets allow, and what full fine-tuning would use."""
    full = {c.client: federation.costs.full_cost(c.local) for c in plan.clients}
    out = {}
    for index, resource in enumerate(RESOURCES):
        of_worked = [getattr(full[r.client], resource) for r in worked]
        out[resource] = _used(index, resource, worked) | {
            "allowed_share": _allowed_share(index, worked, of_worked),
            "full_mean": float(np.mean(of_worked)) if worked else 0.0,
            "full_total": sum(getattr(c, resource) for c in full.values()),
        }
    return out


def _used(index: int, name: str, worked: Sequence[ClientRecord]) -> dict[str, Any]:
    """Return means over the clients that worked, and the largest used share of a budget."""
    used = [getattr(r.used, name) for r in worked]
    limited = [
        (u, int(r.allowed[index]))
        for u, r in zip(used, worked, strict=True)
        if r.allowed[index] < UNLIMITED
    ]
    return {
        "used_mean": float(np.mean(used)) if used else 0.0,
        "allowed_mean": float(np.mean([a for _, a in limited])) if limited else None,
        "worst": max((u / max(1, a) for u, a in limited), default=None),
    }


def _allowed_share(index: int, worked: Sequence[ClientRecord], full: Sequence[int]) -> float | None:
    """Return what budgets allow of full fine-tuning's use, at most 1; None without a budget."""
    if all(r.allowed[index] >= UNLIMITED for r in worked):
        return None
    allowed = sum(min(int(r.allowed[index]), f) for r, f in zip(worked, full, strict=True))
    return allowed / max(1, sum(full))


def _utility(federation: Federation, state: State, plan: Plan) -> float:
    """Return the plan's utility, by the scores that are known after the round."""
    known = subnet_scores("fisher", federation.model_arch, {}, state.scores)
    config = federation.config
    return plan.utility(Utility(known, known), config.upload_bits, config.download_bits)


def _violations(worked: Sequence[ClientRecord]) -> list[str]:
    """Name every budget that a client's measured use is above."""
    out = []
    for r in worked:
        assert r.used is not None
        for name, used, allowed in zip(RESOURCES, r.used.vector(), r.allowed, strict=True):
            if used > allowed:
                out.append(f"client {r.client}: {name} {used} of {allowed}")
        if r.deadline is not None and r.seconds > r.deadline:
            out.append(f"client {r.client}: {r.seconds:.3g} s of {r.deadline:.3g} s")
    return out
