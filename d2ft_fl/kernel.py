"""The compiled inner loops of :mod:`d2ft_fl.knapsack`, one client at a time.

Plain Python over arrays, compiled by numba without ``fastmath``, so that a plan does not depend on
the processor; with ``NUMBA_DISABLE_JIT=1`` the same code runs interpreted, which is the reference.
What has to fit is counted in the caller's integers; what is priced, in shares of capacity. Caps
count steps and nodes, never time; ties go to the lowest index.

I items lie in G groups and take one of K options each; R resources; a group is open to one of M
levels or closed; S cases give each group a mode, which says what its items may take.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

EPSILON = 1e-12
TOLERANCE = 1e-4  # certified gaps below this share of the bound are left alone
BISECTIONS = 6  # of the dual along one direction, to start from
PRICE_STEPS = 18
CASE_STEPS = 6  # further price steps for one case
FIRST_STEP = 0.1  # of prices, as a share of the bound
CASE_STEP = 0.02
LONGER, SHORTER, DILATION = 1.3, 0.75, 2.0  # of a step that still descends, that overshot; of space
CORE = 10  # items whose flips are enumerated together
FLIPS = 48  # flips of which the best pair is taken
SWEEPS = 3
RESCUE = 0.01  # certified gaps above this are searched
NODES = 20_000
PATTERNS = 24  # sets of open groups that are tried beside the one at the best prices


class Instance(NamedTuple):
    """One client's knapsack.

    Attributes:
        value: float64 [I, K]; -inf forbids an option.
        cost: int64 [I, K, R].
        ladder: int64 [G, M + 1, R], what a group pays once it is open to each level; 0 at first.
        first: int64 [G + 1], where each group's items start.
        group: int64 [I].
        level: int64 [K], the level that an option opens its group to.
        mode: int64 [S, G]. allowed: bool [modes, K].
        capacity: int64 [R].
    """

    value: np.ndarray
    cost: np.ndarray
    ladder: np.ndarray
    first: np.ndarray
    group: np.ndarray
    level: np.ndarray
    mode: np.ndarray
    allowed: np.ndarray
    capacity: np.ndarray


class Priced(NamedTuple):
    """The same in shares of capacity, and what prices make of it.

    Attributes:
        v: float64 [K, I]. w: float64 [R, K, I]. charge: float64 [G, M + 1, R].
        scale: float64 [R], what one unit is of capacity. prices: float64 [R].
        gains: float64 [K, I], value less priced cost.
        best: float64 [I], scratch.
        net: float64 [modes, G], the most a group is worth. opened: int64, the level for it.
        bounds: float64 [S].
    """

    v: np.ndarray
    w: np.ndarray
    charge: np.ndarray
    scale: np.ndarray
    prices: np.ndarray
    gains: np.ndarray
    best: np.ndarray
    net: np.ndarray
    opened: np.ndarray
    bounds: np.ndarray


class Picked(NamedTuple):
    """A choice, and what it uses.

    Attributes:
        choice: int64 [I].
        counts: int64 [G, M + 1], items of a group at each level. tops: int64 [G], its level.
        used: int64 [R].
    """

    choice: np.ndarray
    counts: np.ndarray
    tops: np.ndarray
    used: np.ndarray


# -- prices ----------------------------------------------------------------------------------


@njit(cache=True)
def priced(p: Instance) -> Priced:
    """In shares of capacity; options that cannot fit are out."""
    items, options, resources = p.cost.shape
    groups, levels = p.ladder.shape[0], p.ladder.shape[1]
    v, w = np.empty((options, items)), np.empty((resources, options, items))
    scale = 1.0 / np.maximum(p.capacity, 1)
    for i in range(items):
        for k in range(options):
            fits = True
            for r in range(resources):
                fits = fits and p.cost[i, k, r] <= p.capacity[r]
                w[r, k, i] = p.cost[i, k, r] * scale[r]
            v[k, i] = p.value[i, k] if fits else -np.inf
    modes = p.allowed.shape[0]
    return Priced(
        v,
        w,
        p.ladder * scale,
        scale,
        np.zeros(resources),
        np.empty((options, items)),
        np.empty(items),
        np.empty((modes, groups)),
        np.empty((modes, groups), dtype=np.int64),
        np.empty(p.mode.shape[0]),
    )


@njit(cache=True)
def relax(p: Instance, q: Priced) -> int:
    """The dual's inner maximum at ``q.prices``: fills what depends on them; the best case."""
    resources, options, items = q.w.shape
    groups, levels = q.charge.shape[0], q.charge.shape[1]
    for k in range(options):
        row = q.gains[k]
        row[:] = q.v[k]
        for r in range(resources):
            price, weight = q.prices[r], q.w[r, k]
            if price > 0.0:
                for i in range(items):
                    row[i] -= price * weight[i]
    for m in range(len(p.allowed)):
        q.net[m] = -np.inf
        q.best[:] = -np.inf
        for step in range(levels):
            for k in range(options):
                if p.level[k] == step and p.allowed[m, k]:
                    row = q.gains[k]
                    for i in range(items):
                        a, b = q.best[i], row[i]
                        q.best[i] = a if a >= b else b
            for g in range(groups):
                worth = 0.0
                for i in range(p.first[g], p.first[g + 1]):
                    worth += q.best[i]
                for r in range(resources):
                    worth -= q.prices[r] * q.charge[g, step, r]
                if step == 0 or worth > q.net[m, g]:
                    q.net[m, g] = worth
                    q.opened[m, g] = step
    total, top = q.prices.sum(), 0
    for s in range(len(p.mode)):
        q.bounds[s] = total
        for g in range(groups):
            q.bounds[s] += q.net[p.mode[s, g], g]
        if q.bounds[s] > q.bounds[top]:
            top = s
    return top


