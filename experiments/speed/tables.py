"""Write the speed tables of README, and `docs/step.png`, from what `measure.py` kept.

A table stands between `<!-- speed: NAME -->` and `<!-- /speed -->`; everything in between is
replaced.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = ("README.md",)
PLACE = re.compile(r"(<!-- speed: (\w+) -->\n).*?(<!-- /speed -->)", re.DOTALL)
SIDES = {
    "floor": "two plain processes that train and average",
    "products": "the same with the project's products",
    "flower": "plain Flower, FedAvg",
    "full": "`fedavg` here",
    "d2ft": "`d2ft` at 60 % FLOPs, half of the bytes",
}


def kept(name: str) -> dict[str, Any]:
    """Return what `measure.py` kept of a benchmark."""
    found: dict[str, Any] = json.loads(HERE.joinpath("results", f"{name}.json").read_text())
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(found: dict[str, Any]) -> str:
    """Return a line that says where figures are from."""
    what = f"`{found['command']}` at {found['commit']}"
    return f"\n*{what}, {found['date']}: {found['machine']}.*\n"


def step(name: str) -> str:
    """Return the table of whole training steps: times of each batch size, over ours and timm's."""
    found = kept(name)
    rows = found["results"]
    sizes = sorted({row["batch_size"] for row in rows})
    of_sizes = [[row for row in rows if row["batch_size"] == size] for size in sizes]
    heads = ["schedule", "FLOPs", *(f"batch {size}" for size in sizes), "activations"]
    lines = []
    for alike in zip(*of_sizes, strict=True):
        row = alike[0]
        times = [f"{one['own_time_ratio']:.2f} / {one['time_ratio']:.2f}" for one in alike]
        flops, activations = (f"{row[k]:.2f}" for k in ("own_flop_ratio", "activation_ratio"))
        lines.append([_operations(row["schedule"]), flops, *times, activations])
    return table(heads, lines) + predicted(rows) + source(found)


def predicted(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line that says how well the cost model predicted what steps took."""
    exact = sum(row["flops_as_predicted"] for row in rows)
    within = [
        math.ceil(max(100 * abs(row[f"predicted_{name}"] / row[name] - 1) for row in rows))
        for name in ("activation_ratio", "peak_memory_ratio")
    ]
    return (
        f"\nFLOPs are as predicted in {exact} of {len(rows)} cases; activations are predicted "
        f"within {within[0]} %, peak memory within {within[1]} %.\n"
    )


def lora() -> str:
    """Return the table of LoRA's steps beside peft's."""
    found = kept("lora")
    names = ("flop_ratio", "time_ratio", "own_time_ratio", "activation_ratio", "peak_memory_ratio")
    heads = ["schedule", "FLOPs", "time", "time, own all `FULL` = 1", "activations", "peak memory"]
    lines = [
        [_operations(row["schedule"]), *(f"{row[name]:.2f}" for name in names)]
        for row in found["results"]
    ]
    return table(heads, lines) + source(found)


def scale() -> str:
    """Return the table of whole rounds of many clients."""
    found = kept("scale")
    results = found["results"]
    sides = {side: SIDES[side] for side in results["measured"]}
    seconds = [f"{results['measured'][side]['seconds']:.1f} s" for side in sides]
    of_flower = results["flower_fedavg_ratio"]
    said = (
        f"\n`d2ft` takes {results['own_ratio']:.2f} of `fedavg`'s time for "
        f"{results['flop_ratio']:.2f} of its FLOPs, and {of_flower:.2f} of plain Flower's time.\n"
    )
    return table(list(sides.values()), [seconds]) + said + source(found)


def start() -> str:
    """Return the table of start-up."""
    found = kept("start")
    r = found["results"]
    rows = [
        ("`d2ft --help`", r["help"]),
        ("`d2ft strategies`", r["strategies"]),
        ("importing PyTorch and timm, for comparison", r["imports"]),
        ("`d2ft run --backend local`: first line", r["local_first_line"]),
        ("round 1 begins", r["local_begins"]),
        ("round 1 begins, nothing compiled", r["local_cold_begins"]),
        ("Flower's smallest app: round 1 ends", r["flower_minimal"]),
        ("`d2ft run`, through Flower: round 1 ends", r["flower_first_round"]),
        ("the same, nothing compiled", r["flower_cold_first_round"]),
    ]
    private, tensors = (r[name] / 1e6 for name in ("worker_private_dirty", "worker_tensors"))
    said = (
        f"\nA worker process that has trained has {private:.0f} MB of its own, of which "
        f"{tensors:.0f} MB are tensors; PyTorch's it shares with all others.\n"
    )
    seconds = [[what, f"{value:.1f}"] for what, value in rows]
    return table(["", "seconds"], seconds) + said + source(found)


TABLES: dict[str, Callable[[], str]] = {
    "step": lambda: step("step"),
    "step_slots": lambda: step("step_slots"),
    "step_mkl": lambda: step("step_mkl"),
    "lora": lora,
    "scale": scale,
    "start": start,
}


def _operations(schedule: str) -> str:
    """Return a schedule's name with its operations as code."""
    return re.sub(r"FULL|FROZEN|FORWARD_ONLY|SHORTCUT", r"`\g<0>`", schedule)


def written(page: str) -> str:
    """Return a page with its tables written anew."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}{place[3]}", page)


def draw() -> None:
    """Draw `docs/step.png`, of batches of 8."""
    from d2ft_fl.bench.step import Row, StepBench
    from d2ft_fl.bench.step_picture import draw as draw_rows

    rows = [Row(**row) for row in kept("step")["results"] if row["batch_size"] == 8]
    bench = StepBench("vit_small_patch16_224", 0, 8, 2, "cpu", "fp32", 1)
    draw_rows([rows], [bench], ROOT / "docs" / "step.png")


def main() -> None:
    """Write all tables and the picture."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
