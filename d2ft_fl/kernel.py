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

from d2ft_fl.compiled import compiled

# Called from Python, and from others alone.
entry = compiled()
inner = compiled(no_cpython_wrapper=True, no_cfunc_wrapper=True)

EPSILON = 1e-12
TOLERANCE = 1e-4  # certified gaps below this share of the bound are left alone

# Prices.
BISECTIONS = 3  # of the dual along one direction, to start from
FIRST_STEP, CASE_STEP = 0.1, 0.02  # of prices, as a share of the bound
LONGER, SHORTER, DILATION = 1.3, 0.75, 2.0  # of a step that still descends, that overshot; of space

# Effort, most of it multiplied by the caller's.
PRICE_STEPS = 12
CASES = 4  # with the highest bounds are looked at; the best is solved, then others, with effort
CASE_STEPS = 6  # further price steps for it
CORE, WIDEST_CORE = 6, 12  # items whose flips are enumerated together, more with effort
FLIPS, MOST_FLIPS = 24, 96  # flips of which the best pair is taken
SWEEPS = 1
HOLDERS = 1  # groups that so few items hold open are closed on trial
EASY = 0.004  # certified gaps below this, over effort squared, are left alone then
PATTERNS = 1  # sets of open groups that are tried beside the one at the best prices
PROMISING = 0.01  # they get sweeps when they come this near before
HARD = 0.08  # certified gaps above this, over effort squared, get more of them, and a search
HARD_PATTERNS = 24
NODES = 4_000
SCARCER = 1.5  # from pass to pass, for items that too few clients train
RULER = np.array([0, *((n & -n).bit_length() - 1 for n in range(1, 1 << WIDEST_CORE))])  # Gray code


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
        some: int64 [R], at: uint64 [I], best: float64 [I]: scratch.
        arg: int64 [modes, M + 1, I], the best option of at most each level.
        nets: float64 [modes, M + 1, G], what a group is worth when open to each level.
        net: float64 [modes, G], the most of them. opened: int64 [modes, G], the level for it.
        bounds: float64 [S].
    """

    v: np.ndarray
    w: np.ndarray
    charge: np.ndarray
    scale: np.ndarray
    prices: np.ndarray
    gains: np.ndarray
    some: np.ndarray
    at: np.ndarray
    best: np.ndarray
    arg: np.ndarray
    nets: np.ndarray
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


@inner
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
        np.empty(resources, dtype=np.int64),
        np.empty(items, dtype=np.uint64),
        np.empty(items),
        np.empty((modes, levels, items), dtype=np.int64),
        np.empty((modes, levels, groups)),
        np.empty((modes, groups)),
        np.empty((modes, groups), dtype=np.int64),
        np.empty(p.mode.shape[0]),
    )


@inner
def relax(p: Instance, q: Priced) -> int:
    """The dual's inner maximum at ``q.prices``: fills what depends on them; the best case."""
    resources, options, items = q.w.shape
    groups, levels = q.charge.shape[0], q.charge.shape[1]
    some = 0  # resources with a price, two of which are taken at a time
    for r in range(resources):
        if q.prices[r] > 0.0:
            q.some[some] = r
            some += 1
    for k in range(options):
        row = q.gains[k]
        row[:] = q.v[k]
        for at in range(0, some, 2):
            one, two = q.some[at], q.some[min(at + 1, some - 1)]
            price, weight, other = q.prices[one], q.w[one, k], q.w[two, k]
            second = q.prices[two] if at + 1 < some else 0.0
            for i in range(items):
                row[i] -= price * weight[i] + second * other[i]
    for m in range(len(p.allowed)):
        best = q.best
        best[:] = -np.inf
        for step in range(levels):
            arg, any_here = q.arg[m, step], step == 0
            if step:
                arg[:] = q.arg[m, step - 1]
            else:
                arg[:] = 0
            for k in range(options):
                any_here |= p.level[k] == step and p.allowed[m, k]
            if not any_here:  # no reason to open so far
                q.nets[m, step] = -np.inf
                continue
            for k in range(options):
                if p.level[k] == step and p.allowed[m, k]:
                    row = q.gains[k]
                    for i in range(items):
                        better = row[i] > best[i]
                        best[i] = row[i] if better else best[i]
                        arg[i] = k if better else arg[i]
            for g in range(groups):
                worth = 0.0
                for r in range(resources):
                    worth -= q.prices[r] * q.charge[g, step, r]
                for i in range(p.first[g], p.first[g + 1]):
                    worth += best[i]
                q.nets[m, step, g] = worth
                if step == 0 or worth > q.net[m, g]:
                    q.net[m, g] = worth
                    q.opened[m, g] = step
    total, top = q.prices.sum(), 0
    for s in range(len(p.mode)):
        bound = total
        for g in range(groups):
            bound += q.net[p.mode[s, g], g]
        q.bounds[s] = bound
        if bound > q.bounds[top]:
            top = s
    return top


