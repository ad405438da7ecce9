"""Start-up: ``d2ft bench start``.

Commands run in fresh processes and take turns with their yardsticks: importing PyTorch and timm,
and Flower's own smallest app, which is written into a temporary folder. Seconds count from the
start of the command. What is *cold* has an empty cache folder: nothing is compiled. *Warm* ones
have a cache folder that an earlier run filled.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.flower.superlink import flower_environment
from d2ft_fl.runtime import guard
from d2ft_fl.util.spelling import unknown
from d2ft_fl.util.strict_json import write_json

PARTS = ("lists", "local", "flower", "worker")
TIMEOUT = 300.0
IMPORTS = "import torch, timm"
ROUND_ONE = re.compile(r"\s+1 ")  # the line of the first round
WORKER = "from d2ft_fl.bench.start import worker; worker()"
# Flower's smallest app: one round of FedAvg over one array, on the nodes of a simulation.
MINIMAL_PROJECT = """[project]
name = "minimal"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = ["flwr[simulation]"]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "minimal:server"
clientapp = "minimal:client"
"""
MINIMAL_APP = """import pathlib
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    metrics = MetricRecord({{"num-examples": 1}})
    content = RecordDict({{"arrays": message.content["arrays"], "metrics": metrics}})
    return Message(content, reply_to=message)


@server.main()
def main(grid, context):
    initial = ArrayRecord([np.zeros(10)])
    FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=initial, num_rounds=1)
    pathlib.Path({done!r}).touch()
"""


def d2ft(*arguments: str) -> list[str]:
    """Return a command of the project, run by this Python."""
    return [sys.executable, "-m", "d2ft_fl.cli", *arguments]


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    """Return how long a command takes.

    Raises:
        RunError: When it fails.
    """
    start = time.perf_counter()
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    if ended.returncode:
        raise RunError(f"{' '.join(command)} failed: {_last_line(ended.stderr)}")
    return time.perf_counter() - start


def first_round(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Return when a run shows its first line, and when its first round ends; then wait for its end.

    Raises:
        RunError: When the run fails, or shows no line of a round.
    """
    start = time.perf_counter()
    found: dict[str, float] = {}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        for line in process.stdout:
            now = time.perf_counter() - start
            found.setdefault("first_line", now)
            if ROUND_ONE.match(line):
                found.setdefault("first_round", now)
        errors = process.stderr.read()
    if process.returncode or "first_round" not in found:
        raise RunError(f"{' '.join(command)} failed: {_last_line(errors)}")
    return found


def run_once(backend: str, cache: Path) -> dict[str, float]:
    """Return the seconds at which one round of the default job shows a line, begins and ends."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = d2ft(
            "run", "--backend", backend, "--set", "rounds=1", "--set", f"run-folder={folder}"
        )
        found = first_round(command, _environment(cache))
        row = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
        return {**found, "begins": found["first_round"] - row["wall_seconds"]}


def minimal_flower() -> float:
    """Return when the first round of Flower's smallest app ends.

    Raises:
        RunError: When it does not.
    """
    with tempfile.TemporaryDirectory(prefix="d2ft-flwr-") as home:
        app, done = Path(home) / "minimal", Path(home) / "done"
        app.mkdir()
        app.joinpath("pyproject.toml").write_text(MINIMAL_PROJECT)
        app.joinpath("minimal.py").write_text(MINIMAL_APP.format(done=str(done)))
        start = time.perf_counter()
        process = subprocess.Popen(
            ["flwr", "run", str(app), "--stream"],
            env=flower_environment(Path(home)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not done.exists():
                if process.poll() is not None or time.perf_counter() - start > TIMEOUT:
                    text = process.stdout.read().decode() if process.stdout else ""
                    raise RunError(f"Flower's smallest app did not run: {_last_line(text)}")
                time.sleep(0.05)
            return time.perf_counter() - start
        finally:
            guard.end_family(Path(home), guard.GRACE_SECONDS)
            process.wait()


def worker() -> None:
    """Train one client of the default job in a worker process, and print that process's memory.

    One JSON object: bytes of its own that it has written to, and how many tensors took at most.
    """
    from d2ft_fl.rounds.checks import checked
    from d2ft_fl.runtime import fork_server
    from d2ft_fl.runtime.in_process import run_local

    found: dict[str, int] = {}

    def look(row: dict[str, Any]) -> None:
        for server in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if fork_server.__name__ in server.cmdline():
                    (forked,) = server.children()
                    found["private_dirty"] = private_dirty(forked.pid)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        config = RunConfig(rounds=1, sample_clients=1, run_folder=str(folder))
        run_local(checked(config), look, False, workers=1)
        client = json.loads((folder / "clients.jsonl").read_text().splitlines()[0])
        found["tensors"] = client["used"]["memory"]
    print(write_json(found))


def private_dirty(pid: int) -> int:
    """Return the bytes that a process has written to and shares with no other, on Linux."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"Private_Dirty:\s+(\d+) kB", text)[0])


