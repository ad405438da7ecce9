"""Tables of a sweep: a row for each trial, and means of each setting over its seeds."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.records.metrics import metric_totals, primary_of
from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.trials import Trial
from d2ft_fl.tasks.metrics import MetricSpec

SEED = "seed"
FIGURES = {"flops_share", "bytes_up_used", "bytes_down_used", "wall_seconds"}


def trial_rows(
    folder: SweepFolder, trials: Sequence[Trial], states: Mapping[str, State]
) -> list[dict[str, Any]]:
    """Make a row for each trial: id, status, reason, options that vary, figures of its summary.

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
    """Return the figures of a run's summary, ``resources.flops.used`` as ``flops_used``."""
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
    """Return the figures that a trial without a summary has reached."""
    if all(primary_of(row) is None for row in rows):
        return {}
    metrics = {k: v for k, v in metric_totals(rows).items() if not isinstance(v, dict)}
    return {
        "rounds": len(rows),
        **metrics,
        "wall_seconds": sum(row["wall_seconds"] or 0.0 for row in rows),
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
        trials: Number of trials.
        finished: Number of trials that ran all their rounds; the others count in no mean.
        stopped: Number of trials that were stopped early; then means are of the better seeds.
        mean: Mean primary metric after the last round; None without a finished trial.
        deviation: Standard deviation of the primary metric over seeds (n - 1); None for one seed.
        flops_share: Mean share of the FLOPs of training everything.
        megabytes: Mean bytes up and down of all clients and rounds, in MB.
        seconds: Mean time that a trial took.
    """

    settings: dict[str, Any]
    trials: int
    finished: int
    stopped: int = 0
    mean: float | None = None
    deviation: float | None = None
    flops_share: float | None = None
    megabytes: float | None = None
    seconds: float | None = None

    def to_json(self, metrics: MetricSpec) -> dict[str, Any]:
        """Return the setting as JSON, its mean under the name of the primary metric too."""
        return asdict(self) | {metrics.primary: self.mean}


def by_setting(
    rows: Sequence[Mapping[str, Any]], varied: Sequence[str], metrics: MetricSpec
) -> list[Setting]:
    """Average the trials of each setting; the settings with the best primary metric come first.

    Settings of which trials were stopped early come behind, and those without a result last.

    Args:
        rows: A row for each trial, see :func:`trial_rows`.
        varied: The options that vary.
        metrics: What trials are compared by.
    """
    keys = [key for key in varied if key != SEED]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    settings = [
        _setting(dict(zip(keys, values, strict=True)), group, metrics.primary)
        for values, group in groups.items()
    ]

    def place(s: Setting) -> tuple[bool, bool, float]:
        return s.mean is None, s.stopped > 0, 0.0 if s.mean is None else metrics.order(s.mean)

    return sorted(settings, key=place)


def _setting(settings: dict[str, Any], rows: list[Mapping[str, Any]], primary: str) -> Setting:
    needed = FIGURES | {primary}
    done = [row for row in rows if row["status"] == "finished" and row.keys() >= needed]
    stopped = sum(row["status"] == "stopped" for row in rows)
    if not done:
        return Setting(settings, len(rows), 0, stopped)
    values = np.array([row[primary] for row in done])
    return Setting(
        settings,
        len(rows),
        len(done),
        stopped,
        mean=float(values.mean()),
        deviation=float(values.std(ddof=1)) if len(done) > 1 else None,
        flops_share=float(np.mean([row["flops_share"] for row in done])),
        megabytes=float(np.mean([row["bytes_up_used"] + row["bytes_down_used"] for row in done]))
        / 1e6,
        seconds=float(np.mean([row["wall_seconds"] for row in done])),
    )