@inner
def pick(p: Instance, q: Priced, case: int, opened: np.ndarray, choice: np.ndarray) -> None:
    """Each item's best option at the prices, with groups open to at most ``opened`` [G]."""
    for g in range(len(opened)):
        arg = q.arg[p.mode[case, g], opened[g]]
        for i in range(p.first[g], p.first[g + 1]):
            choice[i] = arg[i]


@inner
def open_best(p: Instance, q: Priced, case: int, opened: np.ndarray) -> None:
    """The levels of groups [G] that the prices choose in a case."""
    for g in range(len(opened)):
        opened[g] = q.opened[p.mode[case, g], g]


@inner
def slack_at(p: Instance, q: Priced, case: int, x: Picked, slope: np.ndarray) -> float:
    """Evaluate the dual at ``q.prices``, of one case or of the worst (-1).

    Fills the choice that attains it, and a subgradient, its slack as shares of capacity [R].
    """
    at = relax(p, q)
    if case >= 0:
        at = case
    open_best(p, q, at, x.tops)
    pick(p, q, at, x.tops, x.choice)
    options, resources = p.cost.shape[1:]
    costs, ladder = p.cost.reshape(-1), p.ladder.reshape(-1)
    for i in range(len(x.choice)):
        q.at[i] = (i * options + x.choice[i]) * resources
    for r in range(resources):
        used = 0
        for i in range(len(q.at)):
            used += costs[q.at[i] + np.uint64(r)]
        for g in range(len(x.tops)):
            used += ladder[np.uint64((g * p.ladder.shape[1] + x.tops[g]) * resources + r)]
        slope[r] = 1.0 - used * q.scale[r]
    return q.bounds[at]


@inner
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


@inner
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


@inner
def picked(p: Instance) -> Picked:
    """Room for a choice."""
    groups, levels, resources = p.ladder.shape
    return Picked(
        np.zeros(len(p.group), dtype=np.int64),
        np.zeros((groups, levels), dtype=np.int64),
        np.zeros(groups, dtype=np.int64),
        np.zeros(resources, dtype=np.int64),
    )


@inner
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


@inner
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


@inner
def change(p: Instance, x: Picked, i: int, k: int, r: int, top: int) -> int:
    """What a flip adds to one resource, the item's group then being at level ``top``."""
    g = p.group[i]
    return (
        p.cost[i, k, r]
        - p.cost[i, x.choice[i], r]
        + p.ladder[g, top, r]
        - p.ladder[g, x.tops[g], r]
    )


@inner
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


@inner
def fits(p: Instance, x: Picked) -> bool:
    """Whether a choice is within capacity, exactly."""
    over = False
    for r in range(len(x.used)):
        over |= x.used[r] > p.capacity[r]
    return not over


@inner
def obeys(p: Instance, choice: np.ndarray) -> bool:
    """Whether a choice is allowed in some case."""
    for case in range(len(p.mode)):
        allowed = True
        for i in range(len(choice)):
            allowed = allowed and p.allowed[p.mode[case, p.group[i]], choice[i]]
        if allowed:
            return True
    return False


@inner
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


