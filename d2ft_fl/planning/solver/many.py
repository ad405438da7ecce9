"""Many clients' knapsacks, each by itself or coupled: what Python calls."""

import numpy as np

from d2ft_fl.planning.solver.choices import count, fits
from d2ft_fl.planning.solver.instance import Batch, copy, instance, picked, priced, value_of
from d2ft_fl.planning.solver.prices import lower_prices, relax
from d2ft_fl.planning.solver.search import CASE_STEP, CASE_STEPS, solve_one
from d2ft_fl.util.compiled import entry, inner

SCARCER = 1.5  # from sweep to sweep, for items that too few clients train


@entry
def solve_all(
    b: Batch, choice: np.ndarray, values: np.ndarray, bounds: np.ndarray, effort: int
) -> None:
    """Solve every client's knapsack, in order.

    Args:
        b: The knapsacks.
        choice: int64 [C, I], choices to improve on, and the result.
        values: float64 [C], the value of each choice, to fill; -inf where nothing fits.
        bounds: float64 [C], a bound on each value, to fill.
        effort: Multiplies steps, flips and nodes.
    """
    prices = np.empty(b.capacity.shape[1])
    for c in range(len(b.capacity)):
        p = instance(b, c, value_of(b, c))
        x = picked(p)
        copy(choice[c], x.choice)
        solved, bounds[c] = solve_one(p, x, prices, True, effort)
        utility = count(p, x)  # once more, from the integers
        values[c] = utility if solved > -np.inf and fits(p, x) else -np.inf
        copy(x.choice, choice[c])


@inner
def returns(count: float, reference: float) -> float:
    """Return h(n) = reference log(1 + n / reference), the value of n clients on one subnet."""
    return reference * np.log1p(count / reference)


@entry
def spread_all(
    b: Batch,
    train: np.ndarray,
    share: np.ndarray,
    weight: np.ndarray,
    reference: float,
    least: int,
    sweeps: int,
    choice: np.ndarray,
    values: np.ndarray,
    bounds: np.ndarray,
    marginal: np.ndarray,
    effort: int,
) -> None:
    """Solve for clients coupled through diminishing returns, by sweeps of best responses.

    In a sweep one client after the other responds to the choices of all others.

    Args:
        b: The knapsacks, with values of options apart from training.
        train: float64 [I], the value of the first client that trains an item.
        share: float64 [K], how far an option trains.
        weight: float64 [C], for how much a client counts.
        reference: Of :func:`returns`.
        least: Clients that should train every item.
        sweeps: How often every client responds to all others.
        choice: int64 [C, I], 0 at first, to fill.
        values: float64 [C], the value of each choice apart from training, to fill.
        bounds: float64 [C], bounds on each client's knapsack with returns taken at ``marginal``.
        marginal: float64 [I], the slope of returns at the end, to fill.
        effort: Multiplies steps, flips and nodes.
    """
    clients, resources = b.capacity.shape
    items, options = b.cost.shape[1], b.cost.shape[2]
    prices = np.zeros((clients, resources))
    amount, people = np.zeros(items), np.zeros(items, dtype=np.int64)
    scarce = np.zeros(items)  # further value of training an item, while too few clients do
    most = -np.inf
    for i in range(items):
        most = max(most, train[i])
    v = np.empty((items, options))
    for turn in range(sweeps):
        for c in range(clients):
            fixed = value_of(b, c)
            for i in range(items):
                old = share[choice[c, i]]
                amount[i] -= old * weight[c]
                people[i] -= old > 0.0
                now = returns(amount[i], reference)
                for k in range(options):
                    v[i, k] = fixed[i, k]
                    if share[k] > 0.0:
                        more = returns(amount[i] + share[k] * weight[c], reference) - now
                        v[i, k] += train[i] * more
                        if people[i] < least:
                            v[i, k] += scarce[i]
            p = instance(b, c, v)
            x = picked(p)
            copy(choice[c], x.choice)
            solve_one(p, x, prices[c], turn == 0, effort if turn == sweeps - 1 else 0)
            count(p, x)
            if fits(p, x):
                copy(x.choice, choice[c])
            for i in range(items):
                new = share[choice[c, i]]
                amount[i] += new * weight[c]
                people[i] += new > 0.0
        for i in range(items):
            if people[i] < least:
                scarce[i] = SCARCER * scarce[i] + most
    for i in range(items):
        marginal[i] = 1.0 / (1.0 + amount[i] / reference)
    for c in range(clients):
        fixed = value_of(b, c)
        for i in range(items):
            for k in range(options):
                v[i, k] = fixed[i, k] + train[i] * marginal[i] * share[k] * weight[c]
        p = instance(b, c, v)
        q, x = priced(p), picked(p)
        copy(prices[c], q.prices)
        bound = q.bounds[relax(p, q)]
        bounds[c] = lower_prices(p, q, x, -1, CASE_STEPS, CASE_STEP * bound, bound, prices[c])
        copy(choice[c], x.choice)
        values[c] = -np.inf
        count(p, x)
        if fits(p, x):
            values[c] = 0.0
            for i in range(items):
                values[c] += fixed[i, choice[c, i]]
