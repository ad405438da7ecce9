"""Depth-first search for any choice that fits, or a proof that there is none."""

import numpy as np

from d2ft_fl.planning.solver.instance import NONE, Instance, Picked, Priced, copy, picked
from d2ft_fl.planning.solver.prices import lower_prices, relax
from d2ft_fl.util.compiled import inner

NODE_STEPS = 8  # of prices, at each node
NODE_STEP = 0.03  # the length of the first, where prices sum up to 1
SURE = 1e-9  # what has to be short of everything by this share of prices is impossible
LEAST = 1e-6  # prices that fell to less say nothing


@inner
def narrow(p: Instance, left: np.ndarray) -> bool:
    """Strike out options that are in no choice that fits, as sums of least costs show exactly.

    Args:
        p: The knapsack.
        left: bool [I, K], the options that each item may take, to narrow.

    Returns:
        Whether something may fit.
    """
    items, options, resources = p.cost.shape
    low, need = np.empty((items, resources), dtype=np.int64), np.empty(resources, dtype=np.int64)
    floor = np.empty(len(p.ladder), dtype=np.int64)  # the level to which a group is open at least
    struck = True
    while struck:
        struck = False
        for g in range(len(floor)):
            floor[g] = 0
        for r in range(resources):
            need[r] = 0
        for i in range(items):
            first, level = True, p.ladder.shape[1]
            for k in range(options):
                if not left[i, k]:
                    continue
                level = min(level, p.level[k])
                for r in range(resources):
                    low[i, r] = p.cost[i, k, r] if first else min(low[i, r], p.cost[i, k, r])
                first = False
            if first:
                return False
            floor[p.group[i]] = max(floor[p.group[i]], level)
            for r in range(resources):
                need[r] += low[i, r]
        for r in range(resources):
            for g in range(len(floor)):
                need[r] += p.ladder[g, floor[g], r]
            if need[r] > p.capacity[r]:
                return False
        for i in range(items):
            g = p.group[i]
            for k in range(options):
                top = max(floor[g], p.level[k])
                for r in range(resources):
                    more = p.cost[i, k, r] - low[i, r] + p.ladder[g, top, r]
                    more -= p.ladder[g, floor[g], r]
                    if left[i, k] and more > p.capacity[r] - need[r]:
                        left[i, k] = False
                        struck = True
    return True


@inner
def price_out(
    p: Instance, q: Priced, case: int, left: np.ndarray, prices: np.ndarray, steps: int
) -> bool:
    """Strike out options that are in no choice that fits, as the dual shows.

    Where nothing has a value, it is what all capacity costs at the prices, less what a choice costs
    at least: below 0, nothing fits.

    Args:
        p: The knapsack.
        q: Scratch; its values are overwritten.
        case: The case that options have to obey.
        left: bool [I, K], the options that each item may take, to narrow.
        prices: float64 [R], to start from, and the ones found, which sum up to 1 at first.
        steps: How often to change prices.

    Returns:
        Whether something may fit.
    """
    items, options = left.shape
    total = 0.0
    for i in range(items):
        for k in range(options):
            q.v[k, i] = 0.0 if left[i, k] else -np.inf
    for r in range(len(prices)):
        total += prices[r]
    for r in range(len(prices)):
        prices[r] = prices[r] / total if total > LEAST else 1.0 / len(prices)
    lower_prices(p, q, picked(p), case, steps, NODE_STEP, np.inf, prices)
    copy(prices, q.prices)
    relax(p, q)
    total = 0.0
    for r in range(len(prices)):
        total += prices[r]
    if total <= LEAST:
        return True
    spare = q.bounds[case] + SURE * total
    for i in range(items):
        g, mode = p.group[i], p.mode[case, p.group[i]]
        for k in range(options):
            if not left[i, k]:
                continue
            net = -np.inf  # of the group, if the item takes this
            for m in range(p.level[k], p.ladder.shape[1]):
                best = q.gains[q.arg[mode, m, i], i]
                net = max(net, q.nets[mode, m, g] - best + q.gains[k, i])
            left[i, k] = spare - q.net[mode, g] + net >= 0.0
    return spare >= 0.0


@inner
def may_fit(
    p: Instance, q: Priced, case: int, left: np.ndarray, prices: np.ndarray, steps: int
) -> bool:
    """Narrow ``left`` by sums and by prices; return whether something may fit."""
    return (
        narrow(p, left)
        and (fewest(left) == NONE or price_out(p, q, case, left, prices, steps))
        and narrow(p, left)
    )


@inner
def fewest(left: np.ndarray) -> int:
    """Return the item with the fewest options left, two at least; NONE where all have one."""
    item, least = NONE, np.inf
    for i in range(len(left)):
        n = 0
        for k in range(left.shape[1]):
            n += left[i, k]
        if 1 < n < least:
            item, least = i, n
    return item


@inner
def complete(
    p: Instance, q: Priced, x: Picked, case: int, root: np.ndarray, prices: np.ndarray, nodes: int
) -> tuple[bool, int]:
    """Search depth-first, and leave the first choice that fits in ``x.choice``.

    An item with the fewest options left takes the cheapest at the prices; what cannot fit then is
    struck out, and prices change a little at every node.

    Args:
        p: The knapsack.
        q: Scratch; its values are overwritten.
        x: The choice, to fill.
        case: The case that options have to obey.
        root: bool [I, K], the options that each item may take, narrowed.
        prices: float64 [R], of resources in short supply.
        nodes: How many to look at.

    Returns:
        Whether a choice was found, and the nodes left: above 0 without a choice, nothing fits.
    """
    items, options, resources = p.cost.shape
    depths = items + 1
    left, price = np.empty((depths, items, options), np.bool_), np.empty((depths, resources))
    item, option = np.empty(items, dtype=np.int64), np.empty(items, dtype=np.int64)
    for i in range(items):
        copy(root[i], left[0, i])
    copy(prices, price[0])
    depth = 0
    while nodes > 0:
        i = fewest(left[depth])
        if i == NONE:
            for j in range(items):
                for k in range(options):
                    if left[depth, j, k]:
                        x.choice[j] = k
            return True, nodes
        cheapest, least = NONE, np.inf
        for k in range(options):
            cost = 0.0
            for r in range(resources):
                cost += price[depth, r] * q.w[r, k, i]
            if left[depth, i, k] and cost < least:
                cheapest, least = k, cost
        item[depth], option[depth] = i, cheapest
        for j in range(items):
            copy(left[depth, j], left[depth + 1, j])
        for k in range(options):
            left[depth + 1, i, k] = k == cheapest
        copy(price[depth], price[depth + 1])
        nodes -= 1
        depth += 1
        while not may_fit(p, q, case, left[depth], price[depth], NODE_STEPS):
            depth -= 1
            if depth < 0:
                return False, nodes + 1
            left[depth, item[depth], option[depth]] = False
    return False, 0
