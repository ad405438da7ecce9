"""The knapsack that every plan solves: multiple choice, many resources, setups.

Each of C clients has I items; item i takes exactly one of K options, of value v[i,k] and cost
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
of the n items with least regret, and the best pair among more flips, until neither gains (after E.
Balas and E. Zemel, Operations Research 28, 1980, and C. Cherfi and M. Hifi, European Journal of
Operational Research 192, 2009). All this is repeated from sets of open groups that lose little at
these prices; where the certified gap stays wide, depth-first search follows, with regrets as
bounds, up to a number of nodes. Prices cost O(S I K R), the rest O(I K R) a flip; a client takes
about 0.1 ms.

**Feasibility.** Where doing nothing costs too much or is forbidden, that may end without any choice
that fits. Only then a phase of its own looks for one, whatever it is worth, and the steps above
improve on it. Items are flipped, each time so that least is over capacity, in weighted shares of
it; where no flip makes that less, the weights of what is over rise (the breakout method of P.
Morris, AAAI 1993), and what was flipped stays for some flips (tabu search: F. Glover, ORSA Journal
on Computing 1, 1989). Exact search follows, depth-first, an item with the fewest options next: an
option is struck out where the least that all other items cost leaves no room for it, or where the
dual, with no option worth anything, would be below 0 with it: its prices are improved at every
node. What the nodes suffice for is settled, a choice found or none there (its bound is -inf then).

Everything that has to fit is checked in integers; nothing over capacity is returned. Ties go to the
lowest index and effort is counted in nodes, so a solution is a function of its input alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from d2ft_fl.planning.problem import Problem, Solution, Structure, checked, starting_choices
from d2ft_fl.util import compile_cache

if TYPE_CHECKING:
    from d2ft_fl.planning.solver.instance import Batch


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
        start: int64 [I] or [C, I], choices to improve on; a client whose choice has -1 starts
            from the cheapest.
        effort: Multiplies steps, flips and nodes; a planner of thousands of clients takes 1. More
            than that counts as the power of two that is not above it: efforts 1, 2, 4, ... up to
            it are spent in turn, each on the best choice so far, so that more is never worth less.
            With 0 no choice that fits is looked for beyond repair.

    Raises:
        ValueError: When shapes do not fit together, or costs are negative.
    """
    single = np.ndim(capacities) == 1
    values, costs, capacities, tables, structure = checked(
        values, costs, capacities, structure, tables
    )
    problem = Problem(values, costs, capacities, tables, structure)
    choice = problem.cheapest if start is None else starting_choices(problem, np.asarray(start))
    batch = problem.batch()
    value, bound = _improved(batch, choice, min(effort, 1))
    for doubled in range(1, effort.bit_length()):
        some = np.flatnonzero(bound > -np.inf)  # of others it is known that nothing fits
        better = choice[some]
        gained, limit = _improved(batch.only(some), better, 2**doubled)
        more = gained >= value[some]
        choice[some[more]], value[some[more]] = better[more], gained[more]
        bound[some] = np.minimum(bound[some], limit)
    choice[~np.isfinite(value)] = -1
    if single:
        (one,), (worth,), (limit,) = choice, value, bound
        return Solution(one, worth, limit)
    return Solution(choice, value, bound)


def _improved(batch: "Batch", choice: np.ndarray, effort: int) -> tuple[np.ndarray, np.ndarray]:
    """Improve on choices; where nothing fits, look for a choice that does, and improve on that.

    Args:
        batch: The knapsacks.
        choice: int64 [C, I], choices to improve on, replaced by the result.
        effort: Multiplies steps, flips and nodes.

    Returns:
        Values of the choices, -inf where none that fits is known, and bounds: float64 [C] each.
    """
    compile_cache.wait_for("solve_all")
    from d2ft_fl.planning.solver.many import solve_all

    value, bound = np.empty(len(choice)), np.empty(len(choice))
    solve_all(batch, choice, value, bound, effort)
    lost = np.flatnonzero(np.isneginf(value) & (bound > -np.inf))
    if not effort or not len(lost):
        return value, bound
    # Compiled where it is needed first: planners, whose clients may do nothing, never get here.
    from d2ft_fl.planning.solver.feasible import FOUND, IMPOSSIBLE, fit_all

    start, outcome = choice[lost], np.empty(len(lost), dtype=np.int64)
    fit_all(batch.only(lost), start, outcome, effort)
    bound[lost[outcome == IMPOSSIBLE]] = -np.inf
    choice[lost] = start  # from where more effort goes on
    found = lost[outcome == FOUND]
    if len(found):
        better = start[outcome == FOUND]
        value_found, bound_found = np.empty(len(found)), np.empty(len(found))
        solve_all(batch.only(found), better, value_found, bound_found, effort)
        choice[found], value[found], bound[found] = better, value_found, bound_found
    return value, bound


