"""Where a sweep's settings ended, over what varies, and beside each other."""

import textwrap
from collections.abc import Sequence
from typing import Any

from d2ft_fl.report.axes import short
from d2ft_fl.report.charts import GREY, MOST_LINES, Chart, Choice, Entry, Option, blank, look, plain
from d2ft_fl.report.format import MetricFormat, metric_format, metric_label
from d2ft_fl.report.statistics import Interval
from d2ft_fl.report.sweep_folder import Paired, Setting, SweepFolder, spelled
from d2ft_fl.tasks.metrics import MetricSpec

MOST_DOTS = 60  # rows
LABEL = 46  # characters of a row's label in one line, which a phone is wide enough for
LINE = 15  # pixels of it
LOG_FROM = 20.0  # how many times the least the greatest value is on a logarithmic axis
MOST_WORDS = 12  # values of a key that are compared pairwise


def dots(best: Sequence[Setting], spec: MetricSpec) -> Chart:
    """Draw the final primary metric of settings, with seeds and intervals.

    Args:
        best: Settings with finished runs, the best first.
        spec: What the task is measured by.
    """
    rows, primary = best[:MOST_DOTS], spec.primary
    written, label = metric_format(spec, primary), metric_label(primary)
    figures = [s.metric(primary) for s in rows]
    seeds = [
        (run.totals["metrics"][primary], row) for row, s in enumerate(rows) for run in s.finished
    ]
    labels = [textwrap.wrap(s.label, LABEL) for s in rows]
    figure = blank(
        (24 + LINE * max(map(len, labels))) * len(rows) + 50,
        xaxis={
            "title": f"final {label}", "tickformat": written.tick,
            "range": _reach(figures, seeds, written),
        },
        yaxis={"showticklabels": False, "showgrid": False, "range": [len(rows) - 0.5, -0.85]},
    )  # fmt: skip
    figure.add_scatter(
        x=short(value for value, _ in seeds), y=[row for _, row in seeds], mode="markers",
        marker={"color": GREY, "symbol": "circle-open", "size": 7}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=short(i.mean for i in figures), y=list(range(len(rows))), mode="markers",
        marker={"size": 10, "symbol": "diamond"}, customdata=_texts(written, figures),
        error_x={"type": "data", "array": _halves(figures), "thickness": 2},
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    for row, lines in enumerate(labels):
        figure.add_annotation(
            text="<br>".join(map(plain, lines)), x=0, xref="paper", xanchor="left", y=row,
            yanchor="bottom", yshift=6, showarrow=False, align="left",
        )  # fmt: skip
    text = "Diamonds are means over seeds with their 95 % confidence intervals, circles are seeds."
    text += f" Of {len(best)} settings, the best {len(rows)}." if len(best) > len(rows) else ""
    return Chart("dots", f"Dot chart of final {label} by setting, the best on top.", figure, text)


def _texts(written: MetricFormat, intervals: Sequence[Interval]) -> list[str]:
    return [written.mean_text(i.mean, i.half) for i in intervals]


def _reach(
    intervals: Sequence[Interval], seeds: Sequence[tuple[float, int]], written: MetricFormat
) -> list[float]:
    """Return a range that holds seeds and intervals, as far as such values are possible."""
    ends = [end for i in intervals for end in (i.low, i.high)] + [seed for seed, _ in seeds]
    least, most = written.range
    low, high = max(least, min(ends)), min(most, max(ends))
    room = 0.04 * (high - low) or 0.01
    return [low - room, high + room]


def _halves(intervals: Sequence[Interval]) -> list[float | None]:
    return short(i.half or 0.0 for i in intervals)


def over_key(sweep: SweepFolder, best: Sequence[Setting], key: str) -> Chart:
    """Draw the final primary metric over a varied number.

    All settings that differ in nothing else share a line.

    Args:
        sweep: The sweep.
        best: Settings with finished runs, the best first.
        key: The option whose values are numbers.
    """
    primary = sweep.spec.primary
    written, label = metric_format(sweep.spec, primary), metric_label(primary)
    lines: dict[str, list[Setting]] = {}
    for setting in best:
        if key in setting.values:
            lines.setdefault(sweep.label(setting.values, without=key), []).append(setting)
    lines = dict(list(lines.items())[:MOST_LINES])
    values = sorted(sweep.values[key])
    wide = values[0] > 0 and values[-1] / values[0] >= LOG_FROM
    figure, legend = blank(360), []
    for index, (name, settings) in enumerate(lines.items()):
        colour, dash, symbol = look(index)
        settings = sorted(settings, key=lambda s: s.values[key])
        figures = [s.metric(primary) for s in settings]
        figure.add_scatter(
            x=_beside_others([s.values[key] for s in settings], index, len(lines), values, wide),
            y=short(i.mean for i in figures),
            mode="lines+markers", line={"color": colour, "dash": dash},
            marker={"size": 8, "symbol": symbol},
            error_y={"type": "data", "array": _halves(figures), "thickness": 1.5},
            customdata=[
                f"{spelled(s.values[key])}: {text}"
                for s, text in zip(settings, _texts(written, figures), strict=True)
            ],
            hovertemplate=f"{plain(name)}<br>{plain(key)} %{{customdata}}<extra></extra>",
        )  # fmt: skip
        legend.append(Entry(name, colour, dash, (index,)))
    ticks = {"tickmode": "array", "tickvals": values, "ticktext": list(map(spelled, values))}
    figure.update_xaxes(title_text=plain(key), type="log" if wide else "linear")
    figure.update_xaxes(ticks if len(values) <= 8 else {})
    figure.update_yaxes(title_text=f"final {label}", tickformat=written.tick)
    return Chart(
        f"over-{key}",
        f"Line chart of final {label} over {key}.",
        figure,
        "Means over seeds, with 95 % confidence intervals; lines are a little apart.",
        legend=legend if len(lines) > 1 else (),
    )


def _beside_others(
    own: list[float], index: int, lines: int, values: list[float], logarithmic: bool
) -> list[float]:
    """Move a line's values a little, so that intervals of several lines do not hide each other."""
    move = (index - (lines - 1) / 2) * min(0.008, 0.06 / lines)
    if logarithmic:
        return [v * (values[-1] / values[0]) ** move for v in own]
    return [v + (values[-1] - values[0]) * move for v in own]


def compared(sweep: SweepFolder, key: str) -> Chart:
    """Draw differences of a key's values to one of them, at equal other settings and seeds."""
    written = metric_format(sweep.spec, sweep.spec.primary)
    values = sweep.best_first(key)
    options = [_beside(sweep, key, baseline, values) for baseline in values]
    figure = blank(
        44 * (len(values) - 1) + 60,
        xaxis={"title": written.difference_title},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "category"},
    )
    figure.add_scatter(
        x=options[0].data["x"][0], y=options[0].data["y"][0], mode="markers",
        marker={"size": 10, "symbol": "diamond"},
        error_x={"type": "data", "array": options[0].data["error_x.array"][0], "thickness": 2},
        hovertemplate=f"%{{y}}: %{{x:{written.difference}}}{written.points}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": GREY, "dash": "dash", "width": 1})
    return Chart(
        f"compared-{key}",
        f"Dot chart of differences in final {metric_label(sweep.spec.primary)} between values of "
        f"{key}.",
        figure,
        f"Trials that differ in {key} alone, at the same seed, are a pair. Diamonds are mean "
        "differences over seeds, of all pairs of each, with their 95 % confidence intervals.",
        [Choice("compared with", options)],
    )


def _over(paired: Paired) -> str:
    seeds, pairs = paired.difference.count, paired.pairs
    text = f"{seeds} seed{'s' * (seeds != 1)}"
    return f" over {text}" + f" ({pairs} pairs)" * (pairs > seeds) if pairs else ""


def _beside(sweep: SweepFolder, key: str, baseline: Any, values: Sequence[Any]) -> Option:
    written = metric_format(sweep.spec, sweep.spec.primary)
    paired = sweep.paired(key, baseline)
    others = [value for value in values if value != baseline]
    intervals = [paired[value].difference for value in others]
    texts = [written.difference_text(i.mean, i.half) for i in intervals]
    note = "; ".join(
        f"{sweep.word(key, value)} {text}{_over(paired[value])}"
        for value, text in zip(others, texts, strict=True)
    )
    return Option(
        sweep.word(key, baseline),
        {
            "x": [short(written.factor * i.mean for i in intervals)],
            "y": [[plain(sweep.word(key, value)) for value in others]],
            "error_x.array": [short(written.factor * (i.half or 0.0) for i in intervals)],
        },
        note=f"{note}.",
    )
