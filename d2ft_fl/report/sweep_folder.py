"""A sweep's folder, read: its trials, and the settings that repeat over seeds."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.config.renamed import renamed
from d2ft_fl.errors import ConfigError
from d2ft_fl.report.reading import damaged, read_json
from d2ft_fl.report.run_folder import RunFolder
from d2ft_fl.report.statistics import Interval, differences
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.util.strict_json import write_json

TRIALS = "trials.json"
SEED = "seed"
STRATEGY = "strategy"
FINISHED, STOPPED = "finished", "stopped"
DAMAGED = "damaged"  # what no sweep writes: a trial whose folder cannot be read


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a sweep.

    Attributes:
        name: Name of its folder.
        settings: What it varies, by key.
        status: How it stands, as ``trials.json`` has it.
        reason: Of a trial that failed, was refused, or was stopped early.
        run: What it left behind; None before its first finished round.
    """

    name: str
    settings: dict[str, Any]
    status: str
    reason: str
    run: RunFolder | None

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.status == FINISHED and self.run is not None

    @property
    def setting(self) -> str:
        """Its settings but the seed, as JSON."""
        return write_json({k: v for k, v in self.settings.items() if k != SEED}, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Setting:
    """Trials that differ in nothing but the seed.

    Attributes:
        number: Counted from 1.
        values: Its values by varied key, the seed left out.
        label: Names it beside other settings.
        trials: Its trials, one for each seed.
    """

    number: int
    values: dict[str, Any]
    label: str
    trials: list[Trial]

    @property
    def finished(self) -> list[RunFolder]:
        """The runs that count for its means."""
        return [t.run for t in self.trials if t.finished and t.run]

    @property
    def shown(self) -> list[RunFolder]:
        """The runs whose rounds are drawn: finished ones, or without them all that have rounds."""
        return self.finished or [t.run for t in self.trials if t.run]

    def figure(self, *path: str) -> Interval:
        """Return the mean of a figure over finished runs.

        Args:
            path: Keys that lead to it in :func:`d2ft_fl.records.summary.totals`.
        """
        return Interval.of([_at(run.totals, path) for run in self.finished])

    def metric(self, name: str) -> Interval:
        """Return the mean of a metric after the last round, over finished runs."""
        return self.figure("metrics", name)

    @property
    def selected(self) -> bool:
        """Whether trials were stopped early: those that were not are the better ones."""
        return self.count(STOPPED) > 0

    def count(self, status: str) -> int:
        """Count the trials with a status."""
        return sum(t.status == status for t in self.trials)


def _at(entries: Any, path: tuple[str, ...]) -> float:
    for key in path:
        entries = entries[key]
    return math.nan if entries is None else float(entries)


@dataclass(frozen=True)
class Paired:
    """A mean difference, over seeds, and over how many pairs of trials in all."""

    difference: Interval
    pairs: int


@dataclass(frozen=True, eq=False)
class SweepFolder:
    """What a sweep left behind, or what there is of it so far."""

    folder: Path
    trials: list[Trial]

    @classmethod
    def read(cls, folder: Path) -> "SweepFolder":
        """Read a sweep's folder.

        Raises:
            ConfigError: When it is none or is damaged.
        """
        path = folder / TRIALS
        try:
            trials = [_trial(folder, entry) for entry in read_json(path, list)]
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(path, f"lacks something a trial has ({error})") from None
        return cls(folder, trials)

    @cached_property
    def spec(self) -> MetricSpec:
        """What the task of the sweep is measured by.

        Raises:
            ConfigError: When no trial has a finished round.
        """
        for trial in self.trials:
            if trial.run:
                return trial.run.spec
        raise ConfigError(
            f"no trial of the sweep in {str(self.folder)!r} has a finished round yet; there is "
            "nothing to show"
        )

    @cached_property
    def keys(self) -> list[str]:
        """What varies, the seed left out."""
        return [k for k in dict.fromkeys(k for t in self.trials for k in t.settings) if k != SEED]

    @cached_property
    def settings(self) -> list[Setting]:
        """In the order in which they first come."""
        by_setting: dict[str, list[Trial]] = {}
        for trial in self.trials:
            by_setting.setdefault(trial.setting, []).append(trial)
        out = []
        for number, trials in enumerate(by_setting.values(), 1):
            values = {k: v for k, v in trials[0].settings.items() if k != SEED}
            out.append(Setting(number, values, self.label(values), trials))
        return out

    def label(self, values: dict[str, Any], without: str = "") -> str:
        """Name values in a few words.

        What most settings have goes without saying, but for the strategy, and words stand alone
        where no other key has the same.
        """
        parts = [
            self._part(key, value)
            for key, value in values.items()
            if key != without and (key == STRATEGY or not self._usual(key, value))
        ]
        others = any(key != without for key in self.several)
        return ", ".join(parts) or ("as most" if others else "all trials")

    def _part(self, key: str, value: Any) -> str:
        if value in ("", None):
            return f"no {key}"
        word = self.word(key, value)
        return word if self._alone(key, value) else f"{key} {word}"

    def _usual(self, key: str, value: Any) -> bool:
        having, settings = self._having
        return 2 * having[key, value] > settings

    @cached_property
    def _having(self) -> tuple[Counter[tuple[str, Any]], int]:
        """How many settings have a value of a key, and how many there are."""
        settings_of = {t.setting: t.settings for t in self.trials}
        pairs = (pair for settings in settings_of.values() for pair in settings.items())
        return Counter(pairs), len(settings_of)

    def _alone(self, key: str, value: Any) -> bool:
        others = (v for other, values in self.values.items() if other != key for v in values)
        return isinstance(value, str) and value != "" and value not in others

    def word(self, key: str, value: Any) -> str:
        """Write a value as it stands in a sentence; of a path its name, where that is unique."""
        if not isinstance(value, str) or not value:
            return spelled(value)
        names = [Path(v).name for v in self.values[key] if isinstance(v, str)]
        name = Path(value).name
        return name if Path(value).is_absolute() and names.count(name) == 1 else value

    @cached_property
    def values(self) -> dict[str, list[Any]]:
        """By varied key, its different values in the order in which they first come."""
        return {
            key: list(dict.fromkeys(t.settings[key] for t in self.trials if key in t.settings))
            for key in self.keys
        }

    @property
    def several(self) -> list[str]:
        """Keys with two or more different values."""
        return [key for key, values in self.values.items() if len(values) > 1]

    @property
    def numeric_keys(self) -> list[str]:
        """Of several values, keys whose values are all numbers."""
        return [key for key in self.several if all(map(_is_number, self.values[key]))]

    @property
    def word_keys(self) -> list[str]:
        """Of several values, the other keys."""
        return [key for key in self.several if key not in self.numeric_keys]

    def ranked(self) -> list[Setting]:
        """Return the settings with rounds to draw, the best final primary metric first.

        Settings of which some trials were stopped early come behind, and those without a finished
        trial last.
        """
        shown = [s for s in self.settings if s.shown]

        def place(setting: Setting) -> tuple[bool, bool, float]:
            mean = setting.metric(self.spec.primary).mean
            unknown = math.isnan(mean)
            return unknown, setting.selected, 0.0 if unknown else self.spec.order(mean)

        return sorted(shown, key=place)

    def best_first(self, key: str) -> list[Any]:
        """Order the values of a key by the final primary metric, the best first.

        It is the mean over all finished trials that have the value; values without one are left
        out, and so are settings of which trials were stopped early.
        """
        primary = self.spec.primary

        def mean(value: Any) -> float:
            having = (s for s in self.settings if not s.selected and s.values.get(key) == value)
            runs = [run for setting in having for run in setting.finished]
            return Interval.of([_at(run.totals, ("metrics", primary)) for run in runs]).mean

        means = [(mean(value), value) for value in self.values[key]]
        known = [pair for pair in means if not math.isnan(pair[0])]
        return [value for _, value in sorted(known, key=lambda pair: self.spec.order(pair[0]))]

    def paired(self, key: str, baseline: Any, metric: str = "") -> dict[Any, "Paired"]:
        """Subtract a baseline from other values of a key, at equal other settings and seeds.

        Pairs of the same seed share its data and first weights. So each seed's differences are
        averaged first, and the interval is over seeds. Settings with trials that were stopped early
        are left out.

        Args:
            key: An option that varies.
            baseline: One of its values.
            metric: Name of a metric; the primary one if empty.

        Returns:
            By other value of the key, the mean difference of the metric after the last round.
        """
        metric = metric or self.spec.primary
        of: dict[Any, dict[Any, dict[str, float]]] = {value: {} for value in self.values[key]}
        for trial in (t for s in self.settings if not s.selected for t in s.trials):
            if trial.finished and trial.run and key in trial.settings:
                others = {k: v for k, v in trial.settings.items() if k not in (key, SEED)}
                seed = of[trial.settings[key]].setdefault(trial.settings.get(SEED), {})
                seed[write_json(others, sort_keys=True)] = _at(
                    trial.run.totals, ("metrics", metric)
                )
        out = {}
        for value in (v for v in of if v != baseline):
            by_seed = [differences(ours, of[baseline].get(n, {})) for n, ours in of[value].items()]
            means = [float(np.mean(pairs)) for pairs in by_seed if pairs]
            out[value] = Paired(Interval.of(means), sum(map(len, by_seed)))
        return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Return a value that can be a key."""
    return spelled(value) if isinstance(value, list | dict) else value


def spelled(value: Any) -> str:
    """Write a value as TOML and JSON have it."""
    return write_json(value, ensure_ascii=False)


def _trial(folder: Path, entry: dict[str, Any]) -> Trial:
    path = folder / "trials" / entry["trial"]
    status, reason, run = entry["status"], entry.get("reason") or "", None
    try:
        run = RunFolder.begun(path) if path.is_dir() else None
    except ConfigError as error:
        status, reason = DAMAGED, str(error)
    settings = {k: _plain(v) for k, v in renamed(entry["settings"], quietly=True).items()}
    return Trial(entry["trial"], settings, status, reason, run if run and run.lines else None)
