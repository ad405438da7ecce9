"""The Lagrangian dual: prices of resources, and a bound on the value of any choice."""

import numpy as np

from d2ft_fl.planning.solver.instance import EPSILON, Instance, Picked, Priced, copy
from d2ft_fl.util.compiled import inner

BISECTIONS = 3  # of the dual along one direction, to start from
LONGER, SHORTER, DILATION = 1.3, 0.75, 2.0  # of a step that still descends, that overshot; of space


@inner
def relax(p: Instance, q: Priced) -> int:
    """Solve the dual's inner maximum at ``q.prices``, and return the case with the largest.

    Fills everything in ``q`` that depends on prices.
    """
    resources, options, items = q.w.shape
    groups, levels = q.charge.shape[0], q.charge.shape[1]
    some = 0  # resources with a price, two of which are taken at a time
    for r in range(resources):
        if q.prices[r]:  # is above 0
            q.some[some] = r
            some += 1
    for k in range(options):
        row = q.gains[k]
        copy(q.v[k], row)
        for at in range(0, some, 2):
            one, two = q.some[at], q.some[min(at + 1, some - 1)]
            price, weight, other = q.prices[one], q.w[one, k], q.w[two, k]
            second = q.prices[two] if at + 1 < some else 0.0
            for i in range(items):
                row[i] -= price * weight[i] + second * other[i]
    for m in range(len(p.allowed)):
        best = q.best
        for i in range(items):
            best[i] = -np.inf
            q.arg[m, 0, i] = 0
        for step in range(levels):
            arg, any_here = q.arg[m, step], step == 0
            if step:
                copy(q.arg[m, step - 1], arg)
            for k in range(options):
                any_here |= p.level[k] == step and p.allowed[m, k]
            if not any_here:  # no reason to open so far
                for g in range(groups):
                    q.nets[m, step, g] = -np.inf
                continue
            for k in range(options):
                if p.level[k] == step and p.allowed[m, k]:
                    row = q.gains[k]
                    for i in range(items):
                        better = row[i] > best[i]
                        best[i] = row[i] if better else best[i]
                        arg[i] = k if better else arg[i]
            for g in range(groups):
                utility = 0.0
                for r in range(resources):
                    utility -= q.prices[r] * q.charge[g, step, r]
                for i in range(p.first[g], p.first[g + 1]):
                    utility += best[i]
                q.nets[m, step, g] = utility
                if step == 0 or utility > q.net[m, g]:
                    q.net[m, g] = utility
                    q.opened[m, g] = step
    total, top = 0.0, 0
    for r in range(resources):
        total += q.prices[r]
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
    """Choose each item's best option at the prices, with groups open to ``opened`` [G] at most."""
    for g in range(len(opened)):
        arg = q.arg[p.mode[case, g], opened[g]]
        for i in range(p.first[g], p.first[g + 1]):
            choice[i] = arg[i]


@inner
def open_best(p: Instance, q: Priced, case: int, opened: np.ndarray) -> None:
    """Fill ``opened`` [G] with the levels of groups that are best at the prices in a case."""
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
    """Bisect the dual along the direction of overuse, and return its least value.

    Fills ``best`` [R] with the prices there.
    """
    resources = len(best)
    slope, direction = np.empty(resources), np.empty(resources)
    for r in range(resources):
        q.prices[r], best[r] = 0.0, 0.0
    bound = slack_at(p, q, -1, x, slope)
    overuse = 0.0
    for r in range(resources):
        direction[r] = max(0.0, -slope[r])
        overuse += direction[r]
    if overuse == 0.0 or bound == -np.inf:  # all fits, or nothing is allowed
        return bound
    for r in range(resources):
        direction[r] /= overuse
    low, high = 1e-3 * bound, bound
    for _ in range(BISECTIONS):
        at = np.sqrt(low * high)
        for r in range(resources):
            q.prices[r] = at * direction[r]
        now = slack_at(p, q, -1, x, slope)
        if now < bound:
            bound = now
            copy(q.prices, best)
        under = 0.0
        for r in range(resources):
            under += slope[r] * direction[r]
        if under < 0.0:
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
        p: The knapsack.
        q: The knapsack at its prices.
        x: Scratch for a choice.
        case: The case whose dual is minimised; -1 for the largest over cases.
        steps: How many steps to take.
        length: Of the first step.
        bound: The dual's value at ``best``.
        best: float64 [R], prices to start from, and the best ones found.

    Returns:
        The least bound found, that of ``best`` then.
    """
    resources = len(best)
    slope, last, step = np.empty(resources), np.empty(resources), np.empty(resources)
    direction, turned = np.empty(resources), np.empty(resources)
    dilation = np.empty((resources, resources))
    for r in range(resources):
        for a in range(resources):
            dilation[r, a] = 1.0 if r == a else 0.0
    copy(best, q.prices)
    for turn in range(steps + 1):
        now = slack_at(p, q, case, x, slope)
        if now < bound:
            bound = now
            copy(q.prices, best)
        for r in range(resources):
            if q.prices[r] <= 0.0:
                slope[r] = min(slope[r], 0.0)  # the price cannot fall further
        if turn:
            under, norm = 0.0, 0.0
            for r in range(resources):
                under += slope[r] * step[r]
            length *= LONGER if under > 0.0 else SHORTER
            for a in range(resources):  # dilate along the difference of two slopes
                direction[a] = 0.0
                for r in range(resources):
                    direction[a] += dilation[r, a] * (slope[r] - last[r])
                norm += direction[a] * direction[a]
            if norm > EPSILON:
                norm = np.sqrt(norm)
                for r in range(resources):
                    turned[r] = 0.0
                    for a in range(resources):
                        turned[r] += dilation[r, a] * direction[a] / norm
                for r in range(resources):
                    for a in range(resources):
                        dilation[r, a] -= (1.0 - 1.0 / DILATION) * turned[r] * direction[a] / norm
        norm = 0.0
        for a in range(resources):
            direction[a] = 0.0
            for r in range(resources):
                direction[a] += dilation[r, a] * slope[r]
            norm += direction[a] * direction[a]
        if norm < EPSILON:
            break
        norm = np.sqrt(norm)
        for r in range(resources):
            step[r] = 0.0
            for a in range(resources):
                step[r] += dilation[r, a] * direction[a] / norm
            q.prices[r] = max(0.0, q.prices[r] - length * step[r])
            last[r] = slope[r]
    return bound