@njit(cache=True)
def pick(p: Instance, q: Priced, case: int, opened: np.ndarray, choice: np.ndarray) -> None:
    """Each item's best option at the prices, with groups open to at most ``opened`` [G]."""
    for g in range(len(opened)):
        mode, most = p.mode[case, g], opened[g]
        for i in range(p.first[g], p.first[g + 1]):
            top, best = 0, -np.inf
            for k in range(len(q.v)):
                if p.level[k] <= most and p.allowed[mode, k] and q.gains[k, i] > best:
                    top, best = k, q.gains[k, i]
            choice[i] = top


@njit(cache=True)
def open_best(p: Instance, q: Priced, case: int, opened: np.ndarray) -> None:
    """The levels of groups [G] that the prices choose in a case."""
    for g in range(len(opened)):
        opened[g] = q.opened[p.mode[case, g], g]


@njit(cache=True)
def slack_at(p: Instance, q: Priced, case: int, x: Picked, slope: np.ndarray) -> float:
    """Evaluate the dual at ``q.prices``, of one case or of the worst (-1).

    Fills the choice that attains it, and a subgradient, its slack as shares of capacity [R].
    """
    at = relax(p, q)
    if case >= 0:
        at = case
    open_best(p, q, at, x.tops)
    pick(p, q, at, x.tops, x.choice)
    x.used[:] = 0
    for i in range(len(x.choice)):
        row = p.cost[i, x.choice[i]]
        for r in range(len(slope)):
            x.used[r] += row[r]
    for r in range(len(slope)):
        for g in range(len(x.tops)):
            x.used[r] += p.ladder[g, x.tops[g], r]
        slope[r] = 1.0 - x.used[r] * q.scale[r]
    return q.bounds[at]


@njit(cache=True)
def first_prices(p: Instance, q: Priced, x: Picked, best: np.ndarray) -> float:
    """Bisect the dual along the direction of overuse; its value at ``best`` [R], to fill."""
    slope = np.empty(len(best))
    q.prices[:] = 0.0
    best[:] = 0.0
    bound = slack_at(p, q, -1, x, slope)
    way = np.maximum(-slope, 0.0)
    if way.sum() == 0.0:  # all fits
        return bound
    way /= way.sum()
    low, high = 1e-3 * bound, bound
    for _ in range(BISECTIONS):
        at = np.sqrt(low * high)
        q.prices[:] = at * way
        now = slack_at(p, q, -1, x, slope)
        if now < bound:
            bound = now
            best[:] = q.prices
        along = 0.0
        for r in range(len(way)):
            along += slope[r] * way[r]
        if along < 0.0:
            low = at
        else:
            high = at
    return bound


