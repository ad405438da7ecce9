"""The totals of a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.records.metrics import metric_totals
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Federation


def summarise(
    rows: list[dict[str, Any]], federation: Federation, folder: Path, wall_seconds: float
) -> dict[str, Any]:
    """Return what ``summary.json`` holds."""
    return {
        "strategy": federation.config.strategy,
        "keeps_budgets": federation.strategy.keeps_budgets,
        "keeps": list(federation.keeps),
        "scores": list(federation.components.measured_scores),
        "seed": federation.config.seed,
        **totals(rows),
        "wall_seconds": wall_seconds,
        "verified": federation.config.verify_costs,
        "privacy": _privacy(federation.components, rows),
        "folder": str(folder),
    }


def _privacy(components: Components, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what differential privacy promises clients; None where there is none."""
    privacy = components.privacy
    if privacy is None:
        return None
    return {
        "epsilon": rows[-1]["epsilon"],
        "delta": privacy.delta,
        "noise_multiplier": privacy.noise,
        "clip_norm": privacy.clip,
        "sampling_rate": privacy.rate,
        "secret": components.config.noise_seed < 0,
    }


def is_planned(row: Mapping[str, Any]) -> bool:
    """Tell whether a line of ``rounds.jsonl`` says what was planned, not what clients did."""
    return bool(row.get("planned"))


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over rounds, beside what full fine-tuning of the same clients would have cost.

    Metrics are those of the last round that was evaluated, None where none was; the best of the
    primary metric is over all rounds.

    Of lines that say what was planned, faults and FLOPs as predicted are None.

    Args:
        rows: Lines of ``rounds.jsonl``, one at least, as :func:`read_rows` returns them.
    """
    planned = is_planned(rows[-1])
    resources = {}
    for name in RESOURCES:
        spent = sum(row[name]["used_mean"] * row["worked"] for row in rows)
        whole = sum(row[name]["full_total"] for row in rows)
        if name == "memory":  # a peak: the mean client's, not a sum over rounds
            spent /= max(1, sum(row["worked"] for row in rows))
            whole /= sum(row["clients"] for row in rows)
        worst = [row[name]["worst"] for row in rows if row[name]["worst"] is not None]
        resources[name] = {
            "used": spent,
            "full": whole,
            "share": spent / whole,
            "worst": max(worst, default=None),
        }
    return {
        "rounds": len(rows),
        **metric_totals(rows),
        "resources": resources,
        "round_seconds": sum(row["round_seconds"] for row in rows),
        "coverage": rows[-1]["covered_so_far"],
        "workload_variance": float(np.mean([row["workload_variance"] for row in rows])),
        "plan_seconds": sum(row["plan_seconds"] for row in rows),
        "violations": sum(len(row["violations"]) for row in rows),
        "faults": None if planned else sum(len(row["faults"]) for row in rows),
        "sat_out": sum(row["sat_out"] for row in rows),
        "scored": sum(row.get("scored", 0) for row in rows),
        "flops_as_predicted": (None if planned else sum(row["flops_as_predicted"] for row in rows)),
        "client_rounds": sum(row["worked"] for row in rows),
        "aggregation_error": _mean([row.get("aggregation_error") for row in rows]),
        "too_few_trainers": _mean([row.get("too_few_trainers") for row in rows]),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