@inner
def fill(p: Instance, q: Priced, x: Picked, case: int) -> float:
    """Take upgrades that fit, most value per priced cost first; returns what they are worth.

    What does not fit at first is not looked at again.
    """
    items, options, resources = p.cost.shape
    item, option = np.empty(items * options, np.int64), np.empty(items * options, np.int64)
    n = 0
    for i in range(items):
        mode, own = p.mode[case, p.group[i]], p.value[i, x.choice[i]]
        for k in range(options):
            if q.v[k, i] > own + EPSILON and p.allowed[mode, k]:
                item[n], option[n] = i, k
                n += 1
    won = 0.0
    while n > 0:
        best, most, fitting = -1, 0.0, 0
        for j in range(n):
            i, k = item[j], option[j]
            gain = p.value[i, k] - p.value[i, x.choice[i]]
            if gain <= EPSILON:
                continue
            top = level_after(p, x, i, k)
            price, over = 0.0, False
            for r in range(resources):
                more = change(p, x, i, k, r, top)
                over |= more > p.capacity[r] - x.used[r]
                price += q.prices[r] * more * q.scale[r]
            if over:
                continue
            item[fitting], option[fitting] = i, k
            rate = gain / max(price, EPSILON)
            if rate > most:
                best, most = fitting, rate
            fitting += 1
        n = fitting
        if best < 0:
            break
        won += flip(p, x, item[best], option[best])
    return won


@inner
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


@inner
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


@inner
def core(p: Instance, q: Priced, x: Picked, case: int, effort: int) -> float:
    """Take the best of all sets of flips of the items with least regret; what it is worth.

    All 2^n sets in Gray code, one flip a step.
    """
    resources = len(x.used)
    most = min(CORE + effort, WIDEST_CORE)
    item, option = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    regret = np.empty(most)
    n = least_regrets(p, q, x, case, True, item, option, regret)
    old, gain = np.empty(n, dtype=np.int64), np.empty(n)
    more, steady = np.empty((n, resources), dtype=np.int64), np.empty(n, dtype=np.bool_)
    # A group is steady when items outside the core hold it open to all that the core may ask.
    for j in range(n):
        i, k = item[j], option[j]
        old[j] = x.choice[i]
        gain[j] = p.value[i, k] - p.value[i, old[j]]
        for r in range(resources):
            more[j, r] = p.cost[i, k, r] - p.cost[i, old[j], r]
        g = p.group[i]
        top, others = p.level[k], x.counts[g, x.tops[g]]
        for other in range(n):
            if p.group[item[other]] == g:
                top = max(top, p.level[option[other]])
                others -= p.level[x.choice[item[other]]] == x.tops[g]
        steady[j] = x.tops[g] == 0 if top == 0 else top <= x.tops[g] and others > 0
    worth, best, best_set, current = 0.0, EPSILON, 0, 0
    for step in range(1, 1 << n):
        bit = RULER[step]
        current ^= 1 << bit
        on = (current >> bit) & 1
        if steady[bit]:
            if on:
                worth += gain[bit]
                for r in range(resources):
                    x.used[r] += more[bit, r]
            else:
                worth -= gain[bit]
                for r in range(resources):
                    x.used[r] -= more[bit, r]
        else:
            worth += flip(p, x, item[bit], option[bit] if on else old[bit])
        if worth > best and fits(p, x):
            best, best_set = worth, current
    for j in range(n):  # where the code ends, steady items were flipped in ``used`` alone
        now, want = (current >> j) & 1, (best_set >> j) & 1
        if steady[j]:
            for r in range(resources):
                x.used[r] -= now * more[j, r]
            now = 0
        if now != want:
            flip(p, x, item[j], option[j] if want else old[j])
    return best if best_set else 0.0


