"""The arrays that the compiled solver works on: knapsacks, priced knapsacks, and choices."""

from typing import NamedTuple

import numpy as np

from d2ft_fl.util.compiled import inner

EPSILON = 1e-12
NONE = -1  # of items, options, cases and the like


class Batch(NamedTuple):
    """Many clients' knapsacks.

    Attributes:
        value: float64 [C or 1, I, K]; -inf forbids an option.
        cost: int64 [T, I, K, R].
        ladder: int64 [T, G, M + 1, R], what a group pays once it is open to each level; 0 at first.
        table: int64 [C], which costs and ladder are a client's.
        capacity: int64 [C, R].
        first: int64 [G + 1], where each group's items start.
        group: int64 [I], each item's group.
        level: int64 [K], the level that an option opens its group to.
        mode: int64 [S, G], each case's modes of groups.
        allowed: bool [modes, K], the options that a mode leaves.
    """

    value: np.ndarray
    cost: np.ndarray
    ladder: np.ndarray
    table: np.ndarray
    capacity: np.ndarray
    first: np.ndarray
    group: np.ndarray
    level: np.ndarray
    mode: np.ndarray
    allowed: np.ndarray

    def only(self, who: np.ndarray) -> "Batch":
        """Return the knapsacks of some clients, int64 [who]."""
        value = self.value[who] if len(self.value) > 1 else self.value
        return self._replace(value=value, table=self.table[who], capacity=self.capacity[who])


class Instance(NamedTuple):
    """One client's knapsack.

    Attributes:
        value: float64 [I, K]; -inf forbids an option.
        cost: int64 [I, K, R].
        ladder: int64 [G, M + 1, R], what a group pays once it is open to each level; 0 at first.
        capacity: int64 [R].
        first: int64 [G + 1], where each group's items start.
        group: int64 [I], each item's group.
        level: int64 [K], the level that an option opens its group to.
        mode: int64 [S, G], each case's modes of groups.
        allowed: bool [modes, K], the options that a mode leaves.
    """

    value: np.ndarray
    cost: np.ndarray
    ladder: np.ndarray
    capacity: np.ndarray
    first: np.ndarray
    group: np.ndarray
    level: np.ndarray
    mode: np.ndarray
    allowed: np.ndarray


class Priced(NamedTuple):
    """One client's knapsack in shares of capacity, and what depends on prices.

    Attributes:
        v: float64 [K, I], values; -inf for what cannot fit.
        w: float64 [R, K, I], costs as shares of capacity.
        charge: float64 [G, M + 1, R], the ladder as shares of capacity.
        scale: float64 [R], one unit of a resource as a share of capacity.
        prices: float64 [R], of the whole capacity of each resource.
        gains: float64 [K, I], value less priced cost.
        some: int64 [R], scratch: the resources that have a price.
        at: uint64 [I], scratch: where the costs of a choice are.
        best: float64 [I], scratch: the best gain of each item.
        arg: int64 [modes, M + 1, I], the best option of at most each level.
        nets: float64 [modes, M + 1, G], the gain of a group when it is open to each level.
        net: float64 [modes, G], the largest gain of a group over levels.
        opened: int64 [modes, G], the level at which the gain of a group is largest.
        bounds: float64 [S], the dual's value in each case.
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
        choice: int64 [I], the option of each item.
        counts: int64 [G, M + 1], how many items of a group are at each level.
        tops: int64 [G], the level to which each group is open.
        used: int64 [R], what the choice uses of each resource.
    """

    choice: np.ndarray
    counts: np.ndarray
    tops: np.ndarray
    used: np.ndarray


@inner
def instance(b: Batch, c: int, value: np.ndarray) -> Instance:
    """Return the knapsack of client ``c``, with ``value`` [I, K] as values of options."""
    t = b.table[c]
    return Instance(
        value, b.cost[t], b.ladder[t], b.capacity[c], b.first, b.group, b.level, b.mode, b.allowed
    )


@inner
def value_of(b: Batch, c: int) -> np.ndarray:
    """Return the values of options of client ``c``: float64 [I, K]."""
    return b.value[c % len(b.value)]


@inner
def priced(p: Instance) -> Priced:
    """Return a knapsack in shares of capacity; the values of options that cannot fit are -inf."""
    items, options, resources = p.cost.shape
    groups, levels = p.ladder.shape[0], p.ladder.shape[1]
    v, w = np.empty((options, items)), np.empty((resources, options, items))
    scale, prices = np.empty(resources), np.empty(resources)
    charge = np.empty((groups, levels, resources))
    for r in range(resources):
        scale[r], prices[r] = 1.0 / max(p.capacity[r], 1), 0.0
        for g in range(groups):
            for m in range(levels):
                charge[g, m, r] = p.ladder[g, m, r] * scale[r]
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
        charge,
        scale,
        prices,
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
def picked(p: Instance) -> Picked:
    """Return arrays for a choice."""
    groups, levels, resources = p.ladder.shape
    return Picked(
        np.empty(len(p.group), dtype=np.int64),
        np.empty((groups, levels), dtype=np.int64),
        np.empty(groups, dtype=np.int64),
        np.empty(resources, dtype=np.int64),
    )


@inner
def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy a row of numbers; numba compiles ``target[:] = source`` with messages for bad shapes."""
    for i in range(len(target)):
        target[i] = source[i]


@inner
def copy_picked(source: Picked, target: Picked) -> None:
    """Copy a choice and what it uses."""
    copy(source.choice, target.choice)
    copy(source.tops, target.tops)
    copy(source.used, target.used)
    for g in range(len(source.counts)):
        copy(source.counts[g], target.counts[g])
