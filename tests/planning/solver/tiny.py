"""Tiny knapsacks for the solver's functions, and what they do worked out anew.

Values and prices are eighths, capacities powers of two: sums are exact in any order.
"""

import inspect
from itertools import product

import numpy as np

from tests.planning.solver.interpreted import instance

NOTHING = -np.inf


def for_seeds(count):
    """Run a test with so many seeds, as one test."""

    def decorate(test):
        def run(**rest):
            for seed in range(count):
                test(seed=seed, **rest)

        own = inspect.signature(test)
        others = [p for name, p in own.parameters.items() if name != "seed"]
        run.__signature__ = own.replace(parameters=others)
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def knapsack(value, cost, capacity, ladder=None, group=None, level=None, mode=None, allowed=None):
    """A knapsack of lists; by default one group that costs nothing, and one case."""
    value, cost = np.array(value, dtype=np.float64), np.array(cost, dtype=np.int64)
    items, options, resources = cost.shape
    group = np.zeros(items, dtype=np.int64) if group is None else np.array(group)
    ladder = np.zeros((1, 1, resources)) if ladder is None else np.array(ladder)
    return instance.Instance(
        value=value,
        cost=cost,
        ladder=ladder.astype(np.int64),
        capacity=np.array(capacity, dtype=np.int64),
        first=np.searchsorted(group, np.arange(len(ladder) + 1)),
        group=group,
        level=np.zeros(options, dtype=np.int64) if level is None else np.array(level),
        mode=np.zeros((1, len(ladder)), dtype=np.int64) if mode is None else np.array(mode),
        allowed=np.ones((1, options), dtype=bool) if allowed is None else np.array(allowed),
    )


def drawn(seed, items=5, options=4, resources=3, groups=2, levels=3, share=0.5):
    """A knapsack with everything: levels, cases, options that are forbidden or never fit."""
    draw = np.random.default_rng(seed)
    value = draw.integers(-4, 40, (items, options)) / 8
    value[draw.random(value.shape) < 0.1] = NOTHING
    cost = draw.integers(0, 9, (items, options, resources))
    ladder = np.cumsum(draw.integers(0, 5, (groups, levels, resources)), axis=1)
    ladder[:, 0] = 0
    most = share * (cost.max(axis=1).sum(axis=0) + ladder[:, -1].sum(axis=0))
    capacity = 2 ** np.round(np.log2(most) + draw.uniform(-0.7, 0.7, resources)).astype(np.int64)
    level = draw.integers(0, levels, options)
    level[0] = 0
    allowed = draw.random((2, options)) < 0.8
    allowed[:, 0] = True
    return knapsack(
        value, cost, capacity, ladder, np.sort(np.arange(items) % groups), level,
        draw.integers(0, 2, (3, groups)), allowed,
    )  # fmt: skip


def draw_choice(p, seed):
    """Options of items, drawn."""
    return np.random.default_rng(seed).integers(0, p.value.shape[1], len(p.value))


def tops(p, choice):
    """The level to which each group is open."""
    return np.array(
        [max((p.level[k] for k, g in zip(choice, p.group, strict=True) if g == group), default=0)
         for group in range(len(p.ladder))]
    )  # fmt: skip


def used(p, choice):
    """What a choice uses of each resource."""
    groups = np.arange(len(p.ladder))
    return p.cost[np.arange(len(choice)), choice].sum(axis=0) + p.ladder[
        groups, tops(p, choice)
    ].sum(axis=0)


def fits(p, choice):
    return bool((used(p, choice) <= p.capacity).all())


def worth(p, choice):
    return float(p.value[np.arange(len(choice)), choice].sum())


def changed(choice, *flips):
    """A choice with other options of some items."""
    choice = np.array(choice)
    for i, k in flips:
        choice[i] = k
    return choice


def allows(p, case, i, k):
    """Whether an option is allowed in a case, and fits by itself."""
    mode = p.mode[case, p.group[i]]
    able = p.value[i, k] > NOTHING and (p.cost[i, k] <= p.capacity).all()
    return bool(able and p.allowed[mode, k])


def obeys(p, choice, case):
    modes = p.mode[case][p.group]
    return bool(p.allowed[modes, choice].all())


def everything(p):
    """All choices."""
    return [np.array(c) for c in product(range(p.value.shape[1]), repeat=len(p.value))]


def optimum(p, case):
    """The highest value of all choices that fit and are allowed in a case."""
    return max((worth(p, c) for c in everything(p) if fits(p, c) and obeys(p, c, case)),
               default=NOTHING)  # fmt: skip


def taken(p, choice):
    """A choice and what it uses, counted here."""
    groups, levels = p.ladder.shape[:2]
    counts = np.zeros((groups, levels), dtype=np.int64)
    for i, k in enumerate(choice):
        counts[p.group[i], p.level[k]] += 1
    return instance.Picked(np.array(choice), counts, tops(p, choice), used(p, choice))


def blank(p):
    """Arrays for a choice, full of what nobody may read."""
    groups, levels, resources = p.ladder.shape
    shapes = ((len(p.group),), (groups, levels), (groups,), (resources,))
    return instance.Picked(*(np.full(shape, 77) for shape in shapes))


def same(x, y):
    """Whether two choices and what they use are the same."""
    return all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))


def right(p, x):
    """Whether what a choice uses is counted right."""
    return same(x, taken(p, x.choice))


def at_prices(p, prices):
    """A knapsack at its prices, gains and all worked out here; what else is read is nonsense."""
    q = instance.priced(p)
    for scratch in (q.some, q.at, q.arg, q.opened):
        scratch[...] = 77
    for scratch in (q.best, q.nets, q.net, q.bounds):
        scratch[...] = 77.0
    q.prices[...] = prices
    q.gains[...] = gains(p, prices)
    return q


def gains(p, prices):
    """Value less priced cost, of what fits by itself: [K, I]."""
    shares = p.cost / np.maximum(p.capacity, 1)
    able = (p.cost <= p.capacity).all(axis=2)
    return np.where(able, p.value - shares @ np.asarray(prices, dtype=float), NOTHING).T


def dual(p, prices):
    """The dual by its definition: nets [modes, M + 1, G], and its value in each case [S]."""
    gain, prices = gains(p, prices), np.asarray(prices, dtype=float)
    charge = (p.ladder / np.maximum(p.capacity, 1)) @ prices  # [G, M + 1]
    modes, (groups, levels) = len(p.allowed), charge.shape
    nets = np.full((modes, levels, groups), NOTHING)
    for mode, m, g in product(range(modes), range(levels), range(groups)):
        if m and not (p.allowed[mode] & (p.level == m)).any():
            continue
        may = p.allowed[mode] & (p.level <= m)
        best = [gain[may, i].max(initial=NOTHING) for i in np.flatnonzero(p.group == g)]
        nets[mode, m, g] = sum(best) - charge[g, m]
    net = nets.max(axis=1)
    bounds = [prices.sum() + sum(net[mode, g] for g, mode in enumerate(case)) for case in p.mode]
    return nets, np.array(bounds)


def draw_prices(p, seed):
    """Prices in eighths, some of them 0."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 9, len(p.capacity)) / 8 * (draw.random(len(p.capacity)) < 0.8)
