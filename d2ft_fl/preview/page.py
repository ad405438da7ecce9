"""A preview as a picture or as one page that needs nothing else."""

import io
import re
from html import escape
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from d2ft_fl.preview.console import (
    OUTCOME,
    ROUNDS,
    has_ranks,
    outcome,
    policy,
    rank,
    rounds,
    shown_limits,
    shown_operations,
    totals,
    used,
)
from d2ft_fl.preview.plan_preview import LIMITS, ClientPreview, Preview, RoundPreview
from d2ft_fl.report import html
from d2ft_fl.report.format import LIMIT_LABELS, OPERATIONS
from d2ft_fl.report.html import ALARM, COLOURS

SUFFIXES = (".png", ".svg", ".pdf", ".html")
MOST_NUMBERS = 400  # subnets, beyond which cells hold no numbers


def write(found: Preview, path: Path) -> None:
    """Write a preview's last round: .png, .svg, .pdf, or .html.

    Raises:
        ConfigError: When the file cannot be written.
    """
    if path.suffix == ".html":
        html.write(page(found), path)
        return
    try:
        figure(found).savefig(path, dpi=130)
    except OSError as error:
        raise html.cannot_write(path, error) from None


# -- the figure ----------------------------------------------------------------------------------


def figure(found: Preview, stacked: bool = False) -> Figure:
    """Who trains what, and how much of their budgets devices use; side by side, or stacked."""
    r = found.rounds[-1]
    classes = r.classes()
    tall = max(2.6, 0.29 * found.blocks + 1.4)  # inches of the map
    bars = max(2.4, 0.8 * len(classes) + 1.4)
    if stacked:
        out = Figure(figsize=(6.6, tall + bars), layout="constrained")
        FigureCanvasAgg(out)
        left, right = out.subplots(2, 1, height_ratios=(tall, bars))
    else:
        out = Figure(figsize=(12.5, max(tall, bars, 4.0)), layout="constrained")
        FigureCanvasAgg(out)
        left, right = out.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_map(out, left, r)
    _draw_bars(right, classes)
    return out


def _draw_map(out: Figure, axes: Axes, r: RoundPreview) -> None:
    """Heads across, blocks down."""
    blocks, heads = r.trained.shape
    most = len(r.clients)
    blues = LinearSegmentedColormap.from_list("share", ["#f2f7fb", COLOURS[0]])
    colours = blues.with_extremes(under=ALARM)
    mesh = axes.pcolormesh(
        r.trained, cmap=colours, vmin=0.5, vmax=max(1.5, most), edgecolors="white", linewidth=0.8
    )
    if blocks * heads <= MOST_NUMBERS:
        size = min(9.0, 9.0 * 16 / heads * 3 / max(3, len(str(most))))
        for (block, head), count in np.ndenumerate(r.trained):
            ink = "white" if count == 0 or count > 0.6 * most else "black"
            axes.text(
                head + 0.5, block + 0.5, str(count), ha="center", va="center", color=ink,
                fontsize=size,
            )  # fmt: skip
    step = 1 + (heads - 1) // 16, 1 + (blocks - 1) // 24
    axes.set_xticks(np.arange(0, heads, step[0]) + 0.5, [str(h) for h in range(0, heads, step[0])])
    axes.set_yticks(
        np.arange(0, blocks, step[1]) + 0.5, [str(b) for b in range(0, blocks, step[1])]
    )
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("head")
    axes.set_ylabel("block")
    axes.set_title(
        f"Round {r.round}: {r.coverage:.0%} of the subnets are trained", fontsize=11, loc="left"
    )
    bar = out.colorbar(mesh, ax=axes, extend="min", pad=0.02)
    bar.set_label(f"clients that train it,\nof {most}; orange: nobody")
    bar.outline.set_visible(False)


