"""A sweep's settings round by round: a line each, with its interval as a band."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from d2ft_fl.report.axes import COLUMNS, short, x_choice
from d2ft_fl.report.charts import MOST_LINES, Chart, Choice, Entry, Option, blank, look, plain
from d2ft_fl.report.format import metric_format, metric_label
from d2ft_fl.report.statistics import Interval
from d2ft_fl.report.sweep_folder import Setting
from d2ft_fl.tasks.metrics import MetricSpec

MOST_SHOWN, FIRST_SHOWN = 12, 8  # lines that are switched on at first; of more, how many
MOST_BANDS = 3  # lines whose bands do not hide each other
MOST_POINTS = 200  # of a line
MOST_MARKED = 40  # points of a line with markers
CLEAR = "rgba(0,0,0,0)"


@dataclass(frozen=True, eq=False)
class Curve:
    """A setting round by round: means over its runs, as far as all of them came.

    Attributes:
        x: By name of ``COLUMNS``: float64 [points].
        intervals: By name of a metric, an interval for each point.
        runs: Number of runs.
    """

    x: dict[str, np.ndarray]
    intervals: dict[str, list[Interval]]
    runs: int

    @classmethod
    def of(cls, setting: Setting) -> "Curve":
        """Average the runs that a setting shows."""
        runs = setting.shown
        rounds, metrics = [run.rounds for run in runs], [run.metrics for run in runs]
        length = min(map(len, rounds))
        picks = np.linspace(0, length - 1, min(length, MOST_POINTS)).round().astype(int)

        def stacked(frames: Sequence[pd.DataFrame], name: str) -> np.ndarray:
            """Return a column of all runs: float64 [runs, points]."""
            return np.stack([frame[name].to_numpy(dtype=float)[picks] for frame in frames])

        return cls(
            {name: stacked(rounds, name).mean(axis=0) for name in COLUMNS},
            {
                name: [Interval.of(point) for point in stacked(metrics, name).T]
                for name in metrics[0]
            },
            len(runs),
        )

    def y(self, name: str) -> np.ndarray:
        """Return the means: float64 [points]."""
        return np.array([i.mean for i in self.intervals[name]])

    def around_x(self, name: str) -> np.ndarray:
        """Return x of the band's outline, there and back: float64 [2 points]; empty of one run."""
        there = self.x[name] if self.runs > 1 else np.array([])
        return np.concatenate([there, there[::-1]])

    def around_y(self, name: str) -> np.ndarray:
        """Return y of the band's outline: the lower ends of intervals, then back the upper ones."""
        intervals = self.intervals[name] if self.runs > 1 else []
        return np.array([i.low for i in intervals] + [i.high for i in reversed(intervals)])


def curves(best: Sequence[Setting], spec: MetricSpec) -> Chart:
    """Draw metrics over rounds or over what was spent, a line for each setting.

    Args:
        best: Settings with runs to show, the best first.
        spec: What the task is measured by.
    """
    drawn, primary = best[:MOST_LINES], spec.primary
    first = len(drawn) if len(drawn) <= MOST_SHOWN else FIRST_SHOWN
    lines = [Curve.of(setting) for setting in drawn]
    several = any(line.runs > 1 for line in lines)
    with_bands = several and first <= MOST_BANDS
    bands = [_faint(look(index)[0]) for index in range(len(lines))]
    figure, legend = blank(420), []
    for index, (setting, line) in enumerate(zip(drawn, lines, strict=True)):
        colour, dash, symbol = look(index)
        name, shown = plain(setting.label), index < first
        figure.add_scatter(
            x=short(line.around_x("round")), y=short(line.around_y(primary)), visible=shown,
            mode="lines", line_width=0, fill="toself", hoverinfo="skip",
            fillcolor=bands[index] if with_bands else CLEAR,
        )  # fmt: skip
        figure.add_scatter(
            x=short(line.x["round"]), y=short(line.y(primary)), name=name, visible=shown,
            mode="lines+markers" if len(line.x["round"]) <= MOST_MARKED else "lines",
            line={"color": colour, "dash": dash}, marker={"symbol": symbol, "size": 6},
            customdata=line.x["round"].tolist(),
            hovertemplate=f"{name}<br>round %{{customdata}}: %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
        entry = setting.label + ("" if setting.finished else " (not finished)")
        legend.append(Entry(entry, colour, dash, (2 * index, 2 * index + 1), shown))

    def show(name: str) -> Option:
        y = [y for line in lines for y in (line.around_y(name), line.y(name))]
        layout = {
            "yaxis.title.text": metric_label(name),
            "yaxis.tickformat": metric_format(spec, name).tick,
            "yaxis.range": _holding([line.y(name) for line in lines]),
        }
        return Option(metric_label(name), {"y": [short(values) for values in y]}, layout)

    over = x_choice(lambda name: [x for line in lines for x in (line.around_x(name), line.x[name])])
    names = sorted(spec.names, key=lambda name: name != primary)
    choices = [Choice("show", [show(name) for name in names]), over]
    for choice in choices:
        figure.update_layout(choice.options[0].layout)
    if several:
        note = "Bands are 95 % confidence intervals of the means."
        filled = [band for band in bands for _ in range(2)]  # a band and a line each
        options = [
            Option("hidden", {"fillcolor": [CLEAR]}),
            Option("shown", {"fillcolor": filled}, note=note),
        ]
        choices.append(Choice("bands", options, int(with_bands)))
    return Chart(
        "curves",
        f"Line chart of {metric_label(primary)}, a line a setting.",
        figure,
        _caption(metric_label(primary), len(best), len(drawn), first),
        choices,
        legend,
    )


def _caption(primary: str, settings: int, drawn: int, first: int) -> str:
    text = "A line is the mean over the seeds of a setting, at equal rounds."
    if settings > drawn:
        text += f" Of {settings} settings, the {drawn} with the best final {primary}."
    if first < drawn:
        text += f" The best {first} are switched on."
    return text


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _holding(lines: Sequence[np.ndarray]) -> list[float | None]:
    """Return a range that holds all lines; bands of two seeds can be many times as wide."""
    values = np.concatenate(lines)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.01
    return short([low - room, high + room])
