"""What ``d2ft bench`` prints."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from d2ft_fl.report.format import quantity
from d2ft_fl.util.terminal import console, say

if TYPE_CHECKING:
    from d2ft_fl.bench.planner import Row as PlannerRow
    from d2ft_fl.bench.step import Row

SIDE_NAMES = {
    "floor": "floor: plain processes that train and average",
    "products": "the floor with this project's matrix products",
    "flower": "Flower's FedAvg, quickstart client",
    "full": "this project, everything FULL",
    "d2ft": "this project, d2ft at 60 % compute, 50 % bytes",
}


def step_table(rows: list["Row"], tuning: str) -> None:
    """Print schedules beside full training of the timm model, which is 1 everywhere."""
    other = "LoRA of all products by peft" if tuning == "lora" else "Full fine-tuning"
    table = Table(title=f"{other}, of the unmodified timm model = 1", title_justify="left")
    table.add_column("batch", justify="right")
    table.add_column("schedule")
    heads = ("FLOPs", "time", "FLOPs, own = 1", "time, own = 1", "activations", "predicted",
             "peak memory", "predicted", "reset")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        numbers = (
            row.flop_ratio,
            row.time_ratio,
            row.own_flop_ratio,
            row.own_time_ratio,
            row.activation_ratio,
            row.predicted_activation_ratio,
            row.peak_memory_ratio,
            row.predicted_peak_memory_ratio,
            row.reset_ratio,
        )
        table.add_row(str(row.batch_size), row.schedule, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    wrong = [row.schedule for row in rows if not row.flops_as_predicted]
    say(f"FLOPs not as predicted: {', '.join(wrong)}" if wrong else "FLOPs as predicted, exactly")


def planner_table(rows: list["PlannerRow"]) -> None:
    """Print how long planning took, and how far from the optimum it ended."""
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


def scale_table(found: dict[str, Any]) -> None:
    """Print the rounds of each side: seconds, what they were spent on, memory."""
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
    say(
        "aggregation (fold) goes on while others train; "
        "the last columns are peaks of resident memory"
    )
    for key, label in (
        ("own_ratio", "d2ft over everything FULL"),
        ("flop_ratio", "FLOPs of d2ft over those of everything FULL"),
        ("same_products_floor_ratio", "everything FULL over the floor with its products"),
        ("floor_ratio", "everything FULL over the floor"),
        ("full_flower_ratio", "everything FULL over Flower's FedAvg"),
        ("flower_fedavg_ratio", "d2ft over Flower's FedAvg"),
        ("overhead_ratio", "share of a FULL round beyond training"),
    ):
        if found[key] is not None:
            say(f"{label}: {found[key]:.3f}")
    if found["policy"] is not None:
        say(f"d2ft's policy: {found['policy']}")
    if found["milliseconds_beyond_training"] is not None:
        say(f"a FULL client beyond its training: {found['milliseconds_beyond_training']:.1f} ms")


START_LABELS = {  # figures of ``d2ft bench start``, in the order in which they are shown
    "help": "d2ft --help",
    "strategies": "d2ft strategies",
    "imports": "importing PyTorch and timm",
    "local_first_line": "d2ft run --backend local: first line",
    "local_begins": "... round 1 begins",
    "local_begins_after_imports": "... after what importing takes",
    "local_first_round": "... round 1 ends",
    "local_cold_first_round": "... where nothing is compiled",
    "local_compiling": "... later, for compiling",
    "flower_minimal": "Flower's smallest app: round 1 ends",
    "flower_first_round": "d2ft run: round 1 ends",
    "flower_cold_first_round": "... where nothing is compiled",
    "flower_cold_after_minimal": "... later than Flower's smallest app",
}


def start_table(found: dict[str, Any]) -> None:
    """Print what starting takes."""
    table = Table(title="start-up: seconds from the command on", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("seconds", justify="right")
    for name, label in START_LABELS.items():
        if name in found:
            table.add_row(label, f"{found[name]:.2f}")
    console.print(table)
    if "flower_ratio" in found:
        say(f"round 1 through Flower over Flower's smallest app: {found['flower_ratio']:.3f}")
    if "worker_private_dirty" in found:
        say(
            f"a worker's private memory after its first client: "
            f"{quantity(found['worker_private_dirty'], 'B')}, "
            f"of which tensors took up to {quantity(found['worker_tensors'], 'B')}"
        )
