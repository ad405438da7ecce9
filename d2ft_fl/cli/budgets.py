"""``d2ft budgets`` and ``d2ft profile``: what clients can afford."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from d2ft_fl.cli.common import DEVICE, failures
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.terminal import console, say

if TYPE_CHECKING:
    from d2ft_fl.budgets.budget import Amount, Budget
    from d2ft_fl.budgets.device_classes import DeviceClasses
    from d2ft_fl.budgets.machine import Profile


def budgets_command(
    source: Annotated[
        str, typer.Argument(help="A TOML file of device classes, devices, or hardware.")
    ],
    clients: Annotated[int, typer.Option(min=1, help="Clients to spread over the classes.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print classes as JSON only.")] = False,
) -> None:
    """Check a file of budgets and show what it means."""
    from d2ft_fl.budgets import device_classes

    with failures():
        found = device_classes.named(source)
    rows = found.to_json(clients)
    if as_json:
        typer.echo(write_json({"varies": found.varies, "classes": rows}))
        return
    _budgets_table(source, clients, found)


def _budgets_table(source: str, clients: int, found: "DeviceClasses") -> None:
    """Print device classes, one a row; columns that no class has anything in are left out."""
    from d2ft_fl.report.format import LABELS

    counts = found.counts(clients)
    heads = ("share", "clients", *LABELS.values(), "of process", "speed", "net up", "net down")
    heads = (*heads, "deadline")
    rows = [
        (
            f"{found.mix.share(name):.1%}",
            str(counts[name]),
            *_budget_cells(device.budget),
            str(device.trace or "-"),
        )
        for name, device in found.classes.items()
    ]
    shown = [i for i in range(len(rows[0])) if any(row[i] != "-" for row in rows)]
    table = Table(title=f"{escape(source)}, for {clients} clients", title_justify="left")
    table.add_column("class", no_wrap=True)
    for i in shown:
        table.add_column((*heads, "trace")[i], justify="right")
    for name, row in zip(found.classes, rows, strict=True):
        table.add_row(escape(name), *(row[i] for i in shown))
    console.print(table)
    say("% of training everything on a client's own data; no figure, no limit")
    if any(device.budget.of_process for device in found.classes.values()):
        say("of process: what comes off its memory for all but tensors")
    if found.varies:
        say("traces lower budgets by round; clients are asked before each")


def _budget_cells(budget: "Budget") -> list[str]:
    from d2ft_fl.report.format import LABELS, quantity, unit_of

    def amount(value: "Amount | None", unit: str) -> str:
        if value is None:
            return "-"
        return f"{100 * value.value:.3g} %" if value.relative else quantity(value.value, unit)

    def rate(value: float | None, unit: str) -> str:
        return "-" if value is None else quantity(value, unit)

    bits_up, bits_down = (
        None if b is None else 8 * b for b in (budget.bandwidth_up, budget.bandwidth_down)
    )
    return [
        *(amount(getattr(budget, name), unit_of(name)) for name in LABELS),
        rate(budget.memory_base if budget.of_process else None, "B"),
        rate(budget.speed, "FLOP/s"),
        rate(bits_up, "bit/s"),
        rate(bits_down, "bit/s"),
        "-" if budget.deadline is None else f"{budget.deadline:g} s",
    ]


def profile_command(
    threads: Annotated[int, typer.Option(help="Threads of torch, on a CPU.")] = 1,
    device: Annotated[str, typer.Option(help="What to measure.", click_type=DEVICE)] = "cpu",
    precision: Annotated[str, typer.Option(help="Of products: fp32 or bf16.")] = "fp32",
    output: Annotated[
        Path | None, typer.Option(help="A file for the curve, which a device class can name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Measure how fast this machine trains, and memory: free, and of a worker; keep both.

    It takes some seconds. budgets = "measured" has every client do so once. Runs predict their
    clients' seconds by it.
    """
    from d2ft_fl.budgets.kept_speeds import path_of, write_curve
    from d2ft_fl.budgets.machine import profile
    from d2ft_fl.runtime.worker_memory import measure

    with failures():
        found = replace(profile(device, threads, precision), base=measure())
        if output is not None:
            write_curve(found.speed, output)
    if as_json:
        typer.echo(write_json(found.to_json()))
        return
    _profile_table(found)
    say(f"kept in {path_of(device, precision, threads)}\n\nfor a file of budgets:\n")
    say(found.to_toml(str(output or "")).rstrip())


def _profile_table(found: "Profile") -> None:
    """Print how fast a machine multiplies by shapes, and what all else takes."""
    from d2ft_fl.report.format import quantity, seconds

    speed = found.speed
    title = f"This machine: {speed.device}, {speed.precision}, threads {speed.threads}"
    table = Table(title=f"{title}; GFLOP/s of products", title_justify="left")
    table.add_column("rows", justify="right")
    for width in speed.widths:
        table.add_column(f"width {width:g}", justify="right")
    for index, rows in enumerate(speed.rows):
        start = index * len(speed.widths)
        rates = speed.products[0][start : start + len(speed.widths)]
        table.add_row(f"{rows:g}", *(f"{rate / 1e9:.1f}" for rate in rates))
    console.print(table)
    rest = Table(title="and besides", title_justify="left")
    rest.add_column("measured")
    rest.add_column("", justify="right")
    rest.add_row("attention, forward, at most", quantity(max(speed.attention[0]), "FLOP/s"))
    if speed.traffic:
        rest.add_row("element by element", quantity(1 / speed.traffic, "B/s"))
    for label, name in (
        ("a branch that trains", "branch"),
        ("... of which not all is FULL, besides", "mixed"),
        ("a branch that only runs forward", "silent"),
        ("another head group", "group"),
        ("a pass", "passes"),
        ("an optimizer step", "step"),
        ("... for each tensor", "tensor"),
        ("a message", "message"),
    ):
        rest.add_row(label, seconds(getattr(speed, name)))
    rest.add_row("memory it could have", quantity(found.free, "B"))
    if found.base is not None:
        rest.add_row("a worker process, before any model", quantity(found.base, "B"))
    console.print(rest)
