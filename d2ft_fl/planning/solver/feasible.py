"""Any choice that fits, for where prices and repair find none."""

import numpy as np

from d2ft_fl.planning.solver.choices import change, count, fits, flip, level_after
from d2ft_fl.planning.solver.exact import complete, may_fit
from d2ft_fl.planning.solver.instance import (
    NONE,
    Batch,
    Instance,
    Picked,
    Priced,
    copy,
    instance,
    picked,
    priced,
    value_of,
)
from d2ft_fl.util.compiled import entry, inner

FOUND, UNKNOWN, IMPOSSIBLE = 0, 1, 2
# Both are multiplied by the caller's effort.
FLIPS = 2_000
WORK = 3_000_000  # of exact search: nodes, times I K R
ROOT_STEPS = 120  # of prices, before exact search
RISE = 1.1  # of the weights of what is over, where no flip makes it less
TENURE = 3  # flips after which an item may go back


@inner
def overuse(p: Instance, q: Priced, x: Picked, weights: np.ndarray) -> float:
    """Return by how much a choice is over capacity, in weighted shares of it."""
    total = 0.0
    for r in range(len(x.used)):
        total += weights[r] * q.scale[r] * max(x.used[r] - p.capacity[r], 0)
    return total


@inner
def overuse_after(
    p: Instance, q: Priced, x: Picked, weights: np.ndarray, i: int, k: int, most: float
) -> float:
    """Return :func:`overuse` once item ``i`` takes option ``k``, or ``most`` or more."""
    total, top = 0.0, level_after(p, x, i, k)
    for r in range(len(x.used)):
        over = x.used[r] + change(p, x, i, k, r, top) - p.capacity[r]
        total += weights[r] * q.scale[r] * max(over, 0)
        if total >= most:
            break
    return total


@inner
def reweigh(p: Instance, x: Picked, weights: np.ndarray) -> None:
    """Raise the weights of resources that are over; their mean stays 1."""
    total = 0.0
    for r in range(len(weights)):
        if x.used[r] > p.capacity[r]:
            weights[r] *= RISE
        total += weights[r]
    for r in range(len(weights)):
        weights[r] *= len(weights) / total


@inner
def press(p: Instance, q: Priced, x: Picked, left: np.ndarray, flips: int) -> bool:
    """Flip items, most weighted overuse less each time, and raise weights where none makes it less.

    Args:
        p: The knapsack.
        q: The knapsack in shares of capacity.
        x: The choice to start from, and the one that is reached.
        left: bool [I, K], the options that each item may take.
        flips: How often to flip an item.

    Returns:
        Whether the choice fits.
    """
    items, options = left.shape
    weights, barred = np.ones(len(x.used)), np.zeros((items, options), dtype=np.int64)
    for step in range(flips):
        if fits(p, x):
            return True
        item, option, least = NONE, NONE, np.inf
        for i in range(items):
            for k in range(options):
                if left[i, k] and k != x.choice[i] and barred[i, k] <= step:
                    over = overuse_after(p, q, x, weights, i, k, least)
                    if over < least:
                        item, option, least = i, k, over
        if least >= overuse(p, q, x, weights):
            reweigh(p, x, weights)
        if item != NONE:
            barred[item, x.choice[item]] = step + 1 + TENURE
            flip(p, x, item, option)
    return fits(p, x)


@inner
def first_fit(p: Instance, x: Picked, effort: int) -> int:
    """Look for a choice that fits, one case after another, first by flips, then exactly.

    Args:
        p: The knapsack.
        x: A choice to start from, and the one that is found, or where looking for it ended.
        effort: Multiplies flips and nodes.

    Returns:
        ``FOUND``, ``UNKNOWN`` or ``IMPOSSIBLE``.
    """
    items, options, resources = p.cost.shape
    cases = len(p.mode)
    q, start, result = priced(p), np.empty(items, dtype=np.int64), IMPOSSIBLE
    can = np.empty((items, options), dtype=np.bool_)  # by itself
    for i in range(items):
        start[i] = x.choice[i]
        for k in range(options):
            can[i, k] = q.v[k, i] > -np.inf
    left, prices = np.empty((items, options), dtype=np.bool_), np.empty(resources)
    nodes = 1 + WORK * effort // (items * options * resources * cases)
    for case in range(cases):
        for i in range(items):
            for k in range(options):
                left[i, k] = can[i, k] and p.allowed[p.mode[case, p.group[i]], k]
        for r in range(resources):
            prices[r] = 1.0
        if not may_fit(p, q, case, left, prices, ROOT_STEPS):
            continue
        for i in range(items):
            x.choice[i] = start[i]
            while not left[i, x.choice[i]]:
                x.choice[i] = (x.choice[i] + 1) % options
        count(p, x)
        if press(p, q, x, left, FLIPS * effort):
            return FOUND
        found, unused = complete(p, q, x, case, left, prices, nodes)
        if found:
            return FOUND
        if unused == 0:
            result = UNKNOWN
    return result


@entry
def fit_all(b: Batch, choice: np.ndarray, outcome: np.ndarray, effort: int) -> None:
    """Look for a choice that fits of every client, in order.

    Args:
        b: The knapsacks.
        choice: int64 [C, I], choices to start from, and those found, or where that ended.
        outcome: int64 [C], ``FOUND``, ``UNKNOWN`` or ``IMPOSSIBLE``, to fill.
        effort: Multiplies flips and nodes.
    """
    for c in range(len(b.capacity)):
        p = instance(b, c, value_of(b, c))
        x = picked(p)
        copy(choice[c], x.choice)
        outcome[c] = first_fit(p, x, effort)
        copy(x.choice, choice[c])
