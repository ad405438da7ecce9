"""The planner's solver at scale, on made-up clients: ``d2ft bench planner``.

Clients come from three families of costs in equal parts: memory falls with depth; hierarchical, in
four stages of which each holds four times the weights and half the memory of the one before; and
costs that differ from client to client. Budgets are uniform between 3 % and 90 % of everything
FULL, each of four on its own; blocks charge for being opened. Every row is measured in a process of
its own, which holds nothing but NumPy and the compiled solver, in one thread.

The gap is to the optimum of HiGHS (``scipy.optimize.milp``, openings and cases as binaries) on the
first ``sample`` clients; of coupled clients, of all together to their dual bound.
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

from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.planning.knapsack import (
    Solution,
    Spread,
    Structure,
    solve,
    solve_spread,
    solve_two_stages,
    used,
)

COUPLINGS = ("none", "spread")
OPERATIONS = (3, 4)
STAGES = 4
REPEATS = 3
UNIT = 100_000  # integers per unit of cost
SECONDS_OF_HIGHS = 20.0
PRECISION = 1e-4  # of the value: HiGHS stops within 1e-5, and counts budgets in floats


@dataclass(frozen=True)
class Row:
    """What one number of clients took.

    Attributes:
        seconds: Median of planning all clients, inputs at hand.
        gap_mean, gap_worst: Fractions; see the module's docstring. ``None`` without a sample.
        certified_mean, certified_worst: Of all clients, as the solver itself certifies.
        violations: Budgets broken, counted anew in integers.
        short_subnets: Subnets that fewer than ``least`` clients train.
        peak_mb: The process's largest resident memory, in 10^6 bytes.
        two_stage_gain: Mean gain in value over D2FT's two stages, hierarchical clients.
        two_stage_worst: The least gain of any client.
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


@dataclass(frozen=True, eq=False)
class Clients:
    """Made-up clients, as :func:`~d2ft_fl.planning.knapsack.solve` takes them.

    Client c of a seed is always the same.

    Attributes:
        train: float64 [I], worth of training a subnet. rest: float64 [1, I, K], of all else.
        share: float64 [K], how far an option trains.
        family: int64 [C].
    """

    train: np.ndarray
    rest: np.ndarray
    share: np.ndarray
    costs: np.ndarray
    capacities: np.ndarray
    tables: np.ndarray
    structure: Structure
    family: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """float64 [1, I, K]."""
        return self.rest + self.train[:, None] * self.share


