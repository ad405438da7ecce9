"""Metrics in the lines of ``rounds.jsonl``, of today's runs and of older ones."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from d2ft_fl.tasks.metrics import MetricSpec


@cache
def _first() -> MetricSpec:
    """Return what runs were measured by that did not write it into their lines."""
    from d2ft_fl.tasks.image_classification import ImageClassification  # needs torch

    return MetricSpec.of(ImageClassification())


def with_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of ``rounds.jsonl`` with ``metrics`` and ``task``, whenever it was written.

    Runs that did not write these two keys were of image classification, and wrote its metrics under
    their names alone.
    """
    if "metrics" in line:
        return dict(line)
    values = {name: line.get(name) for name in _first().names}
    return {**line, **_first().entries(values)}


def primary_of(line: Mapping[str, Any]) -> float | None:
    """Return the primary metric of a line of ``rounds.jsonl``; None where it was not evaluated."""
    return line["metrics"][line["task"]["primary"]]


def metric_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last metrics and the best of the primary one, as JSON.

    Beside ``metrics`` and ``best``, each stands alone under its own name and ``best_`` with the
    name of the primary metric.
    """
    spec = MetricSpec.from_entries(rows[-1])
    evaluated = [row["metrics"] for row in rows if primary_of(row) is not None]
    best = spec.best(metrics[spec.primary] for metrics in evaluated)
    entries = spec.entries(evaluated[-1] if evaluated else None)
    return {**entries, "best": best, f"best_{spec.primary}": best}