def _draw_bars(axes: Axes, classes: dict[str, list[ClientPreview]]) -> None:
    """Draw a group of bars a device class: mean used share of each budget, a tick at the top."""
    everyone = [c for clients in classes.values() for c in clients]
    shown = [name for name in LIMITS if any(name in c.shares for c in everyone)]
    thick = min(0.8 / max(1, len(shown)), 0.3)
    for index, limit in enumerate(shown):
        colour = COLOURS[LIMITS.index(limit)]
        for row, clients in enumerate(classes.values()):
            shares = [100 * c.shares[limit] for c in clients if limit in c.shares]
            y = row + (index - (len(shown) - 1) / 2) * thick
            mean = float(np.mean(shares)) if shares else 0.0
            label = LIMIT_LABELS[limit] if row == 0 else None
            axes.barh(y, mean, 0.9 * thick, color=colour, label=label)
            if shares:
                top = max(shares)
                axes.plot([top, top], [y - thick / 2, y + thick / 2], color="0.15", linewidth=1.4)
    axes.axvline(100, color="0.3", linewidth=1, linestyle="--")
    names = [f"{name}\n{len(c)} client{'s' * (len(c) > 1)}" for name, c in classes.items()]
    axes.set_yticks(range(len(classes)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("used share of the budget, % (bar: mean, tick: highest)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How much of their budgets clients use", fontsize=11, loc="left")
    if shown:
        axes.figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower right", ncols=len(shown),
            frameon=False, fontsize=9,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no client has a budget", transform=axes.transAxes, ha="center")


def inline_svg(drawn: Figure, label: str) -> str:
    """Return a figure as an element of a page: no declarations, no metadata, no addresses."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "d2ft"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


# -- the page ------------------------------------------------------------------------------------

STYLE = """
figure { background: #fff; }
figure svg { display: block; width: 100%; height: auto; max-width: 46rem; margin: auto; }
"""


def page(found: Preview) -> list[str]:
    """Return a page with the figure, every client of the last round, and the configuration."""
    config, last = found.config, found.rounds[-1]
    title = f"{config.clients} clients of {config.model}, planned by {config.strategy}"
    facts = "".join(f"<p>{escape(line)}</p>" for line in totals(found, last))
    notes = "".join(f'<p class="note">Note: {escape(note)}.</p>' for note in found.notes)
    drawn = inline_svg(figure(found, stacked=True), "Clients that train each subnet; used budgets")
    several = f"<h2>Rounds</h2><p>{ROUNDS}</p>{_rounds(found)}" if len(found.rounds) > 1 else ""
    body = (
        f"<h1>{escape(title)}</h1>{facts}{notes}<figure>{drawn}</figure>{several}"
        f"<h2>Clients in round {last.round}</h2>{_clients(last)}"
        f"<h2>Configuration</h2>{html.configuration(config.to_mapping())}"
    )
    return html.document(title, [body], STYLE)


def _clients(r: RoundPreview) -> str:
    limits = shown_limits(r.clients)
    ranks = has_ranks(r.clients)
    operations = shown_operations(r.clients)
    heads = ["client", "device", "examples", *(OPERATIONS[op] for op in operations)]
    heads += ["rank"] * ranks
    heads += [LIMIT_LABELS[n] for n in limits]
    rows = [
        html.words(str(c.client), c.device)
        + html.cells(str(c.examples), *(f"{c.operations[op]:.4g}" for op in operations))
        + html.cells(*[rank(c)] * ranks)
        + "".join(_used(c, name) for name in limits)
        + html.cells(*outcome(c), policy(c))
        for c in r.clients
    ]
    return html.table([*heads, *OUTCOME, "policy"], rows, 2)


def _used(c: ClientPreview, name: str) -> str:
    """Return a cell with an amount, its share of the budget, and that share as a bar."""
    text = " ".join(part for part in used(c, name) if part)
    return html.share_cell(text or "-", c.shares.get(name))


def _rounds(found: Preview) -> str:
    heads, rows = rounds(found)
    return html.table(heads, [html.cells(*row) for row in rows])
