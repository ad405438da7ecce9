"""How often ``knapsack.solve`` finds a choice that fits, where one is planted and hidden.

    python -m tests.planning.feasibility [--instances 100] [--seconds 10]

prints a line a family: of how many instances a choice was found at each effort, in how many more
effort is worth less, and of up to 12 items how many HiGHS finds in some seconds each, and how many
of these are found at the highest effort but one. That takes about ten minutes on one core.
"""

import argparse
import time

import numpy as np

from d2ft_fl.planning.knapsack import solve
from d2ft_fl.planning.problem import Structure, used
from tests.planning.knapsacks import optimum

EFFORTS = (1, 2, 4, 8, 16)
MEASURED = 8  # the effort that is compared with HiGHS
SMALL = 12  # items
# Items, resources, and whether costs of an option sum up to nearly the same: no option is cheap.
FAMILIES = {
    "plain": ((5, 70), (2, 40), False),
    "many resources": ((5, 70), (20, 40), False),
    "no cheap option": ((5, 70), (2, 40), True),
    "openings": ((5, 70), (2, 40), False),
    "cases": ((5, 70), (2, 40), False),
    "small": ((5, SMALL), (2, 40), False),
    "small, no cheap option": ((5, SMALL), (2, 40), True),
}
HEADS = 6  # items of a group


def hidden(
    family: str, seed: int, items: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Structure]:
    """Draw values, costs, capacities and structure of a knapsack with a choice that fits.

    The choice is drawn at random, and capacities are up to 5 % above what it uses. A third of the
    instances forbid some options.

    Args:
        family: One of :data:`FAMILIES`.
        seed: Of the draw.
        items: Least and most items, if not the family's own.
    """
    draw = np.random.default_rng(seed)
    sizes, wide, level = FAMILIES[family]
    items, options, resources = (
        int(draw.integers(low, high + 1)) for low, high in (items or sizes, (3, 10), wide)
    )
    costs = draw.random((items, options, resources))
    if level:
        costs *= 0.5 * resources / costs.sum(axis=2, keepdims=True)
    costs = (1000 * costs).astype(np.int64) + 1
    values = 100 * draw.random((items, options))
    structure, allowed = Structure.plain(items, options, resources), np.ones((items, options), bool)
    if family in ("openings", "cases"):
        structure, allowed = _structure(draw, items, options, resources, family == "cases")
    forbidden = draw.random((items, options)) < 0.3 * (seed % 3 == 0)
    chances = np.where(allowed, draw.random((items, options)), -1.0)
    planted = (chances - forbidden).argmax(axis=1)
    forbidden[np.arange(items), planted] = False
    values[forbidden] = -np.inf
    spent = used(planted[None], costs[None], structure, np.zeros(1, dtype=np.int64))[0]
    return values, costs, (spent * (1 + draw.uniform(0, 0.05))).astype(np.int64), structure


def _structure(
    draw: np.random.Generator, items: int, options: int, resources: int, cases: bool
) -> tuple[Structure, np.ndarray]:
    """Draw openings of two levels, and cases; and what one of the cases allows."""
    groups = -(-items // HEADS)
    of, levels = np.arange(items) // HEADS, np.minimum(np.arange(options), 2)
    openings = draw.integers(0, 1500, (1, groups, 2, resources))
    if not cases:
        return Structure(of, levels, openings), np.ones((items, options), dtype=bool)
    modes = (np.arange(groups) < np.arange(groups)[:, None]).astype(np.int64)
    allowed = draw.random((2, options)) < 0.7
    allowed[:, draw.integers(options)] = True
    one = modes[draw.integers(groups)]
    return Structure(of, levels, openings, modes, allowed), allowed[one[of]]


def found(family: str, seed: int) -> list[float]:
    """Return the value that is found at each effort; -inf where nothing is."""
    return [float(solve(*hidden(family, seed), effort=effort).value) for effort in EFFORTS]


def highs_fits(problem: tuple, seconds: float) -> bool:
    """Whether HiGHS finds a choice that fits in some seconds."""
    values, *rest = problem
    nothing = np.where(np.isfinite(values), 0.0, -np.inf)
    return bool(np.isfinite(optimum(nothing, *rest, seconds=seconds)))


def main() -> None:
    """Print a line a family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="of HiGHS, an instance")
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--first", type=int, default=0, help="seed")
    arguments = parser.parse_args()
    efforts = "".join(f"  effort {effort:2}" for effort in EFFORTS)
    print(f"{'found in':24}{efforts}   less  of up to {SMALL} items")
    for family in arguments.family or FAMILIES:
        started = time.perf_counter()
        seeds = range(arguments.first, arguments.first + arguments.instances)
        values = np.array([found(family, seed) for seed in seeds])
        took = time.perf_counter() - started
        less = int((values[:, 1:] < values[:, :-1]).any(axis=1).sum())
        problems = {s: hidden(family, s) for s in seeds}
        small = [s for s in seeds if len(problems[s][0]) <= SMALL]
        theirs = [s for s in small if highs_fits(problems[s], arguments.seconds)]
        here = values[:, EFFORTS.index(MEASURED)]
        ours = sum(np.isfinite(here[s - arguments.first]) for s in theirs)
        counts = "".join(f"{n:>11}" for n in np.isfinite(values).sum(axis=0))
        print(
            f"{family:24}{counts}{less:>7}  of {len(small)} HiGHS {len(theirs)}, of these {ours}"
            f"  ({took:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
