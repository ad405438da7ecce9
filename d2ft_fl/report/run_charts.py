"""Charts of a run: how it went, and what happens to each subnet."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from d2ft_fl.report.axes import short, x_choice
from d2ft_fl.report.charts import (
    COUNTS,
    DASHES,
    LINES,
    RANKS,
    SHARES,
    SYMBOLS,
    Chart,
    Choice,
    Option,
    blank,
    scale_key,
)
from d2ft_fl.report.format import heading, metric_format, metric_label
from d2ft_fl.report.run_folder import PlanFile, RunFolder
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.tasks.metrics import MetricSpec

MOST_STEPS = 200  # of a slider, and columns of a map of rounds
MOST_NUMBERS = 400  # subnets, beyond which cells hold no numbers
CELLS = (18, 40)  # least and most pixels that a block is high
RANK = "mean rank"
MEANINGS = {
    Operation.FULL.name: "FULL: forward and backward. Orange: nobody trains the subnet.",
    Operation.FROZEN.name: "FROZEN: the gradient passes through, the weights get none.",
    Operation.FORWARD_ONLY.name: "FORWARD_ONLY: run without a gradient.",
    Operation.SHORTCUT.name: "SHORTCUT: skipped; the residual carries the input on.",
    RANK: "The mean LoRA rank at which clients train the subnet. Empty: nobody trains it.",
}


TRAIN_LOSS = "train_loss"  # column of the clients' mean training loss
LOSS = "loss"  # of a task whose figures have the mean of its training loss: drawn together
FURTHER = {
    "aggregation_error": "How far aggregating LoRA's factors was from the exact mean of the "
    "changes that clients made to the weights, relative to that change.",
    "epsilon": "Differential privacy: what all rounds up to here promise every client together.",
}


def progress(run: RunFolder) -> Chart:
    """Draw metrics, losses, aggregation error and epsilon, over rounds or what was spent."""
    frame, spec = run.rounds, run.spec
    further = [name for name in FURTHER if frame[name].notna().any()]
    columns = {name: run.metrics[name] for name in spec.names}
    losses = [] if run.planned else [TRAIN_LOSS]
    columns |= {name: frame[name] for name in (*losses, *further)}
    figure = blank(340, xaxis_title_text="round")
    for name, values in columns.items():
        _line(figure, frame["round"], name, values, spec)
    quantities = _quantities(spec, further, list(columns))
    figure.update_layout(quantities[0].layout)
    over = x_choice(lambda column: [frame[column].to_numpy(dtype=float)] * len(columns))
    figure.update_layout(over.options[0].layout)
    return Chart(
        "progress",
        f"Line chart of {' and '.join(map(metric_label, spec.names))}.{_so_far(run)}",
        figure,
        choices=[Choice("show", quantities), over],
    )


def _line(
    figure: go.Figure, rounds: "pd.Series[int]", name: str, values: "pd.Series[float]",
    spec: MetricSpec,
) -> None:  # fmt: skip
    """Add the line of one quantity to a figure over rounds."""
    client, hover = int(name == TRAIN_LOSS), metric_format(spec, name).hover
    figure.add_scatter(
        x=short(rounds), y=short(values), mode="lines+markers",
        name=metric_label(name), visible=name == spec.primary, customdata=rounds.tolist(),
        line={"color": LINES[client], "dash": DASHES[client], "width": 2},
        marker={"size": 6, "symbol": SYMBOLS[client]},
        hovertemplate="round %{customdata}: %{y:" + hover + "}<extra>%{fullData.name}</extra>",
    )  # fmt: skip


def _quantities(spec: MetricSpec, further: Sequence[str], columns: Sequence[str]) -> list[Option]:
    """Return what a reader can choose to see, the primary metric first.

    Args:
        spec: What the task is measured by.
        further: Names of ``FURTHER`` that the run has.
        columns: Names of the figure's lines, in order.
    """

    def shows(label: str, *names: str, note: str) -> Option:
        tick = metric_format(spec, names[0]).tick
        layout = {"yaxis.title.text": label, "yaxis.tickformat": tick, "yaxis.autorange": True}
        return Option(label, {"visible": [name in names for name in columns]}, layout, note)

    both = (
        "Solid line, dots: the global model on the held-out examples. Dashed line, squares: "
        "clients while they train."
    )
    out = []
    for name in sorted(spec.names, key=lambda name: name != spec.primary):
        label = metric_label(name)
        if name == LOSS and TRAIN_LOSS in columns:
            out.append(shows(label, LOSS, TRAIN_LOSS, note=both))
        else:
            note = f"{heading(label)} of the global model on the held-out examples."
            out.append(shows(label, name, note=note))
    if LOSS not in spec.names and TRAIN_LOSS in columns:
        out.append(shows("training loss", TRAIN_LOSS, note="Loss of clients while they train."))
    return out + [shows(metric_label(name), name, note=FURTHER[name]) for name in further]


def _so_far(run: RunFolder) -> str:
    """Say where the primary metric is after the last round in which it was evaluated."""
    primary = run.spec.primary
    values = run.metrics[primary].dropna()
    if not len(values):
        return ""
    last = metric_format(run.spec, primary).text(values.iloc[-1])
    number = run.rounds["round"][values.index[-1]]
    return f" After round {number} {metric_label(primary)} is {last}."


def shown_rounds(run: RunFolder) -> list[int]:
    """Return the rounds that maps show: all, or ``MOST_STEPS`` of them at equal distances."""
    rounds = run.rounds["round"].tolist()
    picks = np.linspace(0, len(rounds) - 1, min(len(rounds), MOST_STEPS)).round().astype(int)
    return [rounds[i] for i in picks]


def coverage(rounds: Sequence[int], plans: Sequence[PlanFile]) -> Chart:
    """Draw what clients do with each subnet, round by round.

    Args:
        rounds: Numbers of the rounds.
        plans: Schedules of the rounds.
    """
    done = [
        op
        for op in reversed(Operation)
        if op is Operation.FULL or any((plan.schedules == op).any() for plan in plans)
    ]
    ranks = any(plan.ranks is not None for plan in plans)
    names = [op.name for op in done] + [RANK] * ranks
    steps = [
        Option(f"round {r} of {rounds[-1]}", {"z": _maps(plan, done, ranks)}, note=_says(plan))
        for r, plan in zip(rounds, plans, strict=True)
    ]
    kinds = [
        Option(name, {"visible": [other == name for other in names]}, note=MEANINGS[name])
        for name in names
    ]
    blocks, heads = plans[0].shape
    clients = len(plans[0].clients)
    figure = _grid(blocks, heads, clients, max(map(_highest_rank, plans)))
    numbers = blocks * heads <= MOST_NUMBERS
    for name, z in zip(names, steps[-1].data["z"], strict=True):
        value = "%{z:.2g}" if name == RANK else "%{z}"
        says = f"{RANK} {value}" if name == RANK else f"{name} with {value} clients"
        figure.add_heatmap(
            z=z, x=list(range(heads)), y=list(range(blocks)), visible=name == names[0], xgap=1,
            ygap=1, coloraxis=_AXES.get(name, SHARES), texttemplate=value if numbers else "",
            hovertemplate=f"block %{{y}}, head %{{x}}: {says}<extra></extra>",
        )  # fmt: skip
    return Chart(
        "coverage",
        f"Heat map of {blocks} blocks by {heads} heads: clients by operation. {_says(plans[-1])}",
        figure,
        _caption(rounds, clients, slots=plans[0].schedules.shape[1]),
        [Choice("operation", kinds), Choice("round", steps, len(steps) - 1, slider=True)],
        key=scale_key("none", "all clients" + ", or the highest rank" * ranks),
        most_width=max(420, 64 * heads + 80),
    )


_AXES = {Operation.FULL.name: COUNTS, RANK: RANKS}


def _caption(rounds: Sequence[int], clients: int, slots: int) -> str:
    text = f"How many of {clients:,} clients do what with each subnet: heads across, blocks down."
    if slots > 1:
        text += f" A client counts under each operation that one of its {slots} slots has."
    if len(rounds) < rounds[-1]:
        text += f" {len(rounds)} rounds of {rounds[-1]} are shown."
    return text


def _grid(blocks: int, heads: int, clients: int, rank: int) -> go.Figure:
    """Return a figure with axes for maps of subnets, counts of clients, and ranks."""
    cell = min(CELLS[1], max(CELLS[0], 420 // blocks))
    counts = {"cmin": 0, "cmax": clients}
    return blank(
        cell * blocks + 60,
        xaxis={"title": "head", "dtick": 1 + (heads - 1) // 16, "showgrid": False},
        yaxis={
            "title": "block", "dtick": 1 + (blocks - 1) // 24, "showgrid": False,
            "autorange": "reversed",
        },
        **{SHARES: counts, COUNTS: counts, RANKS: {"cmin": 0, "cmax": max(1, rank)}},
    )  # fmt: skip


def _highest_rank(plan: PlanFile) -> int:
    return 0 if plan.ranks is None else int(plan.ranks.max())


def _maps(plan: PlanFile, operations: Sequence[Operation], ranks: bool) -> list[list[list]]:
    """Return a map for each trace: [blocks][heads]."""
    maps: list[list[list]] = [plan.counts(op).tolist() for op in operations]
    if ranks:
        maps.append([short(row, 3) for row in plan.mean_ranks()])
    return maps


def _says(plan: PlanFile) -> str:
    trained = plan.trained.any(axis=0)
    nobody = int((~trained).sum())
    return (
        f"{trained.mean():.0%} of {trained.size} subnets are trained, {nobody} by nobody; the mean "
        f"subnet by {plan.trained.sum() / trained.size:.1f} clients."
    )