@inner
def pair(p: Instance, q: Priced, x: Picked, case: int, effort: int) -> float:
    """Take the best flip, or pair of flips, that fits; returns what it is worth."""
    resources = len(x.used)
    most = min(FLIPS * effort, MOST_FLIPS)
    item, option = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    regret = np.empty(most)
    n = least_regrets(p, q, x, case, False, item, option, regret)
    gain, more = np.empty(n), np.empty((n, resources), dtype=np.int64)
    room, group = p.capacity - x.used, p.group[item[:n]]
    for a in range(n):
        i, k = item[a], option[a]
        gain[a] = p.value[i, k] - p.value[i, x.choice[i]]
        top = level_after(p, x, i, k)
        for r in range(resources):
            more[a, r] = change(p, x, i, k, r, top)
    best, one, two = EPSILON, -1, -1
    for a in range(n):
        if gain[a] > best:
            over = False
            for r in range(resources):
                over |= more[a, r] > room[r]
            if not over:
                best, one, two = gain[a], a, -1
        for b in range(a + 1, n):
            both = gain[a] + gain[b]
            if both <= best or item[a] == item[b]:
                continue
            over = False
            if group[a] != group[b]:
                for r in range(resources):
                    over |= more[a, r] + more[b, r] > room[r]
            else:
                old = x.choice[item[a]]
                flip(p, x, item[a], option[a])
                top = level_after(p, x, item[b], option[b])
                for r in range(resources):
                    extra = change(p, x, item[b], option[b], r, top)
                    over = over or x.used[r] + extra > p.capacity[r]
                flip(p, x, item[a], old)
            if not over:
                best, one, two = both, a, b
    if one < 0:
        return 0.0
    flip(p, x, item[one], option[one])
    if two >= 0:
        flip(p, x, item[two], option[two])
    return best


@inner
def close(p: Instance, q: Priced, x: Picked, y: Picked, case: int) -> float:
    """Lower groups that few items hold open, and fill what that frees; what is won.

    Args:
        y: Scratch.
    """
    won = 0.0
    for g in range(len(x.tops)):
        top = x.tops[g]
        if top == 0 or x.counts[g, top] > HOLDERS:
            continue
        y.choice[:] = x.choice
        y.counts[:] = x.counts
        y.tops[:] = x.tops
        y.used[:] = x.used
        gain, mode = 0.0, p.mode[case, g]
        for i in range(p.first[g], p.first[g + 1]):
            if p.level[x.choice[i]] == top:
                best = -1
                for k in range(len(q.v)):
                    can = p.level[k] < top and p.allowed[mode, k] and q.v[k, i] > -np.inf
                    if can and (best < 0 or q.gains[k, i] > q.gains[best, i]):
                        best = k
                if best < 0:
                    gain = -np.inf
                    break
                gain += flip(p, y, i, best)
        if gain == -np.inf or not fits(p, y):
            continue
        gain += fill(p, q, y, case)
        if gain > EPSILON:
            won += gain
            x.choice[:] = y.choice
            x.counts[:] = y.counts
            x.tops[:] = y.tops
            x.used[:] = y.used
    return won


@inner
def improve(
    p: Instance, q: Priced, x: Picked, case: int, worth: float, bound: float, effort: int
) -> float:
    """Fill, then core, pairs and fill until nothing is won; returns the value."""
    worth += fill(p, q, x, case)
    if effort and p.ladder.shape[1] > 1:
        worth += close(p, q, x, picked(p), case)
    for _ in range(SWEEPS * effort):
        if bound - worth <= TOLERANCE * abs(bound):
            break
        won = core(p, q, x, case, effort) + pair(p, q, x, case, effort)
        if won <= EPSILON:
            break
        worth += won + fill(p, q, x, case)
    return worth


# -- search ----------------------------------------------------------------------------------


@inner
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
    items, options = p.cost.shape[:2]
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