@njit(cache=True)
def lower_prices(
    p: Instance,
    q: Priced,
    x: Picked,
    case: int,
    steps: int,
    length: float,
    bound: float,
    best: np.ndarray,
) -> float:
    """Minimise the dual by subgradients with space dilation (Shor 1985), which suits few prices.

    Args:
        length: Of the first step. bound: The dual at ``best`` [R], where to start.

    Returns:
        The least bound found, that of ``best`` then.
    """
    resources = len(best)
    slope, last, step = np.empty(resources), np.zeros(resources), np.zeros(resources)
    dilation, way, turned = np.eye(resources), np.empty(resources), np.empty(resources)
    q.prices[:] = best
    for turn in range(steps + 1):
        now = slack_at(p, q, case, x, slope)
        if now < bound:
            bound = now
            best[:] = q.prices
        along, norm = 0.0, 0.0
        for r in range(resources):
            if q.prices[r] <= 0.0 and slope[r] > 0.0:
                slope[r] = 0.0  # the price cannot fall further
            along += slope[r] * step[r] if turn else 0.0
        if turn:
            length *= LONGER if along > 0.0 else SHORTER
            for a in range(resources):  # dilate along the difference of two slopes
                way[a] = 0.0
                for r in range(resources):
                    way[a] += dilation[r, a] * (slope[r] - last[r])
                norm += way[a] * way[a]
            if norm > EPSILON:
                norm = np.sqrt(norm)
                for r in range(resources):
                    turned[r] = 0.0
                    for a in range(resources):
                        turned[r] += dilation[r, a] * way[a] / norm
                for r in range(resources):
                    for a in range(resources):
                        dilation[r, a] -= (1.0 - 1.0 / DILATION) * turned[r] * way[a] / norm
        norm = 0.0
        for a in range(resources):
            way[a] = 0.0
            for r in range(resources):
                way[a] += dilation[r, a] * slope[r]
            norm += way[a] * way[a]
        if norm < EPSILON:
            break
        norm = np.sqrt(norm)
        for r in range(resources):
            step[r] = 0.0
            for a in range(resources):
                step[r] += dilation[r, a] * way[a] / norm
            q.prices[r] = max(0.0, q.prices[r] - length * step[r])
            last[r] = slope[r]
    return bound


# -- choices ---------------------------------------------------------------------------------


@njit(cache=True)
def picked(p: Instance) -> Picked:
    """Room for a choice."""
    groups, levels, resources = p.ladder.shape
    return Picked(
        np.zeros(len(p.group), dtype=np.int64),
        np.zeros((groups, levels), dtype=np.int64),
        np.zeros(groups, dtype=np.int64),
        np.zeros(resources, dtype=np.int64),
    )


@njit(cache=True)
def count(p: Instance, x: Picked) -> float:
    """Levels and exact use of ``x.choice``; returns its value."""
    worth = 0.0
    x.counts[:] = 0
    x.used[:] = 0
    x.tops[:] = 0
    for i in range(len(x.choice)):
        k, g = x.choice[i], p.group[i]
        worth += p.value[i, k]
        x.counts[g, p.level[k]] += 1
        x.tops[g] = max(x.tops[g], p.level[k])
        for r in range(len(x.used)):
            x.used[r] += p.cost[i, k, r]
    for g in range(len(x.tops)):
        for r in range(len(x.used)):
            x.used[r] += p.ladder[g, x.tops[g], r]
    return worth


@njit(cache=True)
def level_after(p: Instance, x: Picked, i: int, k: int) -> int:
    """The level of an item's group once the item takes option ``k``."""
    g = p.group[i]
    old, new, top = p.level[x.choice[i]], p.level[k], x.tops[g]
    if new >= top:
        return new
    if old < top or x.counts[g, top] > 1:
        return top
    for m in range(top - 1, new, -1):
        if x.counts[g, m] > 0:
            return m
    return new


