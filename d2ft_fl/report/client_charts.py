"""Charts of a run's clients: who trained what, and what they used of their budgets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from d2ft_fl.budgets.budget import LIMITS
from d2ft_fl.report.axes import round_step, short
from d2ft_fl.report.charts import (
    BUDGETS,
    GREY,
    LINES,
    SHARES,
    Chart,
    Choice,
    Option,
    blank,
    plain,
    scale_key,
)
from d2ft_fl.report.format import LIMIT_LABELS
from d2ft_fl.report.frame import NAMES
from d2ft_fl.report.run_folder import PlanFile, limits_of
from d2ft_fl.subnets.schedule import Operation

MOST_CLIENTS = 60  # of more, maps have a row a device class
ROWS, BAR = (14, 20), 18  # pixels: of many rows and of few, of a bar


@dataclass(frozen=True)
class Row:
    """A row of a map: one client, or all clients of a device class."""

    label: str
    clients: list[int]


def by_class(clients: pd.DataFrame) -> bool:
    """Tell whether rows are device classes; see ``MOST_CLIENTS``."""
    return clients["client"].nunique() > MOST_CLIENTS


def map_rows(clients: pd.DataFrame) -> list[Row]:
    """Return the rows of a run's maps, sorted by device class."""
    devices = clients.drop_duplicates("client").groupby("device", sort=False)["client"]
    if by_class(clients):
        return [Row(class_label(d, len(members)), members.tolist()) for d, members in devices]
    return [
        Row(f"{client}, {plain(device)}", [client])
        for device, members in devices
        for client in members
    ]


def class_label(device: str, clients: int) -> str:
    """Write a device class and how many clients it has."""
    return f"{plain(device)} ({clients:,})"


