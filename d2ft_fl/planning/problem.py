"""The knapsack's problem and solution as arrays; :mod:`d2ft_fl.planning.knapsack` has the model.

C clients have I items with K options each, R resources and T tables of costs; items lie in G
groups, which are open to levels up to M.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

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
        """Return the structure of one group that costs nothing."""
        none = np.zeros((1, 1, 0, resources), dtype=np.int64)
        return cls(np.zeros(items, dtype=np.int64), np.zeros(options, dtype=np.int64), none)


@dataclass(frozen=True, eq=False)
class Solution:
    """Choices that fit, their values, and bounds that no choice can exceed.

    Of one client, or of C with a leading dimension.

    Attributes:
        choice: int64 [I], the option of each item; -1 where no choice that fits is known.
        value: The value of the choice; -inf where there is none.
        bound: No choice has a higher value.
    """

    choice: np.ndarray
    value: np.ndarray
    bound: np.ndarray

    @property
    def feasible(self) -> np.ndarray:
        """Whether there is a choice that fits."""
        return np.isfinite(self.value)

    @property
    def gap(self) -> np.ndarray:
        """How far from the optimum a choice can be, as a share of the bound; 1 for no choice."""
        with np.errstate(invalid="ignore"):  # where nothing fits
            short = (self.bound - self.value) / np.maximum(np.abs(self.bound), 1e-12)
        return np.where(self.feasible, short.clip(0.0, 1.0), 1.0)


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
        if (self.costs < 0).any() or (openings < 0).any():
            raise ValueError("costs must not be negative")
        items = self.costs.shape[1]
        total = items * float(self.costs.max(initial=0)) + openings.sum(dtype=float)
        if total > MOST:  # a coarse bound; the exact one follows
            sums = self.costs.max(axis=2).sum(axis=1, dtype=float)  # [T, R]
            total = (sums + openings.sum(axis=(1, 2), dtype=float)).max()
        if total > MOST:
            raise ValueError(
                f"costs must sum up to {MOST} at most, not {total:.3g}: 64 bits hold that"
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
        """Return the knapsacks as the compiled solver takes them."""
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
        """The choice of each client to start from, the least of largest shares: int64 [C, I].

        Options that are forbidden come after all others.
        """
        forbidden = np.isneginf(self.values)  # [C or 1, I, K]
        if not self.costs[:, :, 0].any() and not forbidden[..., 0].any():
            return np.zeros((len(self.capacities), self.costs.shape[1]), dtype=np.int64)
        scales = 1.0 / np.maximum(self.capacities, 1)  # [C, R]
        forbidden = np.broadcast_to(forbidden, (len(scales), *forbidden.shape[1:]))
        choices = np.empty((len(scales), self.costs.shape[1]), dtype=np.int64)
        for client, table in enumerate(self.tables):
            shares = (self.costs[table] * scales[client]).max(axis=2, initial=0.0)
            choices[client] = np.where(forbidden[client], np.inf, shares).argmin(axis=1)
        return choices


def starting_choices(problem: Problem, start: np.ndarray) -> np.ndarray:
    """Return choices to start from, the cheapest in place of what is none: int64 [C, I].

    Args:
        problem: The knapsacks.
        start: int64 [I] or [C, I]; one with -1 is replaced by the cheapest.

    Raises:
        ValueError: When shapes or options are none of the problem's.
    """
    shape, options = (len(problem.capacities), problem.costs.shape[1]), problem.costs.shape[2]
    if start.shape not in (shape, shape[1:]) or (start >= options).any():
        raise ValueError(f"start must be {list(shape)} options below {options}, not {start.shape}")
    start = np.array(np.broadcast_to(start, shape), dtype=np.int64)
    none = np.any(start < 0, axis=1)
    return np.where(none[:, None], problem.cheapest, start) if none.any() else start


def checked(
    values: np.ndarray,
    costs: np.ndarray,
    capacities: np.ndarray,
    structure: Structure | None,
    tables: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Structure]:
    """Return arrays with a leading dimension of clients or tables, checked to fit together.

    Args:
        values: float64 [I, K], or [C, I, K].
        costs: int64 [I, K, R], or [T, I, K, R].
        capacities: int64 [R], or [C, R].
        structure: Groups, levels, openings and cases; None for none.
        tables: int64 [C], which of T costs are a client's; by default T is 1 or C.

    Raises:
        ValueError: When shapes do not fit together, or costs are not integers.
    """
    values, costs, capacities = np.asarray(values, float), np.asarray(costs), np.asarray(capacities)
    if costs.dtype.kind not in "iu" or capacities.dtype.kind not in "iu":
        raise ValueError("costs and capacities must be integers, so that what fits is exact")
    # More than everything costs is no limit, less than nothing none that can be kept.
    if capacities.dtype.kind == "u":
        capacities = np.minimum(capacities.astype(np.uint64), MOST)
    capacities = np.minimum(np.atleast_2d(capacities).astype(np.int64), MOST)
    capacities = np.maximum(capacities, -MOST)
    values = values[None] if values.ndim == 2 else values
    costs = (costs[None] if costs.ndim == 3 else costs).astype(np.int64, copy=False)
    clients = len(capacities)
    if tables is None:
        tables = np.arange(clients) if len(costs) == clients else np.zeros(clients, dtype=np.int64)
        indexed = len(costs) in (1, clients)
    else:
        tables = np.asarray(tables)
        indexed = bool(((tables >= 0) & (tables < len(costs))).all())
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
    """Return what choices cost, openings included, exactly: int64 [C, R].

    Args:
        choice: int64 [C, I].
        costs: int64 [T, I, K, R].
        structure: Groups, levels and openings.
        tables: Which of T costs are a client's: int64 [C].
    """
    ladder, levels = structure.ladder, structure.levels[choice]
    tops = np.zeros((len(choice), ladder.shape[1]), dtype=np.int64)
    groups, starts = np.unique(structure.groups, return_index=True)
    tops[:, groups] = np.maximum.reduceat(levels, starts, axis=1)
    which = tables if len(ladder) > 1 else np.zeros_like(tables)
    total = ladder[which[:, None], np.arange(ladder.shape[1]), tops].sum(axis=1)
    for i in range(choice.shape[1]):  # item by item: all at once would take costs per client
        total += costs[tables, i, choice[:, i]]
    return total
