"""Tables of a run: resources, device classes, clients, rounds."""

import math
from typing import Any

import pandas as pd

from d2ft_fl.budgets.budget import DEADLINE, LIMITS
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.report import html
from d2ft_fl.report.format import (
    LABELS,
    NUMBER,
    OPERATIONS,
    USED,
    metric_format,
    metric_label,
    quantity,
    seconds,
    unit_of,
)
from d2ft_fl.report.run_folder import SUMMED, RunFolder, limits_of
from d2ft_fl.subnets.schedule import Operation

MOST_ROWS = 1000
BY_CLIENT, BY_CLASS = ["client", "device"], ["device"]


def resources(run: RunFolder) -> str:
    """Make a table of each resource used, beside training everything and beside budgets."""
    rows = []
    for name, label in USED.items():
        part, unit = run.totals["resources"][name], unit_of(name)
        worst = "no budget" if part["worst"] is None else f"{part['worst']:.1%}"
        allowed = run.rounds[f"{name}_allowed"].mean()
        rows.append(
            html.words(label)
            + html.cells(
                quantity(part["used"], unit),
                quantity(part["full"], unit),
                f"{part['share']:.0%}",
                "any" if math.isnan(allowed) else f"{allowed:.0%}",
                worst,
            )
        )
    heads = ["resource", "used", "everything", "share", "allowed", "worst client of its budget"]
    return html.table(heads, rows, 1)


def clients(frame: pd.DataFrame, keys: list[str]) -> str:
    """Make a table of clients, or of device classes, over all rounds.

    Args:
        frame: As :attr:`RunFolder.clients`.
        keys: ``BY_CLIENT``; or ``BY_CLASS``, with figures of the mean client of each class.
    """
    limits = limits_of(frame)
    operations = [op for op in reversed(Operation) if op is Operation.FULL or frame[op.name].any()]
    ranks = bool(frame["rank"].nunique() > 1)
    deadline = DEADLINE in limits
    heads = keys + ["clients"] * (keys == BY_CLASS) + ["examples"]
    heads += [OPERATIONS[op.name.lower()] for op in operations]
    heads += ["rank"] * ranks + [LABELS[name] for name in RESOURCES] + [DEADLINE] * deadline
    policies = bool(frame["policy"].any())
    losses = bool(frame["train_loss"].notna().any() or frame["fault"].notna().any())
    here = bool(frame["predicted_seconds"].notna().any())
    heads += [
        "time",
        *["trained here", "predicted"] * here,
        *["loss"] * losses,
        "sat out",
        *["faults"] * losses,
        *["policy"] * policies,
    ]
    groups = _grouped(frame, keys)
    rows = []
    for g in groups[:MOST_ROWS].to_dict("records"):
        row = html.words(*(str(g[key]) for key in keys))
        row += html.valued(f"{g['count']:,}", g["count"]) * (keys == BY_CLASS)
        row += html.valued(f"{g['examples']:,.0f}", g["examples"])
        row += "".join(html.valued(f"{g[op.name]:.0%}", g[op.name]) for op in operations)
        row += html.valued(f"{g['rank']:.3g}", g["rank"]) * ranks
        row += "".join(_used(g, name) for name in RESOURCES)
        row += _used(g, DEADLINE) * deadline
        row += html.valued(seconds(g["seconds"]), g["seconds"])
        for name in ("training_seconds", "predicted_seconds") if here else ():
            row += html.valued(seconds(g[name]), g[name])
        row += html.valued(f"{g['train_loss']:.3g}", g["train_loss"]) * losses
        row += html.cells(str(g["sat_out"]), *[str(g["fault"])] * losses)
        rows.append(row + html.words(g["policy"]) * policies)
    more = len(groups) - len(rows)
    note = f'<p class="note">and {more:,} more</p>' if more else ""
    return html.table(heads, rows, len(keys), sortable=True) + note


def _grouped(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Sum over rounds for the mean client of each group; average what does not add up."""
    means = [op.name for op in Operation] + ["examples", "rank"]
    shares = [f"{name}_share" for name in LIMITS]
    frame = frame.astype(dict.fromkeys(SUMMED, float)).assign(
        memory=frame["memory"].where(frame["worked"]), fault=frame["fault"].notna()
    )
    grouped = frame.groupby(keys, sort=False)
    out = grouped[[*means, *shares, "memory"]].mean()
    out["count"] = grouped["client"].nunique()
    for name in (*SUMMED, "seconds", "training_seconds", "predicted_seconds"):
        out[name] = grouped[name].sum() / out["count"]  # of floats: FLOPs are beyond int64
    for name in ("sat_out", "fault"):
        out[name] = grouped[name].sum()
    for name in shares:
        out[f"{name}_worst"] = grouped[name].max()
    trained = frame[frame["train_loss"].notna()]
    last = trained[trained["round"] == trained.groupby(keys)["round"].transform("max")]
    out["train_loss"] = last.groupby(keys)["train_loss"].mean()
    out["policy"] = frame[frame["worked"]].groupby(keys)["policy"].agg(_most_common)
    out["policy"] = out["policy"].fillna("")
    return out.reset_index()


def _most_common(policies: "pd.Series[str]") -> str:
    """Name the execution policy used most often, and how often where not always."""
    counts = policies.value_counts()
    often = float(counts.iloc[0] / counts.sum())
    return f"{counts.index[0] or '-'}" + f" ({often:.0%})" * (often < 1)


def _used(group: dict[str, Any], name: str) -> str:
    """Return a cell of an amount and the mean used share of its budget, marked if one broke it."""
    amount = ""
    if name in RESOURCES:
        used = group[name]
        amount = "-" if math.isnan(used) else quantity(used, unit_of(name))
    mean, worst = group[f"{name}_share"], group[f"{name}_share_worst"]
    if math.isnan(mean):
        return html.cells(amount or "-")
    return html.share_cell(f"{amount} {mean:.0%}".strip(), worst if worst > 1 else mean)


def rounds(run: RunFolder) -> str:
    """Make a table of all rounds."""
    frame, metrics, spec = run.rounds, run.metrics, run.spec
    error = bool(frame["aggregation_error"].notna().any())
    private = bool(frame["epsilon"].notna().any())
    measured = not run.planned
    heads = ["round", *map(metric_label, spec.names), *["train loss"] * measured]
    heads += [LABELS[name] for name in RESOURCES]
    heads += ["covered", "time", *["aggregation error"] * error]
    heads += [*["epsilon"] * private, "sat out", *["faults"] * measured, "violations"]
    rows = [
        html.cells(
            str(r["round"]),
            *(_known(m[name], metric_format(spec, name).value) for name in spec.names),
            *[_known(r["train_loss"], NUMBER.value)] * measured,
            *(f"{r[f'{name}_share']:.0%}" for name in RESOURCES),
            f"{r['coverage']:.0%}", seconds(r["sum_seconds"]),
            *[_known(r["aggregation_error"], ".2g")] * error,
            *[_known(r["epsilon"], ".3g")] * private,
            f"{r['sat_out']:.10g}", *[str(r["faults"])] * measured, str(r["violations"]),
        )
        for r, m in zip(
            frame[-MOST_ROWS:].to_dict("records"), metrics[-MOST_ROWS:].to_dict("records"),
            strict=True,
        )
    ]  # fmt: skip
    return html.table(heads, rows)


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
