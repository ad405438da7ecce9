"""What ``d2ft sweep`` shows: a bar and a line a trial while it runs, tables at the end."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from d2ft_fl.report.format import heading, metric_format, metric_label
from d2ft_fl.sweep.ledger import Ledger
from d2ft_fl.sweep.remote import Outcome
from d2ft_fl.sweep.results import Setting
from d2ft_fl.sweep.trials import Trial
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.util import terminal

MOST_ROWS, MOST_REASONS = 40, 10


class Clock:
    """How long what is left will take, at the speed so far; a trial's part counts by its rounds."""

    def __init__(self, trials: int):
        self.left, self.done = float(trials), 0.0
        self.parts: dict[str, float] = {}
        self.started: float | None = None

    def start(self) -> None:
        """Start with the first trial: the time before it will not come again."""
        self.started = self.started or time.monotonic()

    def part(self, id: str, share: float) -> None:
        """Take down which share of a trial is done."""
        before, self.parts[id] = self.parts.get(id, 0.0), share
        self.left -= share - before
        self.done += share - before

    def __str__(self) -> str:
        if not self.done or self.started is None:
            return ""
        seconds = (time.monotonic() - self.started) * max(0.0, self.left) / self.done
        return f"{duration(seconds)} left" if seconds >= 1 else ""


def duration(seconds: float) -> str:
    """Write a time: 40 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting_text(settings: Mapping[str, Any]) -> str:
    """Write options that vary in one line."""
    return " ".join(f"{key}={value_text(value)}" for key, value in settings.items())


def value_text(value: Any) -> str:
    """Write a value, numbers with four digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Show:
    """Shows a sweep as it goes on.

    Args:
        todo: How many trials are left to run.
        done: How many need not run any more.
        metrics: What trials are compared by.
        quiet: Show nothing.
    """

    def __init__(self, todo: int, done: int, metrics: MetricSpec, quiet: bool):
        self.total, self.done, self.quiet = todo + done, done, quiet
        self.metrics, self.format = metrics, metric_format(metrics, metrics.primary)
        self.running: set[str] = set()
        self.failed = 0
        self.best: float | None = None
        self.clock = Clock(todo)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}"), console=terminal.console, transient=True,
            disable=quiet or not terminal.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("starting", total=self.total, count="", left="")
        self._update("starting")

    def __enter__(self) -> "Show":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, trial: Trial) -> None:
        """Show that a worker began with a trial."""
        self.clock.start()
        self.running.add(trial.id)
        self._update()

    def progressed(self, trial: Trial, round_number: int) -> None:
        """Show that a trial has finished a round."""
        self.clock.part(trial.id, round_number / (trial.config.rounds + 1))
        self._update()

    def ended(self, trial: Trial, outcome: Outcome, metric: float | None) -> None:
        """Show that a trial has ended, and its primary metric."""
        self.clock.part(trial.id, 1.0)
        self.running.discard(trial.id)
        self.done += 1
        self.failed += outcome.status == "failed"
        if outcome.status == "finished":
            self.best = self.metrics.best([self.best, metric])
        self._update()
        if not self.quiet:
            self.progress.console.print(
                self._line(trial, outcome, metric), markup=False, soft_wrap=True
            )

    def _line(self, trial: Trial, outcome: Outcome, metric: float | None) -> str:
        """``  7/24 d2ft-seed0-3ef72b156f strategy=d2ft lr=0.001: accuracy 96.4%, 28 s``."""
        parts = [] if outcome.status == "finished" else [f"{outcome.status}: {outcome.reason}"]
        if metric is not None:
            parts.append(f"{metric_label(self.metrics.primary)} {self.format.text(metric)}")
        parts.append(f"{outcome.seconds:.0f} s")
        left = f" ({self.clock})" if self.progress.disable and str(self.clock) else ""
        count = f"{self.done:>{len(str(self.total))}}/{self.total}"
        return f"{count} {trial.id} {setting_text(trial.settings)}: {', '.join(parts)}{left}"

    def _update(self, description: str = "") -> None:
        description = description or f"{len(self.running)} running"
        if self.failed:
            description += f", {self.failed} failed"
        if self.best is not None:
            description += f", best {self.format.text(self.best)}"
        self.progress.update(
            self.task,
            completed=self.total - self.clock.left,
            description=description,
            count=f"{self.done}/{self.total}",
            left=str(self.clock),
        )


def trial_list(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show all trials: id, settings, status and reason of each."""
    table = Table(title=f"{len(rows)} trials", title_justify="left")
    for head in ("trial", *rows[0]["settings"], "status"):
        table.add_column(escape(head), no_wrap=True)
    for row in rows:
        values = (escape(value_text(value)) for value in row["settings"].values())
        table.add_row(row["trial"], *values, row["status"])
    terminal.console.print(table)
    for row in rows:
        if row["reason"]:
            terminal.say(f"{row['status']}: {row['trial']}: {row['reason']}")


def settings_table(settings: Sequence[Setting], metrics: MetricSpec) -> None:
    """Show means over seeds of each setting."""
    primary, written = metric_label(metrics.primary), metric_format(metrics, metrics.primary)
    title = f"{heading(primary)} after the last round, mean and deviation over seeds"
    table = Table(title=title, title_justify="left")
    for key in settings[0].settings:
        table.add_column(escape(key), no_wrap=True)
    for head in ("finished", primary, "FLOPs", "MB", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    done = [s for s in settings if s.mean is not None]
    for s in done[:MOST_ROWS]:
        table.add_row(
            *(escape(value_text(value)) for value in s.settings.values()),
            f"{s.finished} of {s.trials}" + f" ({s.stopped} stopped)" * (s.stopped > 0),
            written.bare_text(s.mean or 0.0, s.deviation),
            f"{s.flops_share:.0%}",
            f"{s.megabytes:.4g}",
            f"{s.seconds:.0f}",
        )
    terminal.console.print(table)
    if len(done) > MOST_ROWS:
        terminal.say(f"the best {MOST_ROWS} of {len(done)} settings; results.csv has all trials")
    if missing := len(settings) - len(done):
        terminal.say(f"{missing} of {len(settings)} settings without a finished trial")


def ends(ledger: Ledger) -> None:
    """Show how many trials ended in which way, and why."""
    statuses = ("finished", "stopped", "refused", "failed", "waiting")
    counts = [f"{n} {status}" for status in statuses if (n := ledger.count(status))]
    terminal.say(f"{len(ledger.trials)} trials: {', '.join(counts)}")
    for status in ("refused", "failed"):
        those = [trial for trial in ledger.trials if ledger.states[trial.id].status == status]
        for trial in those[:MOST_REASONS]:
            reason = ledger.states[trial.id].reason
            terminal.say(f"{status}: {trial.id} {setting_text(trial.settings)}: {reason}")
        if len(those) > MOST_REASONS:
            terminal.say(f"{status}: {len(those) - MOST_REASONS} more; trials.json has all reasons")
