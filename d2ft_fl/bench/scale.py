"""Many clients: whole rounds of the project beside the bare floor and plain Flower's FedAvg.

Each side is a run of its own, of which the first round is left out; the sides take turns, and
figures are medians over all of their rounds, evaluation left out. On Flower's engine are plain
FedAvg, and the project twice: with everything FULL, and with ``d2ft`` at 60 % of the compute and
half of the bytes. The floor runs once with torch's linear layers, and once with the matrix products
of the project.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from d2ft_fl.bench.scale_sides import Job
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.flower.superlink import flower_environment, run_flower, superlink
from d2ft_fl.report.format import policy_words
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime import fork_server
from d2ft_fl.util.spelling import unknown

SIDES = ("floor", "products", "flower", "full", "d2ft")
FREE = "[classes.any]\n"
D2FT = '[classes.any]\nflops = "60 %"\nbytes-up = "50 %"\nbytes-down = "50 %"\n'
# Role of a process, by what its command line contains.
ROLES = {
    "worker": ("d2ft_fl.runtime.fork_server", "ray::ClientAppActor", "multiprocessing.spawn"),
    "server": ("flwr-simulation", "d2ft_fl.bench.scale_sides"),
}
SIDE = "from d2ft_fl.bench.scale_sides import main; main()"
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class ScaleBench:
    """What to measure, and how.

    Attributes:
        clients: Clients that take part in a round.
        examples: Examples of each client.
        model: Name of the model.
        image_size: Pixels a side; 0 keeps the model's own.
        batch_size: Examples of a step.
        rounds: Rounds of a run that count, besides one before them.
        repeats: Runs of each side, at most.
        sides: Sides to measure, of :data:`SIDES`.
        seconds: No side is run again that would end later, by what its runs took so far.
        workers: Processes that train.
    """

    clients: int
    examples: int
    model: str
    image_size: int
    batch_size: int
    rounds: int
    repeats: int
    sides: tuple[str, ...] = SIDES
    seconds: float = math.inf
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def check(self) -> "ScaleBench":
        """Return this, once it is known that it can be measured.

        Raises:
            ConfigError: When a number or side cannot be, or the job's configuration is refused.
        """
        for name in ("clients", "examples", "batch_size", "rounds", "repeats"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} {getattr(self, name)} must be 1 or more")
        if strange := [side for side in self.sides if side not in SIDES]:
            raise ConfigError(unknown("--side ", strange[0], SIDES))
        checked(self.job.config())
        return self

    @property
    def job(self) -> Job:
        """What every side does."""
        return Job(
            self.model, self.image_size, self.clients, self.examples, self.batch_size,
            self.rounds, self.workers,
        )  # fmt: skip


@dataclass
class Side:
    """What one side took.

    Attributes:
        seconds: Seconds of each round.
        parts: Of each round, seconds by what they were spent on.
        peak: Largest resident memory in bytes, of the server's process and of any worker.
        flops: FLOPs of all clients of each round, measured by the project.
        policies: How clients ran their schedules, in words -> client rounds.
    """

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)
    flops: list[int] = field(default_factory=list)
    policies: Counter[str] = field(default_factory=Counter)

    @property
    def policy(self) -> str:
        """The policy of most client rounds, in words, and the share that it has of them."""
        ((words, count),) = self.policies.most_common(1)
        share = count / self.policies.total()
        return words if share == 1 else f"{words} ({share:.0%} of client rounds)"

    def to_json(self) -> dict[str, Any]:
        """Return medians, and every round's seconds, as a mapping."""
        names = sorted({name for parts in self.parts for name in parts})
        split = {n: statistics.median(p.get(n, 0.0) for p in self.parts) for n in names}
        return {
            "seconds": statistics.median(self.seconds),
            "rounds": self.seconds,
            "parts": split,
            **({"flops": statistics.median(self.flops)} if self.flops else {}),
            **({"policy": self.policy} if self.policies else {}),
            **{f"{role}_peak_bytes": size for role, size in self.peak.items()},
        }


def bench_scale(bench: ScaleBench, done: Callable[[str], None]) -> dict[str, Any]:
    """Measure all sides; return what ``--json`` prints.

    Args:
        bench: What to measure, checked.
        done: Told what has been measured.
    """
    measured = {side: Side() for side in bench.sides}
    began = time.monotonic()
    for repeat in range(bench.repeats):
        took = time.monotonic() - began
        if repeat and took * (repeat + 1) / repeat > bench.seconds:
            break
        for name, side in measured.items():
            with _peaks(side.peak):
                _SIDES[name](bench, side)
            done(f"{name}, {repeat + 1} of {bench.repeats}")
    return {**asdict(bench), **_ratios(bench, measured)} | {
        "measured": {name: side.to_json() for name, side in measured.items()}
    }