def is_compiled(coupled: bool = False) -> bool:
    """Return whether the solver was compiled on this machine before, so that it starts at once.

    Args:
        coupled: Whether the solver of coupled clients is needed, too.
    """
    functions = ("solve_all", "spread_all") if coupled else ("solve_all",)
    return all(compile_cache.is_compiled(function) for function in functions)


def compile_solver(coupled: bool = False) -> None:
    """Compile the solver, which the first plan would do otherwise: about ten seconds.

    Args:
        coupled: Whether to compile the solver of coupled clients, too.
    """
    nothing = np.zeros((1, 1)), np.zeros((1, 1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
    solve(*nothing)
    if coupled:
        solve_spread(*nothing, Spread(np.zeros(1), np.zeros(1), np.ones(1), 1.0))


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
    """Solve D2FT's two stages (arXiv 2504.12471): what trains first, the rest in what is left.

    Args:
        train: Utility of training: float64 [C or 1, I, K].
        rest: Utility of all else: float64 [C or 1, I, K].
        share: How far an option trains, which the first stage settles: float64 [K].
        first: The options of the first stage, which do nothing but train: bool [K].
        costs: int64 [T, I, K, R].
        capacities: int64 [C, R].
        structure: Groups, levels, openings and cases.
        tables: Which of T costs are a client's: int64 [C].

    Returns:
        The choices, with their utility of both stages and no bound but that.
    """
    settled = solve(
        np.where(first, train, -np.inf), costs, capacities, structure, tables, effort=1
    ).choice
    same = share[settled][..., None] == share  # [C, I, K]
    left = np.where(same, rest, -np.inf)
    choice = solve(left, costs, capacities, structure, tables, settled, effort=1).choice
    both = np.broadcast_to(train + rest, left.shape)
    value = np.take_along_axis(both, choice[..., None], axis=2).sum(axis=(1, 2))
    value = np.where(choice.min(axis=1) < 0, -np.inf, value)
    return Solution(choice, value, value)


@dataclass(frozen=True, eq=False)
class Spread:
    """Clients coupled through what they train: returns diminish with their number.

    Client c counts for n_c; option k trains an item to a share s_k. Their value together is

        sum_c sum_i u[c, i, k_ci] + sum_i t_i h(sum_c n_c s_k_ci),    h(n) = a log(1 + n / a)

    Attributes:
        train: t, utility of the first client that trains an item: float64 [I].
        share: s, how far an option trains: float64 [K].
        weight: n, for how much a client counts: float64 [C].
        reference: a, the clients at which one more has half the utility of the first.
        least: Clients that should train every item, where budgets allow.
        sweeps: How often every client responds to all others.
    """

    train: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    reference: float
    least: int = 1
    sweeps: int = 3


@dataclass(frozen=True, eq=False)
class SpreadSolution(Solution):
    """Choices of coupled clients.

    Values and bounds are of each client's knapsack alone, with ``marginal`` for training.

    Attributes:
        marginal: float64 [I], the slope of h at the end.
        total: Utility of all choices together, of clients that can do anything.
        total_bound: No choices have more.
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
    """Solve for coupled clients by best responses, one after another, each never over capacity.

    h is concave, so h(n) <= h(m) + h'(m) (n - m): with m as reached, the clients' own bounds at
    these slopes bound the total.

    Args:
        values: u, utility of options apart from training: float64 [C or 1, I, K].
        costs: int64 [I, K, R], or [T, I, K, R]; option 0 of every item must cost nothing.
        capacities: int64 [C, R].
        spread: How clients are coupled.
        structure: Opening charges of groups, and cases.
        tables: Which of T costs are a client's: int64 [C]; by default T is 1 or C.
        effort: Multiplies steps, flips and nodes.

    Raises:
        ValueError: When shapes do not fit together, or option 0 costs or trains something.
    """
    compile_cache.wait_for("spread_all")
    from d2ft_fl.planning.solver.many import spread_all

    values, costs, capacities, tables, structure = checked(
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
    value_alone, bound, marginal = np.empty(clients), np.empty(clients), np.empty(items)
    spread_all(
        problem.batch(),
        spread.train.astype(np.float64),
        spread.share.astype(np.float64),
        spread.weight.astype(np.float64),
        float(spread.reference),
        spread.least,
        spread.sweeps,
        choice,
        value_alone,
        bound,
        marginal,
        effort,
    )
    trained = spread.share[choice] * spread.weight[:, None]  # [C, I]
    amount = trained.sum(axis=0)
    together = spread.reference * np.log1p(amount / spread.reference)
    fits, can = np.isfinite(value_alone), np.isfinite(bound)
    total = float(value_alone[fits].sum() + spread.train @ together)
    rest = spread.train @ (together - marginal * amount)
    value = np.where(fits, value_alone + trained @ (spread.train * marginal), -np.inf)
    choice[~fits] = -1
    return SpreadSolution(choice, value, bound, marginal, total, float(rest + bound[can].sum()))
