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
from typing import TYPE_CHECKING

import numpy as np

from d2ft_fl.util import compile_cache

if TYPE_CHECKING:
    from d2ft_fl.planning.solver.instance import Batch

MOST = 2**62  # of all costs together: sums stay within 64 bits


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
        found = self.feasible
        size = np.where(found, np.maximum(np.abs(self.bound), 1e-12), 1.0)
        short = np.where(found, self.bound, 1.0) - np.where(found, self.value, 0.0)
        return np.clip(short / size, 0.0, 1.0)


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
        openings = self.structure.openings
        if self.costs.min(initial=0) < 0 or openings.min(initial=0) < 0:
            raise ValueError("costs must not be negative")
        items = self.costs.shape[1]
        most = items * float(self.costs.max(initial=0)) + openings.sum(dtype=float)
        if most > MOST:  # no more than a first look
            sums = self.costs.max(axis=2, initial=0).sum(axis=1, dtype=float)  # [T, R]
            most = (sums + openings.sum(axis=(1, 2), dtype=float)).max(initial=0.0)
        if most > MOST:
            raise ValueError(
                f"costs must sum up to {MOST} at most, not {most:.3g}: 64 bits hold that"
            )
        if np.isnan(self.values).any() or (self.values == np.inf).any():
            raise ValueError("values must be finite, or -inf for what is forbidden")
        groups = self.structure.groups
        if len(groups) != items or (np.diff(groups, prepend=0) < 0).any():
            raise ValueError(f"groups must give each of {items} items its group, ascending from 0")
        base = np.zeros((len(self.costs), self.costs.shape[3]), dtype=np.int64)
        if self.costs[:, :, :1].any():  # else the first option of all costs nothing
            cheapest = self.costs.min(axis=2, keepdims=True)  # [T, I, 1, R]
            base = cheapest.sum(axis=(1, 2))
            object.__setattr__(self, "costs", self.costs - cheapest)
        object.__setattr__(self, "base", base)

    def batch(self) -> "Batch":
        """What the kernel takes."""
        from d2ft_fl.planning.solver.instance import Batch

        s, (tables, _, options, _) = self.structure, self.costs.shape
        ladder = s.ladder
        group_count = ladder.shape[1]
        one = np.ones((1, options), dtype=bool)
        modes = np.zeros((1, group_count), dtype=np.int64) if s.modes is None else s.modes
        # Writeable and in order, all of them: the kernel is compiled for one kind of array.
        return Batch(
            value=np.require(self.values, np.float64, ("C", "W")),
            cost=np.require(self.costs, np.int64, ("C", "W")),
            ladder=np.require(
                np.broadcast_to(ladder, (tables, *ladder.shape[1:])), np.int64, ("C", "W")
            ),
            table=self.tables.astype(np.int64),
            capacity=self.capacities - self.base[self.tables],
            first=np.searchsorted(s.groups, np.arange(group_count + 1)),
            group=s.groups.astype(np.int64),
            level=s.levels.astype(np.int64),
            mode=modes.astype(np.int64),
            allowed=one if s.allowed is None else s.allowed.astype(bool),
        )

    @property
    def cheapest(self) -> np.ndarray:
        """A choice of each client to start from: the least of the largest shares: int64 [C, I]."""
        if not self.costs[:, :, 0].any():
            return np.zeros((len(self.capacities), self.costs.shape[1]), dtype=np.int64)
        scales = 1.0 / np.maximum(self.capacities, 1)  # [C, R]
        found = [
            (self.costs[table] * scale).max(axis=2, initial=0.0).argmin(axis=1)
            for table, scale in zip(self.tables, scales, strict=True)
        ]
        return np.array(found, dtype=np.int64).reshape(len(scales), -1)


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
        start: int64 [I] or [C, I], choices to improve on; a client's that holds -1 is left alone.
        effort: Multiplies steps, flips and nodes; a planner of thousands of clients takes 1.

    Raises:
        ValueError: When shapes do not fit together, or costs are negative.
    """
    from d2ft_fl.planning.solver.many import solve_all

    single = np.ndim(capacities) == 1
    values, costs, capacities, tables, structure = _checked(
        values, costs, capacities, structure, tables
    )
    clients = len(capacities)
    problem = Problem(values, costs, capacities, tables, structure)
    choice = problem.cheapest if start is None else _start(problem, np.asarray(start))
    value, bound = np.empty(clients), np.empty(clients)
    solve_all(problem.batch(), choice, value, bound, effort)
    choice[~np.isfinite(value)] = -1
    if single:
        return Solution(choice[0], value[0], bound[0])
    return Solution(choice, value, bound)


def is_compiled(coupled: bool = False) -> bool:
    """Whether the solver was compiled on this machine before, so that it starts at once."""
    return compile_cache.is_kept("solve_all") and (
        not coupled or compile_cache.is_kept("spread_all")
    )


def compile_solver(coupled: bool = False) -> None:
    """Compile the solver, which the first plan would do otherwise: about half a minute."""
    nothing = np.zeros((1, 1)), np.zeros((1, 1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
    solve(*nothing)
    if coupled:
        solve_spread(*nothing, Spread(np.zeros(1), np.zeros(1), np.ones(1), 1.0))


def _start(problem: Problem, start: np.ndarray) -> np.ndarray:
    """Choices to start from, the cheapest in place of what is none: int64 [C, I]."""
    shape, options = (len(problem.capacities), problem.costs.shape[1]), problem.costs.shape[2]
    if start.shape not in (shape, shape[1:]) or start.max(initial=0) >= options:
        raise ValueError(f"start must be {list(shape)} options below {options}, not {start.shape}")
    start = np.array(np.broadcast_to(start, shape), dtype=np.int64)
    none = np.any(start < 0, axis=1)
    return np.where(none[:, None], problem.cheapest, start) if none.any() else start


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
    # More than everything costs is no limit, less than nothing none that can be kept.
    capacities = np.minimum(np.atleast_2d(capacities), MOST).astype(np.int64)
    capacities = np.maximum(capacities, -MOST)
    values = values[None] if values.ndim == 2 else values
    costs = (costs[None] if costs.ndim == 3 else costs).astype(np.int64, copy=False)
    clients = len(capacities)
    if tables is None:
        tables = np.arange(clients) if len(costs) == clients else np.zeros(clients, dtype=np.int64)
        indexed = len(costs) in (1, clients)
    else:
        tables = np.asarray(tables)
        indexed = tables.min(initial=0) >= 0 and tables.max(initial=0) < len(costs)
    if (
        values.ndim != 3
        or costs.ndim != 4
        or costs.shape[1:3] != values.shape[1:]
        or costs.shape[3] != capacities.shape[1]
        or len(values) not in (1, clients)
        or tables.shape != (clients,)
        or not indexed
    ):
        raise ValueError(
            f"values {values.shape}, costs {costs.shape} and capacities {capacities.shape} do not "
            "fit: [clients, items, options], [tables, items, options, resources], "
            "[clients, resources]"
        )
    structure = structure or Structure.plain(*costs.shape[1:])
    return values, costs, capacities, tables, structure


def used(
    choice: np.ndarray, costs: np.ndarray, structure: Structure, tables: np.ndarray
) -> np.ndarray:
    """What choices cost, openings included, exactly: int64 [C, R].

    Args:
        choice: int64 [C, I]. costs: int64 [T, I, K, R]. tables: int64 [C].
    """
    ladder, levels = structure.ladder, structure.levels[choice]
    tops = np.zeros((len(choice), ladder.shape[1]), dtype=np.int64)
    groups, starts = np.unique(structure.groups, return_index=True)
    tops[:, groups] = np.maximum.reduceat(levels, starts, axis=1)
    which = tables if len(ladder) > 1 else np.zeros_like(tables)
    found = ladder[which[:, None], np.arange(ladder.shape[1]), tops].sum(axis=1)
    for i in range(choice.shape[1]):  # item by item: all at once would take costs per client
        found += costs[tables, i, choice[:, i]]
    return found


def solve_two_stages(
    train: np.ndarray,
    rest: np.ndarray,
    share: np.ndarray,
    first: np.ndarray,
    costs: np.ndarray,
    capacities: np.ndarray,
    structure: Structure,
    tables: np.ndarray,
) -> Solution:
    """D2FT's two stages (arXiv 2504.12471): what trains by its own worth, the rest in what is left.

    Args:
        train, rest: float64 [C or 1, I, K], worth of training, and of all else.
        share: float64 [K], how far an option trains; settled by the first stage.
        first: bool [K], the options of the first stage, which do nothing but train.
        costs, capacities, structure, tables: As of :func:`solve`.

    Returns:
        The choices, with what they are worth together and no bound but that.
    """
    settled = solve(
        np.where(first, train, -np.inf), costs, capacities, structure, tables, effort=1
    ).choice
    same = share[settled][..., None] == share  # [C, I, K]
    left = np.where(same, rest, -np.inf)
    choice = solve(left, costs, capacities, structure, tables, settled, effort=1).choice
    both = np.broadcast_to(train + rest, left.shape)
    value = np.take_along_axis(both, choice.clip(0)[..., None], axis=2).sum(axis=(1, 2))
    value = np.where(choice.min(axis=1) < 0, -np.inf, value)
    return Solution(choice, value, value)


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
        total: What all choices are worth together, of clients that can do anything.
        total_bound: No choices are worth more.
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
        ValueError: When shapes do not fit together, or option 0 costs or trains something.
    """
    from d2ft_fl.planning.solver.many import spread_all

    values, costs, capacities, tables, structure = _checked(
        values, costs, capacities, structure, tables
    )
    clients, items = len(capacities), costs.shape[1]
    sizes = (spread.train.shape, spread.share.shape, spread.weight.shape)
    if sizes != ((items,), (costs.shape[2],), (clients,)):
        raise ValueError(f"train, share and weight must be {items}, {costs.shape[2]} and {clients}")
    if costs[:, :, 0].any() or spread.share[0]:
        raise ValueError("option 0 of every item must cost nothing and train nothing")
    if not spread.reference > 0:
        raise ValueError(f"reference must be above 0, not {spread.reference}")
    problem = Problem(values, costs, capacities, tables, structure)
    choice = np.zeros((clients, items), dtype=np.int64)
    own, bound, marginal = np.empty(clients), np.empty(clients), np.empty(items)
    spread_all(
        problem.batch(),
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
    fits, can = np.isfinite(own), np.isfinite(bound)
    total = float(own[fits].sum() + spread.train @ together)
    rest = spread.train @ (together - marginal * amount)
    value = np.where(fits, own + trained @ (spread.train * marginal), -np.inf)
    choice[~fits] = -1
    return SpreadSolution(choice, value, bound, marginal, total, float(rest + bound[can].sum()))
