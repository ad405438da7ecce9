"""What a run shows in a terminal and in Flower's log."""

from pathlib import Path
from typing import Any

from rich.table import Table

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.report.format import LABELS, USED, quantity, unit_of
from d2ft_fl.util.terminal import console, say


def header(config: RunConfig) -> None:
    """What is about to run, and what the columns of its lines mean."""
    say(
        f"{config.strategy}: {config.clients} clients, {config.rounds} rounds, {config.model} on "
        f"{config.dataset}, seed {config.seed}"
    )
    say(
        "per resource: mean client's use as a share of training everything / what its budget "
        "allows (worst client's use of its own budget)"
    )
    say(
        f"{'round':>7} {'accuracy':>8} {'loss':>6} "
        + " ".join(f"{label:^18}" for label in LABELS.values())
        + f" {'covered':>7} {'sim. time':>9}"
    )


def round_line(row: dict[str, Any]) -> None:
    """One finished round."""
    say(format_round(row))
    for failure in row["faults"]:
        say(f"        fault: {failure}")
    if out := row["sat_out"]:
        say(f"        {out} of {row['clients']} clients sat out: their budgets afford nothing")


def format_round(row: dict[str, Any]) -> str:
    """A round's line."""
    cells = []
    for name in LABELS:
        part = row[name]
        used = part["used_mean"] / max(1.0, part["full_mean"])
        allowed, worst = part["allowed_share"], part["worst"]
        limit = f"{allowed:.0%}" if allowed is not None else "any"
        cells.append(f"{used:>4.0%} /{limit:>5}" + (f" ({worst:>4.0%})" if worst else " " * 7))
    evaluated = f"{'-':>8} {'-':>6}"
    if row["accuracy"] is not None:
        evaluated = f"{row['accuracy']:>8.1%} {row['loss']:>6.3f}"
    return (
        f"{row['round']:>7} {evaluated} "
        + " ".join(f"{cell:^18}" for cell in cells)
        + f" {row['coverage']:>7.0%} {row['round_seconds']:>7.1f} s"
    )


def summary(result: dict[str, Any]) -> None:
    """The table at the end, and where everything lies."""
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
    console.print(table)
    say(
        f"accuracy {result['accuracy']:.1%} (best {result['best_accuracy']:.1%}) after "
        f"{result['rounds']} rounds, {result['coverage']:.0%} of the subnets trained, "
        f"{result['round_seconds']:.0f} s simulated, {result['wall_seconds']:.0f} s here"
    )
    say(
        f"work varies by {result['workload_variance']:.2f} between clients (variance over squared "
        f"mean); planning took {result['plan_seconds']:.2f} s"
    )
    if result["aggregation_error"] is not None:
        say(
            f"folding factors in was off by {result['aggregation_error']:.2g} of the exact change, "
            "mean over rounds"
        )
    if left := result["too_few_trainers"]:
        say(
            f"{left:.0%} of the slices that clients trained stayed as they were, mean over rounds: "
            "too few trained them to tell who is hostile (coupling = 'spread' and least-clients "
            "have more train each)"
        )
    if private := result["privacy"]:
        say(
            f"differential privacy: epsilon {private['epsilon']:.3g} at delta "
            f"{private['delta']:.1g}, noise {private['noise_multiplier']:.3g} times clip-norm "
            f"{private['clip_norm']:g}"
            + ("" if private["secret"] else "; noise-seed tells the noise: keep it to yourself")
        )
    broken = f"{result['violations']} budget violations"
    if not result["keeps_budgets"]:
        kept = ", ".join(result["keeps"]) or "none"
        broken += f" ({result['strategy']} keeps to budgets of {kept})"
    say(
        f"{broken}, {result['faults']} faults, {result['sat_out']} times a client sat out; "
        f"FLOPs as predicted for {result['flops_as_predicted']} of {result['client_rounds']} "
        f"client rounds{' (every pass counted)' if result['verified'] else ''}"
    )
    if result["scores"] and not result["scored"]:
        say(
            f"nobody could afford a scoring pass, for which the whole model comes down: scores of "
            f"{', '.join(result['scores'])} say nothing"
        )
    for line in result["trackers_switched_off"]:
        say(line)
    page = Path(result["folder"], "report.html")
    if page.is_file():
        say(f"report: {page}")
    say(f"run folder: {result['folder']}")