def bench_start(
    parts: tuple[str, ...], repeats: int, done: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """Measure start-up.

    Args:
        parts: What to measure, of :data:`PARTS`.
        repeats: How often; figures are medians.
        done: Told what is measured next.

    Raises:
        ConfigError: When a part is unknown, or ``repeats`` is below 1.
        RunError: When a command that is measured fails.
    """
    if strange := sorted(set(parts) - set(PARTS)):
        raise ConfigError(unknown("--part ", strange[0], PARTS))
    if repeats < 1:
        raise ConfigError(f"--repeats = {repeats} must be 1 or more")
    seen: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="d2ft-start-") as scratch:
        warm = Path(scratch) / "warm"
        if set(parts) - {"lists"}:
            done("filling the cache")
            run_once("local", warm)
        for repeat in range(repeats):
            cold = Path(scratch) / f"cold-{repeat}"
            for name, measure in _measures(parts, warm, cold):
                done(name)
                measured = measure()
                if isinstance(measured, dict):
                    for key, value in measured.items():
                        seen[f"{name}_{key}"].append(value)
                else:
                    seen[name].append(measured)
    return summary({name: statistics.median(values) for name, values in seen.items()})


def _measures(
    parts: tuple[str, ...], warm: Path, cold: Path
) -> list[tuple[str, Callable[[], float | dict[str, float]]]]:
    """Return what is measured in one turn, in order: name, and what measures it."""
    environment = _environment(warm)
    imports = [sys.executable, "-c", IMPORTS]
    measures: dict[str, list[tuple[str, Callable[[], float | dict[str, float]]]]] = {
        "lists": [
            ("help", lambda: seconds_of(d2ft("--help"), environment)),
            ("strategies", lambda: seconds_of(d2ft("strategies"), environment)),
        ],
        "local": [
            ("imports", lambda: seconds_of(imports, environment)),
            ("local", lambda: run_once("local", warm)),
            ("local_cold", lambda: run_once("local", cold / "local")),
        ],
        "flower": [
            ("flower_minimal", minimal_flower),
            ("flower", lambda: run_once("flower", warm)),
            ("flower_cold", lambda: run_once("flower", cold / "flower")),
        ],
        "worker": [("worker", lambda: _worker_memory(environment))],
    }
    return [one for part in PARTS if part in parts for one in measures[part]]


def _worker_memory(environment: dict[str, str]) -> dict[str, float]:
    ended = subprocess.run(
        [sys.executable, "-c", WORKER],
        env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT,
    )  # fmt: skip
    if ended.returncode:
        raise RunError(f"measuring a worker failed: {_last_line(ended.stderr)}")
    return json.loads(ended.stdout.splitlines()[-1])


def summary(medians: dict[str, float]) -> dict[str, Any]:
    """Return medians, and what follows from those that were measured.

    Args:
        medians: Name -> seconds, or bytes of the worker.
    """
    found: dict[str, Any] = dict(medians)
    for name, minuend, subtrahend in (
        ("local_begins_after_imports", "local_begins", "imports"),
        ("local_compiling", "local_cold_first_round", "local_first_round"),
        ("flower_compiling", "flower_cold_first_round", "flower_first_round"),
        ("flower_cold_after_minimal", "flower_cold_first_round", "flower_minimal"),
    ):
        if minuend in medians and subtrahend in medians:
            found[name] = medians[minuend] - medians[subtrahend]
    if "flower_minimal" in medians:
        found["flower_ratio"] = medians["flower_first_round"] / medians["flower_minimal"]
    return found


def _environment(cache: Path) -> dict[str, str]:
    """Return the environment of a command, with a cache folder of its own."""
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}


def _last_line(text: str) -> str:
    return (text.strip() or "no message").splitlines()[-1]