def _ratios(bench: ScaleBench, measured: dict[str, Side]) -> dict[str, Any]:
    """Return ratios between sides, and the policy of ``d2ft``; None where a side was left out."""
    seconds = {name: statistics.median(side.seconds) for name, side in measured.items()}

    def ratio(side: str, over: str) -> float | None:
        return seconds[side] / seconds[over] if {side, over} <= seconds.keys() else None

    flops = {name: statistics.median(side.flops) for name, side in measured.items() if side.flops}
    overhead = beyond = None
    if "full" in measured:
        rounds = zip(measured["full"].seconds, measured["full"].parts, strict=True)
        gone = [(s, s - parts["train"]) for s, parts in rounds]
        overhead = statistics.median(rest / s for s, rest in gone)
        beyond = 1000 * statistics.median(rest for _, rest in gone) / bench.clients
    return {
        "own_ratio": ratio("d2ft", "full"),
        "flop_ratio": flops["d2ft"] / flops["full"] if {"d2ft", "full"} <= flops.keys() else None,
        "policy": measured["d2ft"].policy if "d2ft" in measured else None,
        "same_products_floor_ratio": ratio("full", "products"),
        "floor_ratio": ratio("full", "floor"),
        "overhead_ratio": overhead,
        "milliseconds_beyond_training": beyond,
        "full_flower_ratio": ratio("full", "flower"),
        "flower_fedavg_ratio": ratio("d2ft", "flower"),
    }


# -- the sides -----------------------------------------------------------------------------------


def _plain(name: str) -> Callable[[ScaleBench, Side], None]:
    def run(bench: ScaleBench, side: Side) -> None:
        with tempfile.TemporaryDirectory() as home:
            ended = subprocess.run(
                [sys.executable, "-c", SIDE, name, bench.job.to_json()],
                env={**flower_environment(Path(home)), "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        rounds = [float(line) for line in ended.stdout.splitlines() if _is_number(line)]
        if ended.returncode or len(rounds) != bench.rounds:
            output = ended.stderr.strip().splitlines()
            raise RunError(f"the side {name!r} failed: {output[-1] if output else 'no output'}")
        side.seconds += rounds

    return run


def _is_number(line: str) -> bool:
    return line.replace(".", "", 1).isdecimal()


def _ours(strategy: str, budgets: str) -> Callable[[ScaleBench, Side], None]:
    def run(bench: ScaleBench, side: Side) -> None:
        scratch = tempfile.mkdtemp(prefix="d2ft-bench-")
        file, folder = Path(scratch, "budgets.toml"), Path(scratch, "run")
        file.write_text(budgets)
        config: RunConfig = replace(
            bench.job.config(), strategy=strategy, budgets=str(file), run_folder=str(folder)
        )
        rows: list[dict[str, Any]] = []
        with fork_server.shared() as forks, superlink() as link:
            forks.start(link.log)
            run_flower(checked(config), folder, 0, rows.append, link)
        lines = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
        shutil.rmtree(scratch)  # that of a run that failed stays, with its log
        for row in rows[1:]:
            if row["faults"]:
                raise RunError(f"round {row['round']}: {row['faults'][0]}")
            side.seconds.append(row["wall_seconds"] - row["clock"].get("evaluate", 0.0))
            side.parts.append(_parts(row, bench.workers))
            worked = [line for line in lines if line["round"] == row["round"] and line["used"]]
            side.flops.append(sum(line["used"]["flops"] for line in worked))
            side.policies.update(_policy(bench, line) for line in worked)

    return run


def _policy(bench: ScaleBench, line: Mapping[str, Any]) -> str:
    """Return in words how a client ran its schedule, from its line of ``clients.jsonl``."""
    entries = line["policy"]
    entries = entries | {"batch": min(entries["batch"] or bench.batch_size, line["examples"])}
    return f"{line['examples']} of {bench.examples} examples, {policy_words(entries)}"


def _parts(row: dict[str, Any], workers: int) -> dict[str, float]:
    """Return a round's seconds by what they were spent on; aggregation goes on beside training."""
    clock = row["clock"]
    parts = {
        "plan": clock["ask"] + clock["plan"],
        "broadcast": clock["broadcast"],
        "train": clock["training"] / workers,
        "evaluate": clock.get("evaluate", 0.0),
    }
    idle = max(0.0, row["wall_seconds"] - sum(parts.values()))
    return {**parts, "fold": clock["fold"], "idle": idle}


_SIDES: dict[str, Callable[[ScaleBench, Side], None]] = {
    "floor": _plain("floor"),
    "products": _plain("products"),
    "flower": _plain("flower"),
    "full": _ours("fedavg", FREE),
    "d2ft": _ours("d2ft", D2FT),
}


@contextmanager
def _peaks(peak: dict[str, int]) -> Iterator[None]:
    """Record the largest resident memory of this process's descendants, by their roles."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            for process in psutil.Process().children(recursive=True):
                try:
                    line, size = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                for role, marks in ROLES.items():
                    if any(mark in line for mark in marks):
                        peak[role] = max(peak.get(role, 0), size)
                        break

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