@njit(cache=True)
def change(p: Instance, x: Picked, i: int, k: int, r: int, top: int) -> int:
    """What a flip adds to one resource, the item's group then being at level ``top``."""
    g = p.group[i]
    return (
        p.cost[i, k, r]
        - p.cost[i, x.choice[i], r]
        + p.ladder[g, top, r]
        - p.ladder[g, x.tops[g], r]
    )


@njit(cache=True)
def flip(p: Instance, x: Picked, i: int, k: int) -> float:
    """Give an item another option; returns what that is worth."""
    g, old = p.group[i], x.choice[i]
    top = level_after(p, x, i, k)
    for r in range(len(x.used)):
        x.used[r] += change(p, x, i, k, r, top)
    x.counts[g, p.level[old]] -= 1
    x.counts[g, p.level[k]] += 1
    x.tops[g] = top
    x.choice[i] = k
    return p.value[i, k] - p.value[i, old]


@njit(cache=True)
def fits(p: Instance, x: Picked) -> bool:
    """Whether a choice is within capacity, exactly."""
    for r in range(len(x.used)):
        if x.used[r] > p.capacity[r]:
            return False
    return True


@njit(cache=True)
def repair(p: Instance, q: Priced, x: Picked, case: int) -> bool:
    """Flip single items, least value lost per relief first, until all fits; whether it does."""
    items, options, resources = p.cost.shape
    for _ in range(items * options):
        if fits(p, x):
            return True
        item, option, least = -1, -1, np.inf
        for i in range(items):
            mode = p.mode[case, p.group[i]]
            for k in range(options):
                if k == x.choice[i] or q.v[k, i] == -np.inf or not p.allowed[mode, k]:
                    continue
                top = level_after(p, x, i, k)
                relief = 0.0
                for r in range(resources):
                    more, over = change(p, x, i, k, r, top), x.used[r] - p.capacity[r]
                    if over > 0 and more < 0:
                        relief += min(-more, over) / max(p.capacity[r], 1)
                    elif more > 0 and more + over > 0:  # nothing may go over, or further over
                        relief = -np.inf
                if relief > 0.0:
                    loss = max(p.value[i, x.choice[i]] - p.value[i, k], 0.0) / relief
                    if loss < least:
                        item, option, least = i, k, loss
        if item < 0:
            return False
        flip(p, x, item, option)
    return fits(p, x)


@njit(cache=True)
def fill(p: Instance, q: Priced, x: Picked, case: int) -> float:
    """Take upgrades that fit, most value per priced cost first; returns what they are worth."""
    items, options, resources = p.cost.shape
    won = 0.0
    for _ in range(items * options):
        item, option, most = -1, -1, 0.0
        for i in range(items):
            mode, own = p.mode[case, p.group[i]], p.value[i, x.choice[i]]
            for k in range(options):
                gain = q.v[k, i] - own
                if gain <= EPSILON or not p.allowed[mode, k]:
                    continue
                top = level_after(p, x, i, k)
                price, fit = 0.0, True
                for r in range(resources):
                    more = change(p, x, i, k, r, top)
                    if more > p.capacity[r] - x.used[r]:
                        fit = False
                        break
                    price += q.prices[r] * more / max(p.capacity[r], 1)
                if fit:
                    rate = gain / max(price, EPSILON)
                    if rate > most:
                        item, option, most = i, k, rate
        if item < 0:
            break
        won += flip(p, x, item, option)
    return won


