"""The knapsack that every plan solves: multiple choice, many resources, setups.

Each of C clients has I items; item i takes exactly one of K options, worth v[i,k] and costing
w[i,k,r] of each of R resources with capacity c[r]. Items may lie in groups, options may have a
level; a group pays the opening charges o[g,m,r] of every level m up to the highest that its items
chose (memory and bytes that a transformer block costs as soon as one of its heads runs, and again
as soon as one trains):

    max  sum_i v[i, k_i]   s.t.   sum_i w[i, k_i, r] + sum_g sum_{m <= M_g} o[g, m, r] <= c[r]

And there may be *cases*, of which a solution obeys one: a case gives each group a mode, which says
what its items may take (below the lowest trained block FROZEN costs what FORWARD_ONLY does: one
case for every lowest block).

**Bound.** The Lagrangian dual, with costs as shares of capacity and prices p >= 0,

    D(p) = sum_r p_r + max_s sum_g max_m [sum_{i in g} max_k (v - p.w) - sum_{n <= m} p.o[g, n]]

where k ranges over what the mode allows at levels up to m, is at least the optimum for any p. It
is minimised by bisection along the direction of overuse, then by subgradients with space dilation
(N. Z. Shor, Minimization Methods for Non-Differentiable Functions, Springer 1985), which converge
fast where prices are few: O(modes I K R) a step, one or two dozen steps.

**Choice.** The best options at the best prices; while a resource is over, the flip of one item that
loses least value per relief; fitting upgrades by value per priced cost; then all 2^n sets of flips
of the n items with least regret, and the best pair among more flips, until neither gains (after
E. Balas and E. Zemel, Operations Research 28, 1980, and C. Cherfi and M. Hifi, European Journal of
Operational Research 192, 2009). The same from sets of open groups that lose little at these prices,
and where the certified gap stays wide, depth-first search with regrets as bounds, up to a number
of nodes. Prices cost O(S I K R), the rest O(I K R) a flip; a client takes about 0.1 ms.

Everything that has to fit is checked in integers; nothing over capacity is returned. Ties go to the
lowest index and effort is counted in nodes, so a solution is a function of its input alone.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from d2ft_fl import kernel

MOST = 2**61  # of a cost: sums stay within 64 bits


@dataclass(frozen=True, eq=False)
class Structure:
    """How items and options hang together; what is left out couples nothing.

    Attributes:
        groups: int64 [I], ascending from 0: each item's group.
        levels: int64 [K], from 0: the level an option opens its group to; 0 opens nothing.
        openings: int64 [T or 1, G, M, R], the charge of opening a group from level m to m + 1.
        modes: int64 [S, G], each case's modes of groups.
        allowed: bool [modes, K], the options that a mode leaves.
    """

    groups: np.ndarray
    levels: np.ndarray
    openings: np.ndarray
    modes: np.ndarray | None = None
    allowed: np.ndarray | None = None

    @cached_property
    def ladder(self) -> np.ndarray:
        """What a group has paid once it is open to each level: int64 [T, G, M + 1, R]."""
        return np.cumsum(np.pad(self.openings, [(0, 0), (0, 0), (1, 0), (0, 0)]), axis=2)

    @classmethod
    def plain(cls, items: int, options: int, resources: int) -> "Structure":
        """One group that costs nothing."""
        none = np.zeros((1, 1, 0, resources), dtype=np.int64)
        return cls(np.zeros(items, dtype=np.int64), np.zeros(options, dtype=np.int64), none)


@dataclass(frozen=True, eq=False)
class Solution:
    """Choices that fit, their values, and bounds that no choice can exceed.

    Of one client, or of C with a leading dimension.

    Attributes:
        choice: int64 [I], the option of each item; -1 where nothing was found that fits.
        value: What it is worth; -inf where nothing was found.
        bound: No choice is worth more.
    """

    choice: np.ndarray
    value: np.ndarray
    bound: np.ndarray

    @property
    def feasible(self) -> np.ndarray:
        """Whether a choice was found that fits."""
        return np.isfinite(self.value)

    @property
    def gap(self) -> np.ndarray:
        """How far from the optimum a choice can be, as a share of the bound; 1 for no choice."""
        size = np.maximum(np.abs(self.bound), kernel.EPSILON)
        gap = np.where(self.feasible, self.bound - self.value, np.inf) / size
        return np.clip(gap, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Problem:
    """Many clients' knapsacks, checked and ready to be solved.

    Attributes:
        values: float64 [C or 1, I, K]; -inf forbids an option.
        costs: int64 [T, I, K, R], not negative.
        capacities: int64 [C, R].
        tables: int64 [C], which of T costs and openings are a client's.
        structure: Groups, levels, openings and cases.
        base: int64 [T, R], what the cheapest options of all items cost, taken off beforehand.
    """

    values: np.ndarray
    costs: np.ndarray
    capacities: np.ndarray
    tables: np.ndarray
    structure: Structure
    base: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.costs.size and (self.costs.min() < 0 or self.costs.max() > MOST):
            raise ValueError(f"costs must lie between 0 and {MOST}")
        if np.isnan(self.values).any() or (self.values == np.inf).any():
            raise ValueError("values must be finite, or -inf for what is forbidden")
        items, groups = self.costs.shape[1], self.structure.groups
        if len(groups) != items or (np.diff(groups, prepend=0) < 0).any():
            raise ValueError(f"groups must give each of {items} items its group, ascending from 0")
        cheapest = self.costs.min(axis=2, keepdims=True)  # [T, I, 1, R]
        object.__setattr__(self, "base", cheapest.sum(axis=(1, 2)))
        if cheapest.any():
            object.__setattr__(self, "costs", self.costs - cheapest)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the kernel takes, in its order."""
        s, (tables, _, options, _) = self.structure, self.costs.shape
        ladder = s.ladder
        group_count = ladder.shape[1]
        one = np.ones((1, options), dtype=bool)
        modes = np.zeros((1, group_count), dtype=np.int64) if s.modes is None else s.modes
        return (
            np.ascontiguousarray(self.values, dtype=np.float64),
            np.ascontiguousarray(self.costs),
            self.tables.astype(np.int64),
            np.ascontiguousarray(np.broadcast_to(ladder, (tables, *ladder.shape[1:]))),
            np.searchsorted(s.groups, np.arange(group_count + 1)),
            s.groups.astype(np.int64),
            s.levels.astype(np.int64),
            modes.astype(np.int64),
            one if s.allowed is None else s.allowed.astype(bool),
            # So much that every choice fits is no limit; sums stay within 64 bits.
            np.minimum(self.capacities - self.base[self.tables], MOST),
        )

    @property
    def cheapest(self) -> np.ndarray:
        """A choice of each client to start from: the least of the largest shares: int64 [C, I]."""
        scale = 1.0 / np.maximum(self.capacities, 1).mean(axis=0)
        shares = (self.costs * scale).max(axis=3).argmin(axis=2)  # [T, I]
        return shares[self.tables]


