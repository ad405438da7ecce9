"""What a run shows in a terminal and in Flower's log."""

from pathlib import Path
from typing import Any

from rich.table import Table

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.report.format import LABELS, USED, metric_format, metric_label, quantity, unit_of
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.util.terminal import console, say

LEAST_WIDTH = 6  # characters of a metric's column


def title(config: RunConfig) -> None:
    """Show what is about to run; nothing is loaded for this."""
    say(
        f"{config.strategy}: {config.clients} clients, {config.rounds} rounds, {config.model} on "
        f"{config.dataset}, seed {config.seed}"
    )


def note(line: str) -> None:
    """Show what somebody who runs this may want to know of weights and data."""
    say(f"note: {line}")


def columns(config: RunConfig) -> None:
    """Show what the columns of a run's lines mean."""
    from d2ft_fl.rounds.components import Components  # brings PyTorch in

    say(
        "per resource: mean client's use as a share of training everything / what its budget "
        "allows (worst client's use of its own budget)"
    )
    names = MetricSpec.of(Components(config).task).names
    metrics = " ".join(f"{metric_label(name):>{_width(name)}}" for name in names)
    say(
        f"{'round':>7} {metrics} "
        + " ".join(f"{label:^18}" for label in LABELS.values())
        + f" {'covered':>7} {'sim. time':>9}"
    )


def _width(metric: str) -> int:
    return max(LEAST_WIDTH, len(metric))


def round_line(row: dict[str, Any]) -> None:
    """Show one finished round.

    Args:
        row: Its line of ``rounds.jsonl``.
    """
    say(format_round(row))
    for failure in row["faults"]:
        say(f"        fault: {failure}")
    if out := row["sat_out"]:
        clients = f"{out:.3g} of {row['clients']:.3g}"
        say(f"        {clients} clients sat out: their budgets afford nothing")


def format_round(row: dict[str, Any]) -> str:
    """Return a round's line of the table that :func:`header` begins."""
    cells = []
    for name in LABELS:
        part = row[name]
        used = part["used_mean"] / max(1.0, part["full_mean"])
        allowed, worst = part["allowed_share"], part["worst"]
        limit = f"{allowed:.0%}" if allowed is not None else "any"
        cells.append(f"{used:>4.0%} /{limit:>5}" + (f" ({worst:>4.0%})" if worst else " " * 7))
    return (
        f"{row['round']:>7} {_format_metrics(row)} "
        + " ".join(f"{cell:^18}" for cell in cells)
        + f" {row['coverage']:>7.0%} {row['round_seconds']:>7.1f} s"
    )


def _format_metrics(row: dict[str, Any]) -> str:
    spec = MetricSpec.from_entries(row)
    texts = {
        name: "-" if value is None else metric_format(spec, name).text(value)
        for name, value in row["metrics"].items()
    }
    return " ".join(f"{text:>{_width(name)}}" for name, text in texts.items())


def summary(result: dict[str, Any]) -> None:
    """Show what a run came to, and where everything lies.

    Args:
        result: What ``summary.json`` holds.
    """
    console.print(_resources(result))
    for line in (*_results(result), *_notes(result), *result["trackers_switched_off"]):
        say(line)
    page = Path(result["folder"], "report.html")
    if page.is_file():
        say(f"report: {page}")
    say(f"run folder: {result['folder']}")


def _resources(result: dict[str, Any]) -> Table:
    """Make the table of resources beside training everything."""
    table = Table(title="What it cost, beside the same clients training everything")
    for column, justify in (
        ("resource", "left"),
        ("used", "right"),
        ("everything", "right"),
        ("share", "right"),
        ("worst client of its budget", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, label in USED.items():
        r, unit = result["resources"][name], unit_of(name)
        worst = f"{r['worst']:.1%}" if r["worst"] is not None else "no budget"
        used, full = quantity(r["used"], unit), quantity(r["full"], unit)
        table.add_row(label, used, full, f"{r['share']:.0%}", worst)
    return table


def _results(result: dict[str, Any]) -> list[str]:
    """Say how good the model is, and what training it took."""
    spec = MetricSpec.from_entries(result)
    text = metric_format(spec, spec.primary).text
    return [
        f"{metric_label(spec.primary)} {text(result['metrics'][spec.primary])} (best "
        f"{text(result['best'])}) after "
        f"{result['rounds']} rounds, {result['coverage']:.0%} of the subnets trained, "
        f"{result['round_seconds']:.0f} s simulated, {result['wall_seconds']:.0f} s here",
        f"work varies by {result['workload_variance']:.2f} between clients (variance over squared "
        f"mean); planning took {result['plan_seconds']:.2f} s",
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    """Say what else there is to know: aggregation, privacy, budgets, faults, scores."""
    notes = []
    if result["aggregation_error"] is not None:
        notes.append(
            f"aggregation of factors was off by {result['aggregation_error']:.2g} of the exact "
            "change, mean over rounds"
        )
    if left := result["too_few_trainers"]:
        notes.append(
            f"{left:.0%} of the slices that clients trained stayed as they were, mean over rounds: "
            "too few trained them to tell who is hostile (coupling = 'spread' and least-clients "
            "have more train each)"
        )
    if private := result["privacy"]:
        notes.append(
            f"differential privacy: epsilon {private['epsilon']:.3g} at delta "
            f"{private['delta']:.1g}, noise {private['noise_multiplier']:.3g} times clip-norm "
            f"{private['clip_norm']:g}"
            + ("" if private["secret"] else "; noise-seed tells the noise: keep it to yourself")
        )
    broken = f"{result['violations']} budget violations"
    if not result["keeps_budgets"]:
        kept = ", ".join(result["keeps"]) or "none"
        broken += f" ({result['strategy']} keeps to budgets of {kept})"
    if result["faults"] is None:
        notes.append(
            f"{broken} in plans; figures are of all clients' plans, not of what clients did, which "
            "noise does not hide: private.jsonl has that"
        )
    else:
        notes.append(
            f"{broken}, {result['faults']} faults, {result['sat_out']} times a client sat out; "
            f"FLOPs as predicted for {result['flops_as_predicted']} of {result['client_rounds']} "
            f"client rounds{' (every pass counted)' if result['verified'] else ''}"
        )
    if result["scores"] and not result["scored"]:
        notes.append(
            f"nobody could afford a scoring pass, for which the whole model comes down: scores of "
            f"{', '.join(result['scores'])} say nothing"
        )
    return notes