@njit(cache=True)
def least_regrets(
    p: Instance,
    q: Priced,
    x: Picked,
    case: int,
    single: bool,
    item: np.ndarray,
    option: np.ndarray,
    regret: np.ndarray,
) -> int:
    """The flips that lose least at the prices, ascending; how many were found.

    Args:
        single: At most one flip an item.
        item, option, regret: To fill, of the length wanted.
    """
    items, options, resources = p.cost.shape
    found, most = 0, len(item)
    for i in range(items):
        mode, now = p.mode[case, p.group[i]], x.choice[i]
        top_k, top_loss = -1, np.inf
        for k in range(options):
            if k == now or q.v[k, i] == -np.inf or not p.allowed[mode, k]:
                continue
            loss = q.gains[now, i] - q.gains[k, i]
            top = level_after(p, x, i, k)
            g = p.group[i]
            if top != x.tops[g]:
                for r in range(resources):
                    loss += q.prices[r] * (q.charge[g, top, r] - q.charge[g, x.tops[g], r])
            if single:
                if loss < top_loss:
                    top_k, top_loss = k, loss
            elif found < most or loss < regret[found - 1]:
                found = insert(i, k, loss, item, option, regret, found)
        if single and top_k >= 0 and (found < most or top_loss < regret[found - 1]):
            found = insert(i, top_k, top_loss, item, option, regret, found)
    return found


@njit(cache=True)
def insert(
    i: int, k: int, loss: float, item: np.ndarray, option: np.ndarray, regret: np.ndarray, n: int
) -> int:
    """Keep a list of flips sorted by regret, the largest falling off; its length."""
    at = min(n, len(item) - 1)
    while at > 0 and regret[at - 1] > loss:
        item[at], option[at], regret[at] = item[at - 1], option[at - 1], regret[at - 1]
        at -= 1
    item[at], option[at], regret[at] = i, k, loss
    return min(n + 1, len(item))


@njit(cache=True)
def core(p: Instance, q: Priced, x: Picked, case: int) -> float:
    """Take the best of all sets of flips of the items with least regret; what it is worth."""
    item, option = np.empty(CORE, dtype=np.int64), np.empty(CORE, dtype=np.int64)
    regret = np.empty(CORE)
    n = least_regrets(p, q, x, case, True, item, option, regret)
    old = np.empty(n, dtype=np.int64)
    for j in range(n):
        old[j] = x.choice[item[j]]
    worth, best, best_set, current = 0.0, EPSILON, 0, 0
    for step in range(1, 1 << n):  # Gray code: one flip a step
        bit = 0
        while not (step >> bit) & 1:
            bit += 1
        i = item[bit]
        current ^= 1 << bit
        worth += flip(p, x, i, option[bit] if x.choice[i] == old[bit] else old[bit])
        if worth > best and fits(p, x):
            best, best_set = worth, current
    for j in range(n):
        want = option[j] if (best_set >> j) & 1 else old[j]
        if x.choice[item[j]] != want:
            flip(p, x, item[j], want)
    return best if best_set else 0.0


@njit(cache=True)
def pair(p: Instance, q: Priced, x: Picked, case: int) -> float:
    """Take the best flip, or pair of flips, that fits; returns what it is worth."""
    resources = len(x.used)
    item, option = np.empty(FLIPS, dtype=np.int64), np.empty(FLIPS, dtype=np.int64)
    regret = np.empty(FLIPS)
    n = least_regrets(p, q, x, case, False, item, option, regret)
    best, one, two = EPSILON, -1, -1
    for a in range(n):
        old = x.choice[item[a]]
        gain = flip(p, x, item[a], option[a])
        if gain > best and fits(p, x):
            best, one, two = gain, a, -1
        for b in range(a + 1, n):
            i, k = item[b], option[b]
            both = gain + p.value[i, k] - p.value[i, x.choice[i]]
            if both <= best or i == item[a]:
                continue
            top, fit = level_after(p, x, i, k), True
            for r in range(resources):
                if x.used[r] + change(p, x, i, k, r, top) > p.capacity[r]:
                    fit = False
                    break
            if fit:
                best, one, two = both, a, b
        flip(p, x, item[a], old)
    if one < 0:
        return 0.0
    flip(p, x, item[one], option[one])
    if two >= 0:
        flip(p, x, item[two], option[two])
    return best


@njit(cache=True)
def improve(p: Instance, q: Priced, x: Picked, case: int, worth: float, bound: float) -> float:
    """Fill, then core, pairs and fill until nothing is won; returns the value."""
    worth += fill(p, q, x, case)
    for _ in range(SWEEPS):
        if bound - worth <= TOLERANCE * abs(bound):
            break
        won = core(p, q, x, case) + pair(p, q, x, case)
        if won <= EPSILON:
            break
        worth += won + fill(p, q, x, case)
    return worth


