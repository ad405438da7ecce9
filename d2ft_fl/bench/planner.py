"""The planner's solver at scale, on made-up clients: ``d2ft bench planner``.

Every row is measured in a process of its own, which has nothing but NumPy and the compiled solver
in memory and one thread.

The gap of clients that are planned alone is to the optimum of HiGHS (:mod:`.optimum`), for the
first ``sample`` of them; the gap of coupled clients is that of all together to their dual bound.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from d2ft_fl.bench.optimum import optimum
from d2ft_fl.bench.planner_clients import Clients, make_clients
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.planning.knapsack import (
    Spread,
    SpreadSolution,
    solve,
    solve_spread,
    solve_two_stages,
)
from d2ft_fl.planning.problem import Solution, used
from d2ft_fl.util.strict_json import write_json

COUPLINGS = ("none", "spread")
OPERATIONS = (3, 4)
REPEATS = 3
LEAST = 2  # coupled: clients that should train every subnet
PRECISION = 1e-4  # of the value: HiGHS stops within 1e-5, and counts budgets in floats


@dataclass(frozen=True)
class Row:
    """What planning one number of clients took.

    Attributes:
        clients: How many clients were planned.
        subnets: Subnets of the model.
        coupling: One of :data:`COUPLINGS`.
        operations: How many operations a subnet chooses from.
        seconds: Median time of planning all clients, inputs at hand.
        gap_mean: Mean gap, a fraction; ``None`` without a sample.
        gap_worst: Largest gap, a fraction; ``None`` without a sample.
        certified_mean: Mean gap that the solver itself certifies, over all clients.
        certified_worst: Largest gap that the solver itself certifies.
        violations: Clients whose budgets are broken, recounted in integers.
        short_subnets: Subnets that fewer than :data:`LEAST` clients train.
        peak_mb: Largest resident memory of the process, in 10^6 bytes.
        two_stage_gain: Mean gain in value over D2FT's two stages, of hierarchical clients.
        two_stage_worst: Smallest gain of any client.
        sampled: Clients that HiGHS solved to a proven optimum.
    """

    clients: int
    subnets: int
    coupling: str
    operations: int
    seconds: float
    gap_mean: float | None
    gap_worst: float | None
    certified_mean: float
    certified_worst: float
    violations: int
    short_subnets: int
    peak_mb: float
    two_stage_gain: float | None
    two_stage_worst: float | None
    sampled: int


def gap_to(best: float, value: float) -> float:
    """Return how far a value is from a proven optimum, as a share of the optimum.

    Args:
        best: The proven optimum.
        value: The solver's value.

    Raises:
        RunError: When the value is above the optimum: solver and oracle solve different problems.
    """
    if value > best + PRECISION * abs(best):
        raise RunError(f"the solver's value {value} is above the proven optimum {best}")
    return max(0.0, 1 - value / best) if best else 0.0


def measure(clients: int, subnets: int, coupling: str, operations: int, sample: int) -> Row:
    """Measure one row, in this process.

    Args:
        clients: How many clients to plan.
        subnets: Subnets of the model.
        coupling: One of :data:`COUPLINGS`.
        operations: One of :data:`OPERATIONS`.
        sample: How many clients HiGHS solves as well.
    """
    c = make_clients(clients, subnets, operations)
    # A few clients first, so that what is timed is compiled: coupled ones use more of the solver.
    few = make_clients(3, subnets, operations)
    for kind in dict.fromkeys([coupling, "none"]):
        _plan(few, kind)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        solution = _plan(c, coupling)
        seconds.append(time.perf_counter() - started)
    peak = _peak_bytes() / 1e6
    gain = worst = None
    if isinstance(solution, SpreadSolution):
        gaps = [solution.total_gap]
    else:
        gaps = _gaps(c, solution, min(sample, clients))
        if operations == 3:
            gain, worst = _two_stage_gains(c, solution)
    trained = (c.share[solution.choice] > 0).sum(axis=0)
    spent = used(solution.choice, c.costs, c.structure, c.tables)
    return Row(
        clients=clients,
        subnets=subnets,
        coupling=coupling,
        operations=operations,
        seconds=statistics.median(seconds),
        gap_mean=float(np.mean(gaps)) if gaps else None,
        gap_worst=float(np.max(gaps)) if gaps else None,
        certified_mean=float(solution.gap.mean()),
        certified_worst=float(solution.gap.max()),
        violations=int((spent > c.capacities).any(axis=1).sum()),
        short_subnets=int((trained < LEAST).sum()),
        peak_mb=peak,
        two_stage_gain=gain,
        two_stage_worst=worst,
        sampled=len(gaps) if coupling == "none" else 0,
    )


def _plan(c: Clients, coupling: str) -> Solution:
    """Plan all clients."""
    if coupling == "none":
        return solve(c.values, c.costs, c.capacities, c.structure, c.tables, effort=1)
    count = len(c.capacities)
    spread = Spread(c.train, c.share, np.ones(count), max(1.0, count / 10), LEAST)
    return solve_spread(c.rest, c.costs, c.capacities, spread, c.structure, c.tables)


def _gaps(c: Clients, solution: Solution, sample: int) -> list[float]:
    """Return the gaps to the optimum of the first clients, where HiGHS proves it in time."""
    best = [optimum(c, client) for client in range(sample)]
    return [
        gap_to(most, float(solution.value[client]))
        for client, most in enumerate(best)
        if not np.isnan(most)
    ]


def _two_stage_gains(c: Clients, solution: Solution) -> tuple[float, float]:
    """Return the mean gain over D2FT's two stages of hierarchical clients, and the least of any."""
    only = (c.share > 0) | (np.arange(len(c.share)) == 0)
    two = solve_two_stages(
        c.train[None, :, None] * c.share,
        c.rest,
        c.share,
        only,
        c.costs,
        c.capacities,
        c.structure,
        c.tables,
    )
    gain = solution.value / np.maximum(two.value, 1e-9) - 1
    return float(gain[c.family == 1].mean()), float(gain.min())


def _peak_bytes() -> int:
    """Return the largest resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what `resource` says includes the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_planner(
    clients: list[int], subnets: int, sample: int, done: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """Measure a row for every number of clients, coupling and number of operations.

    Args:
        clients: Numbers of clients.
        subnets: Subnets of the model.
        sample: How many clients HiGHS solves as well.
        done: Told what is measured next.

    Raises:
        ConfigError: When a number is too small.
        RunError: When a measuring process fails.
    """
    for name, value, low in [("clients", min(clients), 3), ("subnets", subnets, 1)]:
        if value < low:
            raise ConfigError(f"--{name} = {value} must be {low} or more")
    if sample < 0:
        raise ConfigError(f"--sample = {sample} must be 0 or more")
    kinds = [("none", 3), ("spread", 3), ("none", 4)]
    done("compiling, the first time")
    _apart(3, subnets, "spread", 3, 0)  # compiling takes more memory than planning
    rows = []
    for count in clients:
        for coupling, operations in kinds:
            done(f"{count} clients, {coupling}, {operations} operations")
            # FROZEN makes the oracle's problem many times as hard.
            asked = sample if operations == 3 else sample // 6
            rows.append(_apart(count, subnets, coupling, operations, asked))
    return rows


def _apart(*arguments: int | str) -> Row:
    """Run :func:`measure` in a process of its own."""
    command = [sys.executable, "-m", __name__, write_json(arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise RunError(f"measuring {arguments[0]} clients failed: {reason}")
    return Row(**json.loads(ended.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(write_json(asdict(measure(*json.loads(sys.argv[1])))))
