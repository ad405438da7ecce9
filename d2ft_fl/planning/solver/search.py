"""One client's knapsack, from prices to a choice."""

import numpy as np

from d2ft_fl.planning.solver.choices import case_of, count, fill, fits, flip, obeys, repair
from d2ft_fl.planning.solver.instance import (
    EPSILON,
    Instance,
    Picked,
    Priced,
    copy,
    copy_picked,
    picked,
    priced,
)
from d2ft_fl.planning.solver.moves import TOLERANCE, improve, insert
from d2ft_fl.planning.solver.prices import first_prices, lower_prices, open_best, pick, relax
from d2ft_fl.util.compiled import inner

FIRST_STEP, CASE_STEP = 0.1, 0.02  # of prices, as a share of the bound
# Numbers of steps, cases, patterns and nodes are multiplied by the caller's effort.
PRICE_STEPS = 12
CASES = 4  # with the highest bounds are looked at; the best is solved, then others, with effort
CASE_STEPS = 6  # further price steps for it
EASY = 0.004  # certified gaps below this, over effort squared, are left alone then
PATTERNS = 1  # sets of open groups that are tried beside the one at the best prices
PROMISING = 0.01  # they get sweeps when they come this near before
HARD = 0.08  # certified gaps above this, over effort squared, get more of them, and a search
HARD_PATTERNS = 24
NODES = 4_000


@inner
def search(
    p: Instance,
    q: Priced,
    x: Picked,
    case: int,
    opened: np.ndarray,
    bound: float,
    utility: float,
    nodes: int,
) -> tuple[float, int]:
    """Search depth-first over flips from the best choice at the prices, groups open to ``opened``.

    A set of flips has no higher value than ``bound`` less their regrets, so branches end where that
    falls to the best value known. Leaves the best choice in ``x``.

    Returns:
        Its value, or ``utility`` where there is nothing better, and the nodes left: 0 when the
        search was not finished.
    """
    items, options = p.cost.shape[:2]
    base = picked(p)
    pick(p, q, case, opened, base.choice)
    value = count(p, base)
    slack = bound - utility
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
    if fits(p, base) and value > utility + EPSILON:
        utility = value
        copy(base.choice, x.choice)
    stack, before = np.empty(items, dtype=np.int64), np.empty(items, dtype=np.int64)
    lost = np.empty(items + 1)
    lost[0] = 0.0
    depth, at = 0, 0
    while nodes > 0:
        if at < n and lost[depth] + regret[at] < bound - utility - EPSILON:
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
                if value > utility + EPSILON and fits(p, base):
                    utility = value
                    copy(base.choice, x.choice)
            at += 1
        elif depth == 0:
            break
        else:
            depth -= 1
            at = stack[depth]
            value += flip(p, base, item[at], before[depth])
            at += 1
    return utility, nodes


@inner
def settle(p: Instance, q: Priced, y: Picked, case: int, opened: np.ndarray) -> float:
    """Repair the best choice at the prices with groups open to ``opened``, and return its value.

    The value is -inf where the choice cannot be made to fit.
    """
    pick(p, q, case, opened, y.choice)
    count(p, y)
    return count(p, y) if repair(p, q, y, case) else -np.inf


@inner
def solve_case(
    p: Instance, q: Priced, x: Picked, case: int, bound: float, utility: float, effort: int
) -> tuple[float, float]:
    """Improve on ``x``, of value ``utility``, within one case, ``q`` being at its best prices.

    Returns:
        The value of what is then in ``x``, and a bound on the case.
    """
    y = picked(p)
    opened, base = np.empty(len(q.charge), np.int64), np.empty(len(q.charge), np.int64)
    open_best(p, q, case, opened)
    copy(opened, base)
    value = settle(p, q, y, case, opened)
    if value == -np.inf and obeys(p, x.choice, case):
        copy_picked(x, y)
        value = utility
    if value > -np.inf:
        value = improve(p, q, y, case, value, bound, effort)
        if value > utility + EPSILON:
            utility = value
            copy(y.choice, x.choice)
    if effort == 0 or bound - utility <= EASY / effort**2 * abs(bound):
        return utility, bound
    # Other sets of open groups, by what they lose at the prices.
    groups, levels = p.ladder.shape[:2]
    hard = bound - utility > HARD / effort**2 * abs(bound)
    wanted = (HARD_PATTERNS if hard else PATTERNS) * effort
    who, to = np.empty(wanted, dtype=np.int64), np.empty(wanted, dtype=np.int64)
    regret = np.empty(wanted)
    n = 0
    for g in range(groups):
        for m in range(levels):
            if m != base[g]:
                loss = q.net[p.mode[case, g], g] - q.nets[p.mode[case, g], m, g]
                if loss < bound - utility and (n < wanted or loss < regret[n - 1]):
                    n = insert(g, m, loss, who, to, regret, n)
    for j in range(n):
        if bound - regret[j] <= utility + EPSILON:
            break
        copy(base, opened)
        opened[who[j]] = to[j]
        value = settle(p, q, y, case, opened)
        if value > -np.inf:
            value += fill(p, q, y, case)
            if not hard and value < utility - PROMISING * abs(utility):
                continue
            value = improve(p, q, y, case, value, bound - regret[j], effort)
            if value > utility + EPSILON:
                utility = value
                copy(y.choice, x.choice)
    if hard:
        nodes = NODES * effort
        utility, nodes = search(p, q, x, case, base, bound, utility, nodes)
        for j in range(n):
            if nodes == 0 or bound - regret[j] <= utility + EPSILON:
                break
            copy(base, opened)
            opened[who[j]] = to[j]
            utility, nodes = search(p, q, x, case, opened, bound - regret[j], utility, nodes)
    return utility, bound


