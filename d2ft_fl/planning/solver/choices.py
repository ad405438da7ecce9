"""One choice: what it uses, in integers, and how it is made to fit and to fill what is left."""

import numpy as np

from d2ft_fl.planning.solver.instance import EPSILON, NONE, Instance, Picked, Priced
from d2ft_fl.util.compiled import inner


@inner
def count(p: Instance, x: Picked) -> float:
    """Count the levels and the exact use of ``x.choice``, and return its value."""
    utility = 0.0
    for r in range(len(x.used)):
        x.used[r] = 0
    for g in range(len(x.tops)):
        x.tops[g] = 0
        for m in range(x.counts.shape[1]):
            x.counts[g, m] = 0
    for i in range(len(x.choice)):
        k, g = x.choice[i], p.group[i]
        utility += p.value[i, k]
        x.counts[g, p.level[k]] += 1
        x.tops[g] = max(x.tops[g], p.level[k])
        for r in range(len(x.used)):
            x.used[r] += p.cost[i, k, r]
    for g in range(len(x.tops)):
        for r in range(len(x.used)):
            x.used[r] += p.ladder[g, x.tops[g], r]
    return utility


@inner
def level_after(p: Instance, x: Picked, i: int, k: int) -> int:
    """Return the level of an item's group once the item takes option ``k``."""
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
    """Return what a flip adds to resource ``r``, when the item's group is then at level ``top``."""
    g = p.group[i]
    return (
        p.cost[i, k, r]
        - p.cost[i, x.choice[i], r]
        + p.ladder[g, top, r]
        - p.ladder[g, x.tops[g], r]
    )


@inner
def flip(p: Instance, x: Picked, i: int, k: int) -> float:
    """Give an item another option, and return the change of value."""
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
def obeys(p: Instance, choice: np.ndarray, case: int) -> bool:
    """Whether a choice is allowed in a case."""
    allowed = True
    for i in range(len(choice)):
        allowed = allowed and p.allowed[p.mode[case, p.group[i]], choice[i]]
    return allowed


@inner
def case_of(p: Instance, choice: np.ndarray) -> int:
    """Return the first case in which a choice is allowed, NONE where there is none."""
    for case in range(len(p.mode)):
        if obeys(p, choice, case):
            return case
    return NONE


@inner
def repair(p: Instance, q: Priced, x: Picked, case: int) -> bool:
    """Flip items, least value lost per relief first, until all fits; return whether it does."""
    items, options, resources = p.cost.shape
    for _ in range(items * options):
        if fits(p, x):
            return True
        item, option, least = NONE, NONE, np.inf
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
                    elif more > max(-over, 0):  # nothing may go over, or further over
                        relief = -np.inf
                if relief > 0.0:
                    loss = max(p.value[i, x.choice[i]] - p.value[i, k], 0.0) / relief
                    if loss < least:
                        item, option, least = i, k, loss
        if item == NONE:
            return False
        flip(p, x, item, option)
    return fits(p, x)


@inner
def fill(p: Instance, q: Priced, x: Picked, case: int) -> float:
    """Take upgrades that fit, most value per priced cost first, and return their value.

    What does not fit at first is not tried again.
    """
    items, options, resources = p.cost.shape
    item, option = np.empty(items * options, np.int64), np.empty(items * options, np.int64)
    n = 0
    for i in range(items):
        mode, current = p.mode[case, p.group[i]], p.value[i, x.choice[i]]
        for k in range(options):
            if q.v[k, i] > current + EPSILON and p.allowed[mode, k]:
                item[n], option[n] = i, k
                n += 1
    won = 0.0
    while True:
        best, best_rate, fitting = NONE, -np.inf, 0
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
            if rate > best_rate:
                best, best_rate = fitting, rate
            fitting += 1
        n = fitting
        if best == NONE:
            return won
        won += flip(p, x, item[best], option[best])
