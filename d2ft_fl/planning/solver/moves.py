"""Local search: sets of flips, pairs of flips, groups closed on trial."""

import numpy as np

from d2ft_fl.planning.solver.choices import change, fill, fits, flip, level_after
from d2ft_fl.planning.solver.instance import (
    EPSILON,
    NONE,
    Instance,
    Picked,
    Priced,
    copy_picked,
    picked,
)
from d2ft_fl.util.compiled import inner

TOLERANCE = 1e-4  # certified gaps below this share of the bound are left alone
# CORE grows with the caller's effort; FLIPS and SWEEPS are multiplied by it.
CORE, WIDEST_CORE = 6, 12  # items whose flips are enumerated together, more with effort
FLIPS, MOST_FLIPS = 24, 96  # flips of which the best pair is taken
SWEEPS = 1
HOLDERS = 1  # a group that so few items hold open is closed on trial
RULER = np.array([(n & -n).bit_length() - 1 for n in range(1 << WIDEST_CORE)])  # Gray code


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
    """List the flips that lose least at the prices, ascending, and return how many there are.

    Args:
        p: The knapsack.
        q: The knapsack at its prices.
        x: The choice that is to be flipped.
        case: The case that options have to obey.
        single: At most one flip an item.
        item: The item of each flip, to fill; its length is how many flips are wanted.
        option: The item's new option, to fill.
        regret: What the flip loses at the prices, to fill.
    """
    items, options, resources = p.cost.shape
    listed, wanted = 0, len(item)
    for i in range(items):
        mode, now = p.mode[case, p.group[i]], x.choice[i]
        top_k, top_loss = NONE, np.inf
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
            elif listed < wanted or loss < regret[listed - 1]:
                listed = insert(i, k, loss, item, option, regret, listed)
        if single and top_k != NONE and (listed < wanted or top_loss < regret[listed - 1]):
            listed = insert(i, top_k, top_loss, item, option, regret, listed)
    return listed


@inner
def insert(
    i: int, k: int, loss: float, item: np.ndarray, option: np.ndarray, regret: np.ndarray, n: int
) -> int:
    """Insert a flip into a list sorted by regret, whose last falls off; return the new length."""
    at = min(n, len(item) - 1)
    while at > 0 and regret[at - 1] > loss:
        item[at], option[at], regret[at] = item[at - 1], option[at - 1], regret[at - 1]
        at -= 1
    item[at], option[at], regret[at] = i, k, loss
    return min(n + 1, len(item))


@inner
def core(p: Instance, q: Priced, x: Picked, case: int, effort: int) -> float:
    """Take the best set of flips of the items with least regret, and return its value.

    All 2^n sets are tried in the order of the Gray code, which takes one flip a step.
    """
    resources = len(x.used)
    size = min(CORE + effort, WIDEST_CORE)
    item, option = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    regret = np.empty(size)
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
        steady[j] = top <= x.tops[g] and (others > 0 or x.tops[g] == 0)
    utility, best, best_set, current = 0.0, EPSILON, 0, 0
    for step in range(1, 1 << n):
        bit = RULER[step]
        current ^= 1 << bit
        on = (current >> bit) & 1
        if steady[bit]:
            if on:
                utility += gain[bit]
                for r in range(resources):
                    x.used[r] += more[bit, r]
            else:
                utility -= gain[bit]
                for r in range(resources):
                    x.used[r] -= more[bit, r]
        else:
            utility += flip(p, x, item[bit], option[bit] if on else old[bit])
        if utility > best and fits(p, x):
            best, best_set = utility, current
    for j in range(n):  # where the Gray code ends, steady items were flipped in ``used`` alone
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
    """Take the best flip, or pair of flips, that fits, and return its value."""
    resources = len(x.used)
    size = min(FLIPS * effort, MOST_FLIPS)
    item, option = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    regret = np.empty(size)
    n = least_regrets(p, q, x, case, False, item, option, regret)
    gain, more = np.empty(n), np.empty((n, resources), dtype=np.int64)
    room, group = np.empty(resources, dtype=np.int64), np.empty(n, dtype=np.int64)
    for r in range(resources):
        room[r] = p.capacity[r] - x.used[r]
    for a in range(n):
        i, k = item[a], option[a]
        group[a] = p.group[i]
        gain[a] = p.value[i, k] - p.value[i, x.choice[i]]
        top = level_after(p, x, i, k)
        for r in range(resources):
            more[a, r] = change(p, x, i, k, r, top)
    best, one, two = EPSILON, NONE, NONE
    for a in range(n):
        if gain[a] > best:
            over = False
            for r in range(resources):
                over |= more[a, r] > room[r]
            if not over:
                best, one, two = gain[a], a, NONE
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
    if one == NONE:
        return 0.0
    flip(p, x, item[one], option[one])
    if two != NONE:
        flip(p, x, item[two], option[two])
    return best


@inner
def close(p: Instance, q: Priced, x: Picked, y: Picked, case: int) -> float:
    """Lower groups that few items hold open, fill what that frees, and return the value gained.

    Args:
        p: The knapsack.
        q: The knapsack at its prices.
        x: The choice to improve.
        y: Scratch.
        case: The case that options have to obey.
    """
    won = 0.0
    for g in range(len(x.tops)):
        top = x.tops[g]
        if top == 0 or x.counts[g, top] > HOLDERS:
            continue
        copy_picked(x, y)
        gain, mode = 0.0, p.mode[case, g]
        for i in range(p.first[g], p.first[g + 1]):
            if p.level[x.choice[i]] == top:
                best = NONE
                for k in range(len(q.v)):
                    can = p.level[k] < top and p.allowed[mode, k] and q.v[k, i] > -np.inf
                    if can and (best == NONE or q.gains[k, i] > q.gains[best, i]):
                        best = k
                if best == NONE:
                    gain = -np.inf
                    break
                gain += flip(p, y, i, best)
        if gain == -np.inf or not fits(p, y):
            continue
        gain += fill(p, q, y, case)
        if gain > EPSILON:
            won += gain
            copy_picked(y, x)
    return won


@inner
def improve(
    p: Instance, q: Priced, x: Picked, case: int, utility: float, bound: float, effort: int
) -> float:
    """Fill, then repeat core, pairs and fill until nothing is won, and return the value."""
    utility += fill(p, q, x, case)
    if effort and p.ladder.shape[1] > 1:
        utility += close(p, q, x, picked(p), case)
    for _ in range(SWEEPS * effort):
        if bound - utility <= TOLERANCE * abs(bound):
            break
        won = core(p, q, x, case, effort) + pair(p, q, x, case, effort)
        if won <= EPSILON:
            break
        utility += won + fill(p, q, x, case)
    return utility
