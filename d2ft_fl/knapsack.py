"""The knapsack that every plan solves, and its solver.

One client has I items in G groups; item i takes exactly one of K options, worth v[i,k] and costing
w[i,k,r] of each of R resources with capacity c[r]. Option k has a level; a group pays the opening
charges o[g,m,r] of every level m up to the highest that its items chose (memory and bytes that a
transformer block costs as soon as one of its heads runs, and again as soon as one trains):

    max  sum_i v[i, k_i]   s.t.   sum_i w[i, k_i, r] + sum_g sum_{m <= M_g} o[g, m, r] <= c[r]

a multiple-choice, multi-dimensional knapsack with setups. Method, costs scaled so that c = 1:

1. Prices. Polyak subgradient steps on the Lagrangian dual D(p) = sum_r p_r + sum_g max_m
   [sum_{i in g} max_{k: level <= m} (v - p.w) - p.o[g, :m]], which bounds the optimum from above.
2. Start from the choice at the best prices; while a resource is over, take the change that loses
   least value per relief; then fill with fitting upgrades by value per priced cost. Do the same
   from the defaults, and from the best choice with each group closed in turn.
3. Check in integers. Nothing over capacity is returned.

A step costs O(I K R); with at most I K steps of repair and fill a client costs O(I^2 K^2 R).
Ties go to the lowest index, so a solution is a function of its input alone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

PRICE_STEPS = 40
EPSILON = 1e-12


@dataclass(frozen=True)
class Problem:
    """One client's knapsack.

    Attributes:
        values: float64 [I, K].
        costs: int64 [I, K, R], not negative.
        capacities: int64 [R]; a negative capacity fits nothing.
        groups: int64 [I], the group of each item, 0 to G - 1.
        levels: int64 [K], the level an option opens its group to; 0 opens nothing.
        openings: int64 [G, M, R], the charge of opening a group to level m + 1.
        allowed: bool [I, K], the options an item may take.
        default: int64 [I], an allowed option of each item; together they are known to fit.
    """

    values: np.ndarray
    costs: np.ndarray
    capacities: np.ndarray
    groups: np.ndarray
    levels: np.ndarray
    openings: np.ndarray
    allowed: np.ndarray
    default: np.ndarray

    def used(self, choice: np.ndarray) -> np.ndarray:
        """Exact resources of a choice [I]: int64 [R]."""
        items = self.costs[np.arange(len(choice)), choice].sum(axis=0)
        return items + _paid(self, _group_levels(self, choice)).sum(axis=0)

    @cached_property
    def ladder(self) -> np.ndarray:
        """What a group has paid once it is open to each level, 0 included: int64 [G, M + 1, R]."""
        closed = np.zeros_like(self.openings[:, :1])
        return np.concatenate([closed, np.cumsum(self.openings, axis=1)], axis=1)

    def value(self, choice: np.ndarray) -> float:
        """What a choice [I] is worth."""
        return float(self.values[np.arange(len(choice)), choice].sum())


@dataclass(frozen=True)
class Solution:
    """A choice that fits, its value, and a bound no choice can exceed."""

    choice: np.ndarray  # int64 [I]
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the optimum the choice can be, as a share of the bound."""
        return max(0.0, 1.0 - self.value / self.bound) if self.bound > EPSILON else 0.0


def _paid(problem: Problem, group_levels: np.ndarray) -> np.ndarray:
    """Opening charges paid at some level of each group: int64 [G, R]."""
    return problem.ladder[np.arange(len(group_levels)), group_levels]


def _group_levels(problem: Problem, choice: np.ndarray) -> np.ndarray:
    levels = np.zeros(problem.openings.shape[0], dtype=np.int64)
    np.maximum.at(levels, problem.groups, problem.levels[choice])
    return levels


def solve(problem: Problem, start: np.ndarray | None = None) -> Solution:
    """A near-optimal choice that fits; the defaults when nothing else does.

    Args:
        problem: What to solve.
        start: A choice to improve on, beside those the solver finds by itself.
    """
    nothing = problem.default
    if (problem.capacities < 0).any():
        return Solution(nothing, problem.value(nothing), problem.value(nothing))
    scale = 1.0 / np.maximum(problem.capacities, 1)
    costs, openings = problem.costs * scale, problem.openings * scale
    fits = (problem.costs <= problem.capacities).all(axis=2) & problem.allowed
    values = np.where(fits, problem.values, -np.inf)

    prices, bound, greedy = _find_prices(problem, values, costs, openings)
    best = nothing
    for choice in (greedy, nothing) if start is None else (greedy, nothing, start):
        choice = _fill(problem, values, prices, _repair(problem, values, costs, choice))
        best = _better(problem, best, choice)
    for group in np.unique(problem.groups):
        closed = np.where(problem.groups == group, nothing, best)
        best = _better(problem, best, _fill(problem, values, prices, closed))
    return Solution(best, problem.value(best), max(bound, problem.value(best)))


def _better(problem: Problem, best: np.ndarray, choice: np.ndarray) -> np.ndarray:
    fits = (problem.used(choice) <= problem.capacities).all()
    return choice if fits and problem.value(choice) > problem.value(best) + EPSILON else best