# -- search ----------------------------------------------------------------------------------


@njit(cache=True)
def search(
    p: Instance,
    q: Priced,
    x: Picked,
    case: int,
    opened: np.ndarray,
    bound: float,
    worth: float,
    nodes: int,
) -> tuple[float, int]:
    """Depth-first over flips from the best choice at the prices, with groups open to ``opened``.

    A set of flips cannot be worth more than ``bound`` less their regrets, so branches end where
    that falls to what is known. Leaves the best choice found in ``x``.

    Returns:
        Its value, or ``worth`` where nothing better was found, and the nodes left: 0 when the
        search was not finished.
    """
    items, options, resources = p.cost.shape
    base = picked(p)
    pick(p, q, case, opened, base.choice)
    value = count(p, base)
    slack = bound - worth
    n = 0
    item, option = np.empty(items * options, dtype=np.int64), np.empty(items * options, np.int64)
    regret = np.empty(items * options)
    for i in range(items):
        mode, g = p.mode[case, p.group[i]], p.group[i]
        for k in range(options):
            loss = q.gains[base.choice[i], i] - q.gains[k, i]
            if (
                k != base.choice[i]
                and p.level[k] <= opened[g]
                and p.allowed[mode, k]
                and loss < slack
            ):
                n = insert(i, k, loss, item, option, regret, n)
    if fits(p, base) and value > worth + EPSILON:
        worth = value
        x.choice[:] = base.choice
    stack, before = np.empty(items + 1, dtype=np.int64), np.empty(items + 1, dtype=np.int64)
    lost = np.zeros(items + 2)
    depth, at = 0, 0
    while nodes > 0:
        if at < n and depth < items and lost[depth] + regret[at] < bound - worth - EPSILON:
            i = item[at]
            taken = False
            for d in range(depth):
                taken = taken or item[stack[d]] == i
            if not taken:
                nodes -= 1
                stack[depth], before[depth] = at, base.choice[i]
                lost[depth + 1] = lost[depth] + regret[at]
                depth += 1
                value += flip(p, base, i, option[at])
                if value > worth + EPSILON and fits(p, base):
                    worth = value
                    x.choice[:] = base.choice
            at += 1
        elif depth == 0:
            break
        else:
            depth -= 1
            at = stack[depth]
            value += flip(p, base, item[at], before[depth])
            at += 1
    return worth, nodes


@njit(cache=True)
def solve_case(
    p: Instance, q: Priced, x: Picked, case: int, bound: float, worth: float
) -> tuple[float, float]:
    """Improve on ``x``, worth ``worth``, within one case, ``q`` being at its best prices.

    Returns:
        The value of what is then in ``x``, and a bound on the case.
    """
    y = picked(p)
    opened = np.empty(len(q.charge), dtype=np.int64)
    open_best(p, q, case, opened)
    base = opened.copy()
    pick(p, q, case, opened, y.choice)
    value = count(p, y)
    if repair(p, q, y, case):
        value = improve(p, q, y, case, count(p, y), bound)
        if value > worth + EPSILON:
            worth = value
            x.choice[:] = y.choice
    if bound - worth <= TOLERANCE * abs(bound):
        return worth, bound
    # Other sets of open groups, by what they lose at the prices.
    groups, levels, resources = p.ladder.shape
    who, to = np.empty(PATTERNS, dtype=np.int64), np.empty(PATTERNS, dtype=np.int64)
    regret = np.empty(PATTERNS)
    n = 0
    for g in range(groups):
        for m in range(levels):
            if m != base[g]:
                loss = q.net[p.mode[case, g], g] - worth_at(p, q, case, g, m)
                if loss < bound - worth and (n < PATTERNS or loss < regret[n - 1]):
                    n = insert(g, m, loss, who, to, regret, n)
    for j in range(n):
        if bound - regret[j] <= worth + EPSILON:
            break
        opened[:] = base
        opened[who[j]] = to[j]
        pick(p, q, case, opened, y.choice)
        count(p, y)
        if repair(p, q, y, case):
            value = improve(p, q, y, case, count(p, y), bound - regret[j])
            if value > worth + EPSILON:
                worth = value
                x.choice[:] = y.choice
    if bound - worth > RESCUE * abs(bound):
        nodes = NODES
        worth, nodes = search(p, q, x, case, base, bound, worth, nodes)
        for j in range(n):
            if nodes == 0 or bound - regret[j] <= worth + EPSILON:
                break
            opened[:] = base
            opened[who[j]] = to[j]
            worth, nodes = search(p, q, x, case, opened, bound - regret[j], worth, nodes)
    return worth, bound