def who_trained(clients: pd.DataFrame, rounds: Sequence[int], plans: Sequence[PlanFile]) -> Chart:
    """Draw how much each client trained in each round, and which subnets over all rounds."""
    rows = map_rows(clients)
    full = clients.assign(trained=clients[Operation.FULL.name].where(clients["fault"].isna()))
    over_rounds = _pivot(full, rows, rounds, "trained", "mean")
    plan = plans[0]
    subnets = np.mean([_trained_by(p, rows) for p in plans], axis=0)  # [rows, blocks * heads]
    blocks, heads = plan.shape
    names = [f"{block}.{head}" for block in range(blocks) for head in range(heads)]
    share = "%{z:.0%}<extra></extra>"
    options = [
        Option(
            "by round",
            {
                "x": [list(rounds)], "z": [over_rounds],
                "hovertemplate": ["client %{y}, round %{x}: FULL in " + share],
            },
            {
                "xaxis.title.text": "round", "xaxis.dtick": round_step(rounds[-1]),
                "xaxis.type": "linear",
            },
            "The share of subnets that are FULL. Empty: the client did not answer.",
        ),
        Option(
            "by subnet",
            {
                "x": [names], "z": [[short(row, 3) for row in subnets]],
                "hovertemplate": ["client %{y}, block.head %{x}: trained in " + share],
            },
            {
                "xaxis.title.text": "block.head", "xaxis.dtick": heads * (1 + (blocks - 1) // 12),
                "xaxis.type": "category",
            },
            "The share of rounds in which the subnet is planned to be trained.",
        ),
    ]  # fmt: skip
    figure = _map(rows, options, SHARES)
    return Chart(
        "who",
        "Heat map of clients by rounds, or by subnets: how much each client trained.",
        figure,
        _rows_are(clients),
        [Choice("show", options)],
        key=scale_key("0%", "100%"),
    )


def budget_map(clients: pd.DataFrame, rounds: Sequence[int]) -> Chart:
    """Draw what each client used of its budgets, round by round."""
    rows = map_rows(clients)
    options = []
    for name in limits_of(clients):
        column = f"{name}_share"
        over = int((clients[column] > 1).sum())
        limited = clients[clients[column].notna()]
        note = f"Used share of the {NAMES[name]} that budgets allow: mean "
        note += f"{limited[column].mean():.1%}, highest {limited[column].max():.1%}, {over:,} of "
        note += f"{len(limited):,} over it."
        z = _pivot(clients, rows, rounds, column, "max")
        options.append(Option(NAMES[name], {"z": [z]}, note=note))
    any_over = any(bool((clients[f"{name}_share"] > 1).any()) for name in LIMITS)
    figure = _map(rows, options, BUDGETS if any_over else SHARES)
    figure.update_traces(
        x=list(rounds), hovertemplate="client %{y}, round %{x}: %{z:.1%}<extra></extra>"
    )
    figure.update_xaxes(title_text="round", dtick=round_step(rounds[-1]))
    text = _rows_are(clients) + " It shows its highest client." * by_class(clients)
    text += " Empty: no limit, or did not work."
    return Chart(
        "budgets",
        "Heat map of clients by rounds: used share of each budget.",
        figure,
        text,
        [Choice("budget", options)],
        key=scale_key("0%", "100%", "over the budget" * any_over),
    )


def budget_bars(clients: pd.DataFrame) -> Chart:
    """Draw what device classes used of their budgets: means, and the highest client of all."""
    limits = limits_of(clients)
    devices = list(clients.groupby("device", sort=False))
    labels = [class_label(device, rows["client"].nunique()) for device, rows in devices]
    figure = blank(
        len(devices) * (BAR * len(limits) + 16) + 60,
        barmode="group", bargap=0.18,
        xaxis={"title": "used share of the budget", "tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "showgrid": False},
    )  # fmt: skip
    for name in limits:
        shares = [rows[f"{name}_share"] for _, rows in devices]
        means = np.array([s.mean() for s in shares])
        tops = np.array([s.max() for s in shares])
        figure.add_bar(
            x=short(means), y=labels, orientation="h", name=LIMIT_LABELS[name],
            marker={"color": LINES[LIMITS.index(name)]},
            text=[f"{LIMIT_LABELS[name]} {m:.0%}" if np.isfinite(m) else "" for m in means],
            textposition="auto", insidetextanchor="start", textangle=0, constraintext="none",
            insidetextfont_color="#fff" if name == LIMITS[0] else "#000",
            error_x={
                "type": "data", "array": short(tops - means), "arrayminus": [0] * len(tops),
                "color": GREY, "thickness": 1.5, "width": 4,
            },
            customdata=short(tops),
            hovertemplate="%{y}: mean %{x:.1%}, highest %{customdata:.1%}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=1, line={"color": GREY, "dash": "dash", "width": 1})
    return Chart(
        "classes",
        "Bar chart of device classes: mean used share of each budget.",
        figure,
        "Bars: mean over clients and rounds. Whiskers end at the highest. Dashed: all of the "
        "budget.",
    )


def _pivot(
    clients: pd.DataFrame, rows: list[Row], rounds: Sequence[int], column: str, how: str
) -> list[list[float | None]]:
    """Arrange a column by row and round: [rows][rounds], None where there is nothing."""
    row_of = {client: index for index, row in enumerate(rows) for client in row.clients}
    frame = clients.assign(row=clients["client"].map(row_of))
    table = frame.pivot_table(column, "row", "round", aggfunc=how)
    table = table.reindex(index=range(len(rows)), columns=list(rounds))
    return [short(line, 3) for line in table.to_numpy(dtype=float)]


def _trained_by(plan: PlanFile, rows: list[Row]) -> np.ndarray:
    """Return the share of a row's clients that train a subnet: float64 [rows, blocks * heads]."""
    at = {client: index for index, client in enumerate(plan.clients.tolist())}
    trained = plan.trained.reshape(len(plan.clients), -1)
    nothing = np.full(trained.shape[1], np.nan)
    places_of_rows = [[at[c] for c in row.clients if c in at] for row in rows]
    return np.stack(
        [trained[places].mean(axis=0) if places else nothing for places in places_of_rows]
    )


def _map(rows: list[Row], options: list[Option], axis: str) -> go.Figure:
    high = ROWS[1] if len(rows) <= 20 else ROWS[0]
    figure = blank(
        high * len(rows) + 70,
        xaxis={"showgrid": False},
        yaxis={
            "autorange": "reversed", "showgrid": False, "type": "category",
            "tickfont": {"size": 11}, "tickmode": "array", "tickvals": list(range(len(rows))),
            "ticktext": [row.label for row in rows],
        },
        **{axis: {"cmin": 0, "cmax": 2 if axis == BUDGETS else 1}},
    )  # fmt: skip
    first = {name: values[0] for name, values in options[0].data.items()}
    figure.add_heatmap(y=[row.label for row in rows], coloraxis=axis, xgap=0.5, ygap=1, **first)
    return figure.update_layout(options[0].layout)


def _rows_are(clients: pd.DataFrame) -> str:
    if by_class(clients):
        return "A row is a device class, with how many clients it has."
    return "A row is a client, named by its number and device class."
