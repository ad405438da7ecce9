"""Tables of a sweep: a row a trial, and what every setting comes to over its seeds."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.trials import Trial

SEED = "seed"
FIGURES = {"accuracy", "flops_share", "bytes_up_used", "bytes_down_used", "wall_seconds"}


def trial_rows(
    folder: SweepFolder, trials: Sequence[Trial], states: Mapping[str, State]
) -> list[dict[str, Any]]:
    """A row a trial: trial, status, reason, the options that vary, the figures of its summary.

    A trial that was stopped early has the figures of the rounds that it ran. A figure that has the
    name of an option that varies is left out, since it says the same.
    """
    rows = []
    for trial in trials:
        state = states[trial.id]
        row = {"trial": trial.id, "status": state.status, "reason": state.reason}
        row |= trial.settings
        figures: dict[str, Any] = {}
        if state.status == "finished":
            figures = _summary(folder.trial(trial.id))
        elif state.status == "stopped":
            figures = _so_far(folder.rows(trial.id))
        rows.append(row | {key: v for key, v in figures.items() if key not in row})
    return rows


def _summary(folder: Path) -> dict[str, Any]:
    """The figures of a run's summary: ``flops_used`` for what is ``resources.flops.used`` there."""
    summary: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = json.loads(folder.joinpath("summary.json").read_text())
    resources = summary.pop("resources", {})
    summary.pop("folder", None)
    for name, figures in resources.items():
        # FLOPs of long runs are beyond the integers of parquet.
        summary |= {f"{name}_{k}": None if v is None else float(v) for k, v in figures.items()}
    return {key: v for key, v in summary.items() if not isinstance(v, dict | list)}


def _so_far(rows: list[dict[str, Any]]) -> dict[str, Any]:
    evaluated = [row for row in rows if row["accuracy"] is not None]
    if not evaluated:
        return {}
    return {
        "rounds": len(rows),
        "accuracy": evaluated[-1]["accuracy"],
        "best_accuracy": max(row["accuracy"] for row in evaluated),
        "loss": evaluated[-1]["loss"],
        "wall_seconds": sum(row["wall_seconds"] for row in rows),
    }


def write_tables(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``results.parquet`` and ``results.csv``."""
    import pandas as pd

    table = pd.DataFrame(rows)
    for name, write in (("results.parquet", table.to_parquet), ("results.csv", table.to_csv)):
        part = folder / f"{name}.part"
        write(part, index=False)
        part.replace(folder / name)


@dataclass(frozen=True)
class Setting:
    """Trials that differ in nothing but their seed.

    Attributes:
        settings: The options that vary, but for the seed.
        trials, finished: How many there are, and how many ran all their rounds: the others count
            in no mean.
        stopped: How many were stopped early; then the mean is of the better seeds.
        accuracy: Mean accuracy after the last round.
        deviation: Its standard deviation over seeds (n - 1); None for a single one.
        flops_share: Mean share of the FLOPs of training everything.
        megabytes: Mean bytes up and down, of all clients and rounds.
        seconds: Mean time that a trial took.
    """

    settings: dict[str, Any]
    trials: int
    finished: int
    stopped: int = 0
    accuracy: float | None = None
    deviation: float | None = None
    flops_share: float | None = None
    megabytes: float | None = None
    seconds: float | None = None


def by_setting(rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[Setting]:
    """What every setting comes to; the most accurate first.

    Then those of which trials were stopped early, and those without a result.
    """
    keys = [key for key in varied if key != SEED]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = [_setting(dict(zip(keys, k, strict=True)), group) for k, group in groups.items()]
    return sorted(found, key=lambda s: (s.accuracy is None, s.stopped > 0, -(s.accuracy or 0)))


def _setting(settings: dict[str, Any], rows: list[Mapping[str, Any]]) -> Setting:
    done = [row for row in rows if row["status"] == "finished" and row.keys() >= FIGURES]
    stopped = sum(row["status"] == "stopped" for row in rows)
    if not done:
        return Setting(settings, len(rows), 0, stopped)
    accuracy = np.array([row["accuracy"] for row in done])
    return Setting(
        settings,
        len(rows),
        len(done),
        stopped,
        accuracy=float(accuracy.mean()),
        deviation=float(accuracy.std(ddof=1)) if len(done) > 1 else None,
        flops_share=float(np.mean([row["flops_share"] for row in done])),
        megabytes=float(np.mean([row["bytes_up_used"] + row["bytes_down_used"] for row in done]))
        / 1e6,
        seconds=float(np.mean([row["wall_seconds"] for row in done])),
    )