def solve(
    values: np.ndarray,
    costs: np.ndarray,
    capacities: np.ndarray,
    structure: Structure | None = None,
    tables: np.ndarray | None = None,
    start: np.ndarray | None = None,
    effort: int = 8,
) -> Solution:
    """Choose one option of every item, within every capacity, of one client or of many.

    Args:
        values: float64 [I, K], or [C, I, K]; -inf forbids an option.
        costs: int64 [I, K, R], or [T, I, K, R]; not negative.
        capacities: int64 [R], or [C, R].
        structure: Opening charges of groups, and cases.
        tables: int64 [C], which of T costs are a client's; by default T is 1 or C.
        start: int64 [I] or [C, I], choices to improve on.
        effort: Multiplies steps, flips and nodes; a planner of thousands of clients takes 1.

    Raises:
        ValueError: When shapes do not fit together, or costs are negative.
    """
    single = np.ndim(capacities) == 1
    values, costs, capacities, tables, structure = _checked(
        values, costs, capacities, structure, tables
    )
    clients, items = len(capacities), costs.shape[1]
    problem = Problem(values, costs, capacities, tables, structure)
    choice = problem.cheapest if start is None else np.broadcast_to(start, (clients, items))
    choice = np.array(choice, dtype=np.int64)
    value, bound = np.empty(clients), np.empty(clients)
    kernel.solve_all(*problem.arrays, choice, value, bound, effort)
    choice[~np.isfinite(value)] = -1
    if single:
        return Solution(choice[0], value[0], bound[0])
    return Solution(choice, value, bound)