def _relaxed(
    problem: Problem,
    values: np.ndarray,
    costs: np.ndarray,
    openings: np.ndarray,
    prices: np.ndarray,
) -> tuple[float, np.ndarray]:
    """The dual's inner maximum at some prices, and a choice that attains it."""
    gains = values - costs @ prices  # [I, K]
    group_count, level_count = openings.shape[:2]
    charges = np.concatenate(
        [np.zeros((group_count, 1)), np.cumsum(openings @ prices, axis=1)], axis=1
    )  # [G, M + 1]
    picks, totals = [], []
    for level in range(level_count + 1):
        open_gains = np.where(problem.levels <= level, gains, -np.inf)
        pick = open_gains.argmax(axis=1)
        best = open_gains[np.arange(len(pick)), pick]
        picks.append(pick)
        totals.append(np.bincount(problem.groups, weights=best, minlength=group_count))
    net = np.stack(totals, axis=1) - charges  # [G, M + 1]
    level = net.argmax(axis=1)
    choice = np.stack(picks)[level[problem.groups], np.arange(len(gains))]
    return float(net.max(axis=1).sum() + prices.sum()), choice


def _find_prices(
    problem: Problem, values: np.ndarray, costs: np.ndarray, openings: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """Minimise the dual by Polyak steps: best prices, their bound, and the choice there."""
    resources = costs.shape[2]
    prices = np.full(resources, 1e-9)
    best = (prices, np.inf, problem.default)
    incumbent, step = 0.0, 1.0
    for _ in range(PRICE_STEPS):
        bound, choice = _relaxed(problem, values, costs, openings, prices)
        if bound < best[1] - EPSILON:
            best = (prices, bound, choice)
        else:
            step *= 0.8
        used = problem.used(choice) / np.maximum(problem.capacities, 1)
        if (used <= 1).all():
            incumbent = max(incumbent, problem.value(choice))
        slope = 1.0 - used  # a subgradient of the dual
        norm = float(slope @ slope)
        if norm < EPSILON:
            break
        target = max(incumbent, 0.9 * best[1])
        prices = np.maximum(1e-9, prices - step * max(bound - target, EPSILON) / norm * slope)
    return best


def _changes(problem: Problem, choice: np.ndarray) -> np.ndarray:
    """What each single change of option would add to each resource: int64 [I, K, R]."""
    items, groups = np.arange(len(choice)), problem.groups
    extra = problem.costs - problem.costs[items, choice][:, None]
    now = _group_levels(problem, choice)
    paid = _paid(problem, now)
    # A group's level without item i: its own highest, or the next one when i alone holds it.
    item_levels = problem.levels[choice]
    holders = np.bincount(groups, weights=item_levels == now[groups], minlength=len(now))
    lower = np.zeros_like(now)
    np.maximum.at(lower, groups, np.where(item_levels < now[groups], item_levels, 0))
    alone = (item_levels == now[groups]) & (holders[groups] == 1)
    rest = np.where(alone, lower[groups], now[groups])  # [I]
    levels = np.maximum(rest[:, None], problem.levels[None])  # [I, K]
    return extra + problem.ladder[groups[:, None], levels] - paid[groups][:, None]


def _repair(
    problem: Problem, values: np.ndarray, costs: np.ndarray, choice: np.ndarray
) -> np.ndarray:
    """Change single options, least value lost per relief first, until everything fits."""
    choice = choice.copy()
    items = np.arange(len(choice))
    scale = 1.0 / np.maximum(problem.capacities, 1)
    while True:
        slack = problem.capacities - problem.used(choice)
        over = np.maximum(0, -slack)
        if not over.any():
            return choice
        change = _changes(problem, choice)
        relief = np.minimum(np.maximum(-change, 0), over) @ scale  # [I, K]
        # Nothing may go over, or further over: each change shrinks what is over, so this ends.
        worse = (change > np.maximum(slack, 0)).any(axis=2)
        loss = values[items, choice][:, None] - values
        ratio = np.where(
            (relief > 0) & ~worse & np.isfinite(values),
            np.maximum(loss, 0) / np.maximum(relief, EPSILON),
            np.inf,
        )
        if not np.isfinite(ratio).any():
            return problem.default.copy()
        item, option = np.unravel_index(int(ratio.argmin()), ratio.shape)
        choice[item] = option


def _fill(
    problem: Problem, values: np.ndarray, prices: np.ndarray, choice: np.ndarray
) -> np.ndarray:
    """Take fitting upgrades, most value per priced cost first, until none fits."""
    choice = choice.copy()
    items = np.arange(len(choice))
    scale = 1.0 / np.maximum(problem.capacities, 1)
    while True:
        slack = problem.capacities - problem.used(choice)
        change = _changes(problem, choice)
        gain = values - values[items, choice][:, None]
        fits = (change <= slack).all(axis=2) & (gain > EPSILON)
        if not fits.any():
            return choice
        priced = np.maximum((change * scale) @ prices, EPSILON)
        item, option = np.unravel_index(
            int(np.where(fits, gain / priced, -np.inf).argmax()), gain.shape
        )
        choice[item] = option