@inner
def solve_case(
    p: Instance, q: Priced, x: Picked, case: int, bound: float, worth: float, effort: int
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
        value = improve(p, q, y, case, count(p, y), bound, effort)
        if value > worth + EPSILON:
            worth = value
            x.choice[:] = y.choice
    if effort == 0 or bound - worth <= EASY / effort**2 * abs(bound):
        return worth, bound
    # Other sets of open groups, by what they lose at the prices.
    groups, levels = p.ladder.shape[:2]
    hard = bound - worth > HARD / effort**2 * abs(bound)
    most = (HARD_PATTERNS if hard else PATTERNS) * effort
    who, to = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    regret = np.empty(most)
    n = 0
    for g in range(groups):
        for m in range(levels):
            if m != base[g]:
                loss = q.net[p.mode[case, g], g] - q.nets[p.mode[case, g], m, g]
                if loss < bound - worth and (n < most or loss < regret[n - 1]):
                    n = insert(g, m, loss, who, to, regret, n)
    for j in range(n):
        if bound - regret[j] <= worth + EPSILON:
            break
        opened[:] = base
        opened[who[j]] = to[j]
        pick(p, q, case, opened, y.choice)
        count(p, y)
        if repair(p, q, y, case):
            value = count(p, y) + fill(p, q, y, case)
            if not hard and value < worth - PROMISING * abs(worth):
                continue
            value = improve(p, q, y, case, value, bound - regret[j], effort)
            if value > worth + EPSILON:
                worth = value
                x.choice[:] = y.choice
    if hard:
        nodes = NODES * effort
        worth, nodes = search(p, q, x, case, base, bound, worth, nodes)
        for j in range(n):
            if nodes == 0 or bound - regret[j] <= worth + EPSILON:
                break
            opened[:] = base
            opened[who[j]] = to[j]
            worth, nodes = search(p, q, x, case, opened, bound - regret[j], worth, nodes)
    return worth, bound


@inner
def solve_one(
    p: Instance, x: Picked, prices: np.ndarray, fresh: bool, effort: int
) -> tuple[float, float]:
    """Solve one client's knapsack; leaves the choice in ``x.choice``.

    Args:
        x: Holds a choice to improve on, whether it fits or not.
        prices: float64 [R], to fill with the best prices found.
        fresh: Whether to find where they start; else they are near the best already.

    Returns:
        The value, -inf where nothing was found that fits, and a bound on it.
    """
    q, y = priced(p), picked(p)
    start = count(p, x)
    worth = start if fits(p, x) and obeys(p, x.choice) else -np.inf
    resources = len(prices)
    if fresh:
        bound = first_prices(p, q, y, prices)
        steps = max(PRICE_STEPS, 3 * resources) * max(effort, 1)
        lower_prices(p, q, y, -1, steps, FIRST_STEP * bound, bound, prices)
    else:
        q.prices[:] = prices
        bound = q.bounds[relax(p, q)]
        lower_prices(p, q, y, -1, CASE_STEPS, CASE_STEP * bound, bound, prices)
    q.prices[:] = prices
    relax(p, q)
    bounds = q.bounds.copy()
    order = np.argsort(-bounds, kind="mergesort")
    likely, most = order[0], -np.inf
    if len(order) > 1:  # a quick look at the cases with the highest bounds
        for case in order[:CASES]:
            if bounds[case] <= most:
                break
            open_best(p, q, case, y.tops)
            pick(p, q, case, y.tops, y.choice)
            count(p, y)
            if repair(p, q, y, case):
                value = count(p, y) + fill(p, q, y, case)
                if value > most:
                    likely, most = case, value
                if value > worth + EPSILON:
                    worth = value
                    x.choice[:] = y.choice
    left = bounds.copy()  # of cases that are not solved yet
    for turn in range(min(max(effort, 1), len(order))):
        if turn:
            likely = left.argmax()
        top = left[likely]
        left[likely] = -np.inf
        if top - worth > TOLERANCE * abs(top):  # so too where nothing is known yet
            if len(order) > 1:
                own = prices.copy()
                top = lower_prices(p, q, y, likely, CASE_STEPS, CASE_STEP * top, top, own)
                q.prices[:] = own
                relax(p, q)
            worth, top = solve_case(p, q, x, likely, top, worth, effort)
        bounds[likely] = top
    return worth, max(bounds.max(), worth)


@entry
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
    effort: int,
) -> None:
    """Solve every client's knapsack, in order.

    Args:
        value: float64 [C or 1, I, K]. cost: int64 [T, I, K, R]. ladder: int64 [T, G, M + 1, R].
        table: int64 [C], which costs and ladder are a client's.
        capacity: int64 [C, R].
        choice: int64 [C, I], choices to improve on, and the result.
        values, bounds: float64 [C], to fill.
    """
    prices = np.empty(capacity.shape[1])
    for c in range(len(capacity)):
        t, v = table[c], value[c if len(value) > 1 else 0]
        p = Instance(v, cost[t], ladder[t], first, group, level, mode, allowed, capacity[c])
        x = picked(p)
        x.choice[:] = choice[c]
        found, bounds[c] = solve_one(p, x, prices, True, effort)
        worth = count(p, x)  # once more, from the integers
        values[c] = worth if found > -np.inf and fits(p, x) else -np.inf
        choice[c] = x.choice