@inner
def solve_one(
    p: Instance, x: Picked, prices: np.ndarray, fresh: bool, effort: int
) -> tuple[float, float]:
    """Solve one client's knapsack, and leave the choice in ``x.choice``.

    Args:
        p: The knapsack.
        x: A choice to improve on, whether it fits or not, and the result.
        prices: float64 [R], prices to start from unless ``fresh``, and the best ones found.
        fresh: Whether prices to start from have to be found first.
        effort: Multiplies steps, flips and nodes.

    Returns:
        The value, -inf where no choice that fits is known, and a bound on it.
    """
    q, y = priced(p), picked(p)
    start = count(p, x)
    own = case_of(p, x.choice)
    utility = start if fits(p, x) and own >= 0 else -np.inf
    resources = len(prices)
    if fresh:
        bound, steps = first_prices(p, q, y, prices), max(PRICE_STEPS, 3 * resources)
        steps, step = steps * max(effort, 1), FIRST_STEP
    else:
        copy(prices, q.prices)
        bound, steps, step = q.bounds[relax(p, q)], CASE_STEPS, CASE_STEP
    if bound == -np.inf:  # an item has no option in any case
        return utility, bound
    lower_prices(p, q, y, -1, steps, step * bound, bound, prices)
    copy(prices, q.prices)
    relax(p, q)
    cases = len(q.bounds)
    bounds, left = np.empty(cases), np.empty(cases)  # left: of cases that are not solved yet
    copy(q.bounds, bounds)
    copy(q.bounds, left)
    order, unused = np.empty(CASES, dtype=np.int64), np.empty(CASES, dtype=np.int64)
    losses = np.empty(CASES)
    first = 0
    for case in range(cases):
        if first < CASES or -bounds[case] < losses[first - 1]:
            first = insert(case, case, -bounds[case], order, unused, losses, first)
    likely, best_value, opened = order[0], -np.inf, np.empty(len(q.charge), dtype=np.int64)
    if cases > 1:  # a quick look at the cases with the highest bounds
        for at in range(first):
            case = order[at]
            if bounds[case] <= best_value:
                break
            open_best(p, q, case, opened)
            value = settle(p, q, y, case, opened)
            if value > -np.inf:
                value += fill(p, q, y, case)
                if value > best_value:
                    likely, best_value = case, value
                if value > utility + EPSILON:
                    utility = value
                    copy(y.choice, x.choice)
        if best_value == -np.inf and utility > -np.inf:
            likely = own
    for turn in range(min(max(effort, 1), cases)):
        if turn:
            likely = 0
            for case in range(cases):
                if left[case] > left[likely]:
                    likely = case
        top = left[likely]
        if top == -np.inf:
            break
        left[likely] = -np.inf
        if top - utility > TOLERANCE * abs(top):  # so too where nothing is known yet
            if cases > 1:
                case_prices = np.empty(resources)
                copy(prices, case_prices)
                top = lower_prices(p, q, y, likely, CASE_STEPS, CASE_STEP * top, top, case_prices)
                copy(case_prices, q.prices)
                relax(p, q)
            utility, top = solve_case(p, q, x, likely, top, utility, effort)
        bounds[likely] = top
    highest = utility
    for case in range(cases):
        highest = max(highest, bounds[case])
    return utility, highest
