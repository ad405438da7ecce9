"""What a run shows in a terminal and in Flower's log."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from d2ft_fl.budgets import Amount, Budget
from d2ft_fl.config import RunConfig

if TYPE_CHECKING:
    from d2ft_fl.bench import Row
    from d2ft_fl.bench_planner import Row as PlannerRow
    from d2ft_fl.choose import Candidate
    from d2ft_fl.devices import DeviceClasses
    from d2ft_fl.export import Exported
    from d2ft_fl.methods import Method
    from d2ft_fl.profile import Profile

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:  # a log or a pipe: do not fold tables to a width nobody asked for
    console = Console(highlight=False, soft_wrap=True, width=120)
LABELS = {"flops": "FLOPs", "memory": "memory", "bytes_up": "up", "bytes_down": "down"}
USED = {
    "flops": "FLOPs, all clients and rounds",
    "memory": "peak memory, mean client",
    "bytes_up": "bytes up, all clients and rounds",
    "bytes_down": "bytes down, all clients and rounds",
}
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def say(text: str) -> None:
    """One line."""
    console.print(text, markup=False)


def quantity(value: float, unit: str) -> str:
    """A number with a prefix and its unit: 1.23 GFLOP."""
    for factor, prefix in PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def unit_of(resource: str) -> str:
    """What a resource is counted in."""
    return "FLOP" if resource == "flops" else "B"


def way(entries: Mapping[str, Any]) -> str:
    """How a client runs its schedule, where that is not as it is configured, in few words.

    Args:
        entries: Of a :class:`~d2ft_fl.local_options.Way`, as ``clients.jsonl`` has them.
    """
    batch = entries.get("batch")
    tokens, passes = entries.get("tokens"), entries.get("accumulate") or 1
    up, down = entries.get("bits_up"), entries.get("bits_down")
    said = [
        f"batch {batch}" * bool(batch),
        f"{tokens} tokens" * bool(tokens),
        f"{passes} passes" * (passes > 1),
        "again" * bool(entries.get("checkpointing")),
        f"{up} bits both ways" if up and up == down else f"{up} bits up" * bool(up),
        f"{down} bits down" * bool(down and up != down),
    ]
    return ", ".join(filter(None, said))


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
    for fault in row["faults"]:
        say(f"        fault: {fault}")
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