@inner
def returns(count: float, reference: float) -> float:
    """h(n) = reference log(1 + n / reference): what n clients on one subnet are worth together."""
    return reference * np.log1p(count / reference)


@entry
def spread_all(
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
    train: np.ndarray,
    share: np.ndarray,
    weight: np.ndarray,
    reference: float,
    least: int,
    passes: int,
    choice: np.ndarray,
    values: np.ndarray,
    bounds: np.ndarray,
    marginal: np.ndarray,
    effort: int,
) -> None:
    """Coupled through diminishing returns: best responses, client after client, in some passes.

    Arguments beside those of :func:`solve_all`:
        value: What options are worth apart from training.
        train: float64 [I], what training an item is worth. share: float64 [K], how far an option
            trains.
        weight: float64 [C], what a client counts for.
        reference: Of :func:`returns`. least: Clients that every item should have.
        choice: 0 at first.
        values: float64 [C], what each choice is worth apart from training, to fill.
        bounds: float64 [C], bounds on each client's knapsack with returns taken at ``marginal``.
        marginal: float64 [I], the slope of returns at the end, to fill.
    """
    clients, resources = capacity.shape
    items, options = cost.shape[1], cost.shape[2]
    prices = np.zeros((clients, resources))
    amount, people = np.zeros(items), np.zeros(items, dtype=np.int64)
    scarce = np.zeros(items)  # what training an item is worth besides while few do
    v = np.empty((items, options))
    for turn in range(passes):
        for c in range(clients):
            fixed, t = value[c if len(value) > 1 else 0], table[c]
            for i in range(items):
                old = share[choice[c, i]]
                amount[i] -= old * weight[c]
                people[i] -= old > 0.0
                now = returns(amount[i], reference)
                for k in range(options):
                    v[i, k] = fixed[i, k]
                    if share[k] > 0.0:
                        more = returns(amount[i] + share[k] * weight[c], reference) - now
                        v[i, k] += train[i] * more
                        if people[i] < least:
                            v[i, k] += scarce[i]
            p = Instance(v, cost[t], ladder[t], first, group, level, mode, allowed, capacity[c])
            x = picked(p)
            x.choice[:] = choice[c]
            solve_one(p, x, prices[c], turn == 0, effort if turn == passes - 1 else 0)
            count(p, x)
            if fits(p, x):
                choice[c] = x.choice
            for i in range(items):
                new = share[choice[c, i]]
                amount[i] += new * weight[c]
                people[i] += new > 0.0
        for i in range(items):
            if people[i] < least:
                scarce[i] = SCARCER * scarce[i] + train.max()
    for i in range(items):
        marginal[i] = 1.0 / (1.0 + amount[i] / reference)
    for c in range(clients):
        fixed, t = value[c if len(value) > 1 else 0], table[c]
        for i in range(items):
            for k in range(options):
                v[i, k] = fixed[i, k] + train[i] * marginal[i] * share[k] * weight[c]
        p = Instance(v, cost[t], ladder[t], first, group, level, mode, allowed, capacity[c])
        q, x = priced(p), picked(p)
        q.prices[:] = prices[c]
        bound = q.bounds[relax(p, q)]
        bounds[c] = lower_prices(p, q, x, -1, CASE_STEPS, CASE_STEP * bound, bound, prices[c])
        x.choice[:] = choice[c]
        values[c] = -np.inf
        count(p, x)
        if fits(p, x):
            values[c] = 0.0
            for i in range(items):
                values[c] += fixed[i, choice[c, i]]