@njit(cache=True)
def worth_at(p: Instance, q: Priced, case: int, g: int, opened: int) -> float:
    """What a group is worth at the prices when it is open to a given level."""
    mode = p.mode[case, g]
    worth = 0.0
    for i in range(p.first[g], p.first[g + 1]):
        best = -np.inf
        for k in range(len(q.v)):
            if p.level[k] <= opened and p.allowed[mode, k]:
                best = max(best, q.gains[k, i])
        worth += best
    for r in range(len(q.prices)):
        worth -= q.prices[r] * q.charge[g, opened, r]
    return worth


@njit(cache=True)
def solve_one(p: Instance, x: Picked, prices: np.ndarray) -> tuple[float, float]:
    """Solve one client's knapsack; leaves the choice in ``x.choice``.

    Args:
        x: Holds a choice to improve on.
        prices: float64 [R], where to start, and where the dual ended.

    Returns:
        The value, -inf where nothing was found that fits, and a bound on it.
    """
    q, y = priced(p), picked(p)
    start = count(p, x)
    worth = start if fits(p, x) else -np.inf
    bound = first_prices(p, q, y, prices)
    bound = lower_prices(p, q, y, -1, PRICE_STEPS, FIRST_STEP * bound, bound, prices)
    q.prices[:] = prices
    relax(p, q)
    bounds = q.bounds.copy()
    order = np.argsort(-bounds, kind="mergesort")
    ceiling = worth
    own = np.empty(len(prices))
    for s in range(len(order)):
        case = order[s]
        if bounds[case] <= worth + TOLERANCE * abs(worth):
            ceiling = max(ceiling, bounds[case])
            continue
        own[:] = prices
        top = bounds[case]
        if len(order) > 1:
            top = lower_prices(p, q, y, case, CASE_STEPS, CASE_STEP * top, top, own)
        if top > worth + TOLERANCE * abs(worth):
            q.prices[:] = own
            relax(p, q)
            worth, top = solve_case(p, q, x, case, top, worth)
        ceiling = max(ceiling, top)
    return worth, max(min(bound, ceiling), worth)


@njit(cache=True)
def solve_all(
    value: np.ndarray,
    cost: np.ndarray,
    table: np.ndarray,
    ladder: np.ndarray,
    first: np.ndarray,
    group: np.ndarray,
    level: np.ndarray,
    mode: np.ndarray,
    allowed: np.ndarray,
    capacity: np.ndarray,
    choice: np.ndarray,
    values: np.ndarray,
    bounds: np.ndarray,
) -> None:
    """Solve every client's knapsack, in order.

    Args:
        value: float64 [C or 1, I, K]. cost: int64 [T, I, K, R]. ladder: int64 [T, G, M + 1, R].
        table: int64 [C], which costs and openings are a client's.
        capacity: int64 [C, R].
        choice: int64 [C, I], choices to improve on, and the result.
        values, bounds: float64 [C], to fill.
    """
    resources = capacity.shape[1]
    for c in range(len(capacity)):
        t = table[c]
        v = value[c if len(value) > 1 else 0]
        p = Instance(v, cost[t], ladder[t], first, group, level, mode, allowed, capacity[c])
        x = picked(p)
        x.choice[:] = choice[c]
        prices = np.zeros(resources)
        values[c], bounds[c] = solve_one(p, x, prices)
        choice[c] = x.choice