def _checked(
    values: np.ndarray,
    costs: np.ndarray,
    capacities: np.ndarray,
    structure: Structure | None,
    tables: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Structure]:
    """Arrays with a leading dimension, known to fit together."""
    values, costs, capacities = np.asarray(values, float), np.asarray(costs), np.asarray(capacities)
    if costs.dtype.kind not in "iu" or capacities.dtype.kind not in "iu":
        raise ValueError("costs and capacities must be integers, so that what fits is exact")
    capacities = np.atleast_2d(capacities).astype(np.int64)
    values = values[None] if values.ndim == 2 else values
    costs = (costs[None] if costs.ndim == 3 else costs).astype(np.int64, copy=False)
    clients = len(capacities)
    if tables is None:
        tables = np.arange(clients) if len(costs) == clients else np.zeros(clients, dtype=np.int64)
    if (
        values.ndim != 3
        or costs.ndim != 4
        or costs.shape[1:3] != values.shape[1:]
        or costs.shape[3] != capacities.shape[1]
        or len(values) not in (1, clients)
        or tables.shape != (clients,)
        or (len(costs) not in (1, clients) and tables.max(initial=0) >= len(costs))
    ):
        raise ValueError(
            f"values {values.shape}, costs {costs.shape} and capacities {capacities.shape} do not "
            "fit: [clients, items, options], [tables, items, options, resources], "
            "[clients, resources]"
        )
    structure = structure or Structure.plain(*costs.shape[1:])
    return values, costs, capacities, tables, structure


@dataclass(frozen=True, eq=False)
class Spread:
    """Clients coupled through what they train: returns diminish with their number.

    Client c counts for n_c; option k trains an item to a share s_k. Together they are worth

        sum_c sum_i u[c, i, k_ci] + sum_i t_i h(sum_c n_c s_k_ci),    h(n) = a log(1 + n / a)

    Attributes:
        train: float64 [I], t: the worth of the first client that trains an item.
        share: float64 [K], s. weight: float64 [C], n.
        reference: a, the clients at which one more is worth half of the first.
        least: Clients that should train every item, where budgets allow.
        passes: How often every client responds to all others.
    """

    train: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    reference: float
    least: int = 1
    passes: int = 3


@dataclass(frozen=True, eq=False)
class SpreadSolution(Solution):
    """Choices of coupled clients.

    Values and bounds are of each client's own knapsack, with training worth ``marginal``.

    Attributes:
        marginal: float64 [I], the slope of h at the end.
        total: What all choices are worth together. total_bound: No choices are worth more.
    """

    marginal: np.ndarray
    total: float
    total_bound: float

    @property
    def total_gap(self) -> float:
        """How far from the optimum the choices can be together, as a share of the bound."""
        return max(0.0, 1 - self.total / self.total_bound) if self.total_bound > 0 else 0.0


def solve_spread(
    values: np.ndarray,
    costs: np.ndarray,
    capacities: np.ndarray,
    spread: Spread,
    structure: Structure | None = None,
    tables: np.ndarray | None = None,
    effort: int = 1,
) -> SpreadSolution:
    """Choices of coupled clients by best responses, one after another, each never over capacity.

    h is concave, so h(n) <= h(m) + h'(m) (n - m): with m as reached, the clients' own bounds at
    these slopes bound the total.

    Args:
        values: float64 [C or 1, I, K], u: what options are worth apart from training.
        costs, capacities, structure, tables, effort: As of :func:`solve`; option 0 of every item
            must cost nothing.

    Raises:
        ValueError: When shapes do not fit together.
    """
    values, costs, capacities, tables, structure = _checked(
        values, costs, capacities, structure, tables
    )
    clients, items = len(capacities), costs.shape[1]
    if costs[:, :, 0].any():
        raise ValueError("option 0 of every item must cost nothing")
    problem = Problem(values, costs, capacities, tables, structure)
    choice = np.zeros((clients, items), dtype=np.int64)
    own, bound, marginal = np.empty(clients), np.empty(clients), np.empty(items)
    kernel.spread_all(
        *problem.arrays,
        spread.train.astype(np.float64),
        spread.share.astype(np.float64),
        spread.weight.astype(np.float64),
        float(spread.reference),
        spread.least,
        spread.passes,
        choice,
        own,
        bound,
        marginal,
        effort,
    )
    trained = spread.share[choice] * spread.weight[:, None]  # [C, I]
    amount = trained.sum(axis=0)
    together = spread.reference * np.log1p(amount / spread.reference)
    total = float(own.sum() + spread.train @ together)
    rest = spread.train @ (together - marginal * amount)
    fits = np.isfinite(own)
    value = np.where(fits, own + trained @ (spread.train * marginal), -np.inf)
    choice[~fits] = -1
    return SpreadSolution(choice, value, bound, marginal, total, float(rest + bound.sum()))
