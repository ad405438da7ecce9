"""A picture of step times over FLOPs: saved arithmetic should be saved time."""

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d2ft_fl.bench.step import Row, StepBench

SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]


def draw(measured: list[list[Row]], benches: list[StepBench], path: Path) -> None:
    """Plot time over FLOPs, with the diagonal, on which saved arithmetic is saved time.

    Filled marks are over the project's own training of everything, rings over the timm model's.

    Args:
        measured: Of each benchmark, the rows of its schedules: all have the same.
        benches: What was measured, differing in the batch size alone.
        path: Where the picture goes; its suffix is one of ``SUFFIXES``.
    """
    figure = Figure(figsize=(4.2 + 4.4 * len(benches), 5.6))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(benches), sharey=True, squeeze=False)[0]
    for axes, rows, bench in zip(panels, measured, benches, strict=True):
        _draw_rows(axes, rows)
        axes.set_title(f"batch {bench.batch_size}", fontsize=10)
    slowest = max(max(r.time_ratio, r.own_time_ratio) for rows in measured for r in rows)
    panels[0].set_ylim(0, max(1.12, slowest + 0.05))
    panels[0].set_ylabel("time of a step, training everything = 1")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    bench = benches[0]
    slots = f"{bench.slots} slot{'s' * (bench.slots > 1)}"
    threads = f", {bench.threads} threads" if bench.device == "cpu" else ""
    where = f"{bench.precision} on {bench.device}{threads}"
    figure.suptitle(f"{bench.model}, {bench.tuning} tuning, {slots}, {where}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _draw_rows(axes: Axes, rows: list[Row]) -> None:
    axes.plot([0, 1.05], [0, 1.05], color="0.4", linewidth=1, label="time = FLOPs")
    axes.fill_between([0, 1.05], [0, 1.05], [0.05, 1.10], color="0.9", label="up to 0.05 more")
    for index, row in enumerate(rows):
        marker, colour = "os^DvP"[index // len(COLOURS) % 6], COLOURS[index % len(COLOURS)]
        mark = partial(axes.plot, marker=marker, color=colour, markersize=8, linestyle="none")
        mark(row.own_flop_ratio, row.own_time_ratio, label=row.schedule)
        mark(row.flop_ratio, row.time_ratio, markerfacecolor="none")
    ring = "over the timm model"
    axes.plot([], [], marker="o", color="0.4", markerfacecolor="none", linestyle="none", label=ring)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("FLOPs of a step, training everything = 1")
    axes.spines[["top", "right"]].set_visible(False)
