"""What a run shows in a terminal and in Flower's log."""

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from d2ft_fl.budgets.budget import Amount, Budget
from d2ft_fl.report.format import LABELS, quantity, unit_of
from d2ft_fl.util.terminal import console, say

if TYPE_CHECKING:
    from d2ft_fl.bench.planner import Row as PlannerRow
    from d2ft_fl.bench.step import Row
    from d2ft_fl.budgets.device_classes import DeviceClasses
    from d2ft_fl.budgets.machine import Profile
    from d2ft_fl.models.export import Exported
    from d2ft_fl.preview.model_selection import Candidate
    from d2ft_fl.rounds.strategies import Method


def bench_table(rows: list["Row"], tuning: str) -> None:
    """Schedules beside training all of the timm model the same way, which is 1 everywhere."""
    other = "LoRA of all products by peft" if tuning == "lora" else "Full fine-tuning"
    table = Table(title=f"{other}, of the unmodified timm model = 1", title_justify="left")
    table.add_column("schedule")
    heads = ("FLOPs", "time", "activations", "predicted", "peak memory", "predicted", "reset")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        numbers = (
            row.flop_ratio,
            row.time_ratio,
            row.activation_ratio,
            row.predicted_activation_ratio,
            row.peak_memory_ratio,
            row.predicted_peak_memory_ratio,
            row.reset_ratio,
        )
        table.add_row(row.schedule, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    wrong = [row.schedule for row in rows if not row.flops_as_predicted]
    say(f"FLOPs not as predicted: {', '.join(wrong)}" if wrong else "FLOPs as predicted, exactly")


def budgets_table(source: str, clients: int, found: "DeviceClasses") -> None:
    """Device classes, one a row; columns that no class has anything in are left out."""
    counts = found.counts(clients)
    heads = ("share", "clients", *LABELS.values(), "speed", "net up", "net down", "deadline")
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
    if found.varies:
        say("traces lower budgets by round; clients are asked before each")


def _budget_cells(budget: Budget) -> list[str]:
    def amount(value: Amount | None, unit: str) -> str:
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
        rate(budget.speed, "FLOP/s"),
        rate(bits_up, "bit/s"),
        rate(bits_down, "bit/s"),
        "-" if budget.deadline is None else f"{budget.deadline:g} s",
    ]


def profile_table(found: "Profile") -> None:
    """What a machine affords, and the class of it for a file of budgets."""
    table = Table(title=f"This machine: {found.device}, threads {found.threads}")
    table.add_column("measured")
    table.add_column("", justify="right")
    table.add_row("feed-forward products", quantity(found.speeds.products, "FLOP/s"))
    table.add_row("attention's products", quantity(found.speeds.attention, "FLOP/s"))
    table.add_row("both together", quantity(found.speeds.speed, "FLOP/s"))
    table.add_row("memory it could have", quantity(found.free, "B"))
    console.print(table)
    say("for a file of budgets:\n")
    say(found.to_toml().rstrip())


def planner_table(rows: list["PlannerRow"]) -> None:
    """How long planning took, and how far from the optimum it ended."""
    table = Table(
        title="One core; gaps to HiGHS, or to the dual bound of coupled clients",
        title_justify="left",
    )
    heads = ("clients", "coupling", "operations", "seconds", "gap mean", "gap worst", "certified",
             "violations", "short", "peak MB", "over two stages", "at least")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "coupling" else "right")

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    for r in rows:
        table.add_row(
            str(r.clients), r.coupling, str(r.operations), f"{r.seconds:.3f}", percent(r.gap_mean),
            percent(r.gap_worst), percent(r.certified_mean), str(r.violations),
            str(r.short_subnets), f"{r.peak_mb:.0f}", percent(r.two_stage_gain),
            percent(r.two_stage_worst),
        )  # fmt: skip
    console.print(table)


SIDE_NAMES = {
    "floor": "floor: plain processes that train and average",
    "flower": "Flower's FedAvg, quickstart client",
    "full": "this project, everything FULL",
    "d2ft": "this project, d2ft at 60 % compute, 50 % bytes",
}


def scale_table(found: dict[str, Any]) -> None:
    """Rounds of each side: seconds, what they were spent on, memory."""
    table = Table(
        title=f"{found['clients']} clients x {found['examples']} examples, {found['model']}, "
        f"{found['workers']} workers: seconds of a round",
        title_justify="left",
    )
    parts = ("plan", "broadcast", "train", "evaluate", "idle", "fold")
    heads = ("round", *parts, "server", "worker")
    table.add_column("side", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    for name, side in found["measured"].items():
        split = [f"{side['parts'][p]:.2f}" if p in side["parts"] else "" for p in parts]
        sizes = [side.get(f"{role}_peak_bytes") for role in ("server", "worker")]
        table.add_row(
            SIDE_NAMES[name], f"{side['seconds']:.2f}", *split,
            *("" if size is None else quantity(size, "B") for size in sizes),
        )  # fmt: skip
    console.print(table)
    say("folding goes on while others train; the last columns are peaks of resident memory")
    for key, label in (
        ("floor_ratio", "everything FULL over the floor"),
        ("full_flower_ratio", "everything FULL over Flower's FedAvg"),
        ("flower_fedavg_ratio", "d2ft over Flower's FedAvg"),
        ("overhead_ratio", "share of a FULL round beyond training"),
    ):
        if found[key] is not None:
            say(f"{label}: {found[key]:.3f}")
    if found["milliseconds_beyond_training"] is not None:
        say(f"a FULL client beyond its training: {found['milliseconds_beyond_training']:.1f} ms")


def candidates_table(found: list["Candidate"]) -> None:
    """Models to choose from, one a row."""
    table = Table(title="Layers that clients can train", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("layers", "trained, mean", "share", "clients sitting out", "subnets trained"):
        table.add_column(column, justify="right")
    for c in found:
        share = c.trained_layers / c.layers
        table.add_row(
            escape(c.model) + (" *" if c.chosen else ""), str(c.layers),
            f"{c.trained_layers:.2f}", f"{share:.0%}", str(c.sit_out), f"{c.coverage:.0%}",
        )  # fmt: skip
    console.print(table)
    best = next(c for c in found if c.chosen)
    say(f"* most layers trained by the mean client: {best.model}")


def methods_table(found: list["Method"]) -> None:
    """Strategies, one a row."""
    table = Table(title="Strategies", title_justify="left")
    for column in ("strategy", "what it does", "keeps budgets of"):
        table.add_column(column, no_wrap=column == "strategy")
    for m in found:
        table.add_row(m.name, escape(m.summary), m.kept)
    console.print(table)
    say("one of them in full, with its paper: d2ft strategies NAME")


def method(found: "Method") -> None:
    """One strategy in full."""
    say(f"{found.name}: {found.text}")
    if found.paper:
        say(f"\n{found.paper}")
    say(f"\nkeeps budgets of: {found.kept}")


def exported(found: "Exported") -> None:
    """What was written, and how to load it."""
    what = "whole weights"
    if found.rank is not None:
        what = f"an adapter of rank {found.rank} of {', '.join(found.targets)}"
    say(f"{found.folder}: {what} for {found.format}, {quantity(found.bytes, 'B')}")
    for line in ("load it with", *(f"    {line}" for line in found.load)):
        say(line)