def make_clients(count: int, subnets: int, operations: int) -> Clients:
    """``count`` clients of all families in turn."""
    blocks = max(b for b in range(1, min(12, subnets) + 1) if subnets % b == 0)
    block = np.repeat(np.arange(blocks), subnets // blocks)
    draw = np.random.default_rng(0)
    train, forward = draw.gamma(2.0, 0.5, (2, subnets))
    # SHORTCUT, FORWARD_ONLY, FULL; or with FROZEN, and FORWARD_ONLY where it is worth as much.
    frozen = operations == 4
    compute = np.array([0, 1 / 3, 3 / 4, 1, 1 / 3] if frozen else [0, 1 / 3, 1])
    live = np.array([0, 0, 1, 1, 0] if frozen else [0, 0, 1])
    runs = (compute > 0).astype(float)
    share = (compute == 1).astype(float)
    uncut = np.array([0, 0, 1, 1, 1] if frozen else [0, 0, 0])
    rest = (forward[:, None] * (runs + 0.5 * uncut))[None]

    def costs_of(flops: np.ndarray, memory: np.ndarray, size: np.ndarray) -> tuple:
        """Costs [I, K, 4] and openings [blocks, 2 or 3, 4], from relative costs of subnets [I]."""
        items = np.empty((subnets, len(compute), 4))
        items[..., 0] = np.outer(flops, compute)
        items[..., 1] = 0.7 * np.outer(memory, live) + np.outer(size, 0.1 * runs + 0.3 * share)
        items[..., 2], items[..., 3] = np.outer(size, share), np.outer(size, runs)
        of_blocks = [np.bincount(block, x) / np.bincount(block) for x in (memory, size)]
        openings = np.zeros((blocks, 3, 4))  # resident, live, trained
        openings[:, 0, 3] = openings[:, 2, 2] = 0.2 * of_blocks[1]
        openings[:, 1, 1] = 2.0 * of_blocks[0]
        if not frozen:
            openings = np.stack([openings[:, 0], openings[:, 1] + openings[:, 2]], axis=1)
        return (items * UNIT).astype(np.int64), (openings * UNIT).astype(np.int64)

    one = np.ones(subnets)
    stage = block * STAGES // blocks
    common = [
        costs_of(one, 2.0 - (block + 1) / blocks, one),
        costs_of(one, 2.0 ** (STAGES - 1 - stage), 4.0**stage / 8),
    ]
    family = np.arange(count) % 3
    own = [np.random.default_rng([1, c]) for c in range(count)]
    varied = [costs_of(*own[c].uniform(0.5, 1.5, (3, subnets))) for c in np.flatnonzero(family > 1)]
    items, openings = (np.stack(parts) for parts in zip(*common, *varied, strict=True))
    tables = np.where(family < 2, family, 2 + np.arange(count) // 3)
    full = items[:, :, share.argmax()].sum(axis=1) + openings.sum(axis=(1, 2))
    shares = np.stack([draw.uniform(0.03, 0.9, 4) for draw in own])
    groups, modes, allowed = block, None, None
    levels = np.array([0, 1, 2, 3, 1] if frozen else [0, 1, 2])
    if frozen:
        modes = (np.arange(blocks) < np.arange(blocks)[:, None]).astype(np.int64)
        allowed = np.array([[1, 1, 1, 1, 0], [1, 0, 0, 0, 1]], dtype=bool)
    return Clients(
        train,
        rest,
        share,
        items,
        (full[tables] * shares).astype(np.int64),
        tables,
        Structure(groups, levels, openings, modes, allowed),
        family,
    )


def optimum(c: Clients, client: int) -> float:
    """The exact optimum by HiGHS; NaN when it is not proven in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    s, capacity = c.structure, c.capacities[client]
    values, costs = c.values[0], c.costs[c.tables[client]]
    openings = s.openings[c.tables[client]]  # [G, M, R]
    (items, options), (groups, level_count) = values.shape, openings.shape[:2]
    modes = np.zeros((1, groups), dtype=int) if s.modes is None else s.modes
    allowed = np.ones((1, options), dtype=bool) if s.allowed is None else s.allowed
    x, y = items * options, groups * level_count
    size = x + y + len(modes)  # choices, openings, cases
    entries: list[tuple[int, int, float]] = []
    above: list[float] = []
    i, k = np.divmod(np.arange(x), options)
    for level in range(1, level_count + 1):  # options of an item need its block open
        for item in range(items):
            mine = [int(j) for j in np.flatnonzero((i == item) & (s.levels[k] >= level))]
            entries += [(len(above), j, 1.0) for j in mine]
            entries.append((len(above), x + int(s.groups[item]) * level_count + level - 1, -1.0))
            above.append(0.0)
    for j in range(x):  # an option needs a case that allows it
        cases = np.flatnonzero(allowed[modes[:, s.groups[i[j]]], k[j]])
        if len(cases) < len(modes):
            entries.append((len(above), j, 1.0))
            entries += [(len(above), x + y + int(case), -1.0) for case in cases]
            above.append(0.0)
    rows, columns, weights = zip(*entries, strict=True)
    links = coo_matrix((weights, (rows, columns)), shape=(len(above), size)).tocsr()
    ones = coo_matrix((np.ones(x), (i, np.arange(x))), shape=(items, size)).tocsr()
    case = np.zeros((1, size))
    case[0, x + y :] = 1
    budget = np.zeros((size, len(capacity)))
    budget[:x], budget[x : x + y] = costs.reshape(x, -1), openings.reshape(y, -1)
    found = milp(
        -np.concatenate([values.ravel(), np.zeros(size - x)]),
        constraints=[
            LinearConstraint(ones, 1, 1),
            LinearConstraint(case, 1, 1),
            LinearConstraint((budget / capacity).T, -np.inf, 1),
            LinearConstraint(links, -np.inf, above),
        ],
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        options={"time_limit": SECONDS_OF_HIGHS, "mip_rel_gap": 1e-5},
    )
    return -float(found.fun) if found.status == 0 else float("nan")


def gap_to(best: float, value: float) -> float:
    """How far a value is from a proven optimum, as a share of it.

    Raises:
        RunError: When it is above: the solver then solves something else than the oracle.
    """
    if value > best + PRECISION * abs(best):
        raise RunError(f"the solver's value {value} is above the proven optimum {best}")
    return max(0.0, 1 - value / best) if best else 0.0


def measure(clients: int, subnets: int, coupling: str, operations: int, sample: int) -> Row:
    """One row, in this process."""
    c = make_clients(clients, subnets, operations)
    least = 2

    def plan() -> Solution:
        if coupling == "spread":
            spread = Spread(c.train, c.share, np.ones(clients), max(1.0, clients / 10), least)
            return solve_spread(c.rest, c.costs, c.capacities, spread, c.structure, c.tables)
        return solve(c.values, c.costs, c.capacities, c.structure, c.tables, effort=1)

    few = make_clients(3, subnets, operations)  # so that what is timed is compiled
    if coupling == "spread":
        spread = Spread(few.train, few.share, np.ones(3), 1.0, least)
        solve_spread(few.rest, few.costs, few.capacities, spread, few.structure, few.tables)
    solve(few.values, few.costs, few.capacities, few.structure, few.tables, effort=1)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        solution = plan()
        seconds.append(time.perf_counter() - started)
    peak = _peak_bytes() / 1e6
    gaps, gain, worst = [], None, None
    if coupling == "none":
        for client in range(min(sample, clients)):
            best = optimum(c, client)
            if not np.isnan(best):  # HiGHS was done in time
                gaps.append(gap_to(best, float(solution.value[client])))
        if operations == 3:
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
            ratio = solution.value / np.maximum(two.value, 1e-9) - 1
            gain, worst = float(ratio[c.family == 1].mean()), float(ratio.min())
    else:
        gaps = [solution.total_gap]  # type: ignore[attr-defined]
    trained = (c.share[solution.choice] > 0).sum(axis=0)
    spent = used(solution.choice, c.costs, c.structure, c.tables)
    return Row(
        clients,
        subnets,
        coupling,
        operations,
        statistics.median(seconds),
        float(np.mean(gaps)) if gaps else None,
        float(np.max(gaps)) if gaps else None,
        float(solution.gap.mean()),
        float(solution.gap.max()),
        int((spent > c.capacities).any(axis=1).sum()),
        int((trained < least).sum()),
        peak,
        gain,
        worst,
        len(gaps) if coupling == "none" else 0,
    )


def _peak_bytes() -> int:
    """Largest resident memory of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # what `resource` says includes the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_planner(
    clients: list[int], subnets: int, sample: int, done: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """A row for every number of clients, coupling and number of operations.

    Raises:
        ConfigError: For numbers that cannot be. RunError: When a measuring process fails.
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
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", __name__, json.dumps(arguments)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        reason = (child.stderr.strip() or "no message").splitlines()[-1]
        raise RunError(f"measuring {arguments[0]} clients failed: {reason}")
    return Row(**json.loads(child.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(*json.loads(sys.argv[1])))))
