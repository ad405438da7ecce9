"""Tables of a sweep: its settings, its pairs, and the trials that did not finish."""

import math
from collections.abc import Sequence
from typing import Any

from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.report import html
from d2ft_fl.report.format import LABELS, metric_format, metric_label, quantity, seconds
from d2ft_fl.report.statistics import Interval
from d2ft_fl.report.sweep_folder import FINISHED, SEED, Setting, SweepFolder, Trial, spelled

MOST_KEYS = 3  # that have a column each
COUNTED = {"violations": "violations", "sat out": "sat_out", "faults": "faults"}


def settings(sweep: SweepFolder, rows: Sequence[Setting]) -> str:
    """Make a table of means over the finished runs of each setting; metrics with intervals."""
    others = [s for s in dict.fromkeys(t.status for t in sweep.trials) if s != FINISHED]
    keys = sweep.keys if len(sweep.keys) <= MOST_KEYS else []  # else in words, which are narrower
    primary = sweep.spec.primary
    written, label = metric_format(sweep.spec, primary), metric_label(primary)
    heads = [*(keys or ["setting"]), f"final {label}", f"best {label}"]
    heads += [f"{LABELS[name]} share" for name in RESOURCES] + ["bytes up", "time", *COUNTED]
    lines = []
    for s in rows:
        line = "".join(_value(sweep, key, s.values.get(key)) for key in keys)
        line = line or html.words(s.label)
        for i in (s.metric(primary), s.figure("best")):
            line += html.valued(written.mean_text(i.mean, i.half), i.mean)
        for name in RESOURCES:
            line += html.valued(f"{(i := s.figure('resources', name, 'share')).mean:.0%}", i.mean)
        up, time = s.figure("resources", "bytes_up", "used"), s.figure("round_seconds")
        line += html.valued(quantity(up.mean, "B"), up.mean)
        line += html.valued(seconds(time.mean), time.mean)
        line += "".join(_mean(s.figure(name)) for name in COUNTED.values())
        line += html.cells(*(str(s.count(status)) for status in (FINISHED, *others)))
        lines.append(line)
    return html.table([*heads, FINISHED, *others], lines, len(keys) or 1, sortable=True)


def _value(sweep: SweepFolder, key: str, value: Any) -> str:
    """Return a cell of a varied value; numbers sort as such."""
    return html.words("" if value is None else sweep.word(key, value))


def _mean(i: Interval) -> str:
    return html.cells("-") if math.isnan(i.mean) else html.valued(f"{i.mean:.3g}", i.mean)


def pairs(sweep: SweepFolder, key: str) -> str:
    """Make a table of every value of a key beside every other."""
    written = metric_format(sweep.spec, sweep.spec.primary)
    values = sweep.best_first(key)
    rows = [
        html.words(sweep.word(key, value), sweep.word(key, baseline))
        + html.valued(written.difference_text(i.mean, i.half), i.mean)
        + html.cells(str(i.count), str(paired.pairs))
        for baseline in values
        for value, paired in sweep.paired(key, baseline).items()
        if value in values
        for i in [paired.difference]
    ]
    heads = [key, "compared with", written.difference_head, "seeds", "pairs"]
    return html.table(heads, rows, 2, sortable=True)


def unfinished(sweep: SweepFolder, trials: Sequence[Trial]) -> str:
    """Make a table of trials that did not come to their end, with reasons."""
    rows = [
        html.words(t.name, sweep.label({k: v for k, v in t.settings.items() if k != SEED}))
        + html.words(spelled(t.settings[SEED]) if SEED in t.settings else "-", t.status)
        + html.words(f"{len(t.run.lines)}" if t.run else "0", t.reason or "-")
        for t in trials
    ]
    heads = ["trial", "setting", SEED, "status", "rounds", "reason"]
    return html.table(heads, rows, len(heads), sortable=True)
