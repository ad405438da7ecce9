"""The exact optimum of one client's knapsack, by HiGHS: an oracle for ``d2ft bench planner``.

A mixed-integer program of ``scipy.optimize.milp``, with choices, openings of blocks and cases as
binaries.
"""

import numpy as np

from d2ft_fl.bench.planner_clients import Clients

SECONDS_OF_HIGHS = 20.0


def optimum(c: Clients, client: int) -> float:
    """Return the largest value that a client's budgets allow; NaN when it is not proven in time.

    Args:
        c: All clients.
        client: Which of them to solve.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    s, capacity = c.structure, c.capacities[client]
    values, costs = c.values[0], c.costs[c.tables[client]]
    openings = s.openings[c.tables[client]]  # [G, M, R]
    (items, options), (groups, level_count) = values.shape, openings.shape[:2]
    modes = np.zeros((1, groups), dtype=int) if s.modes is None else s.modes
    allowed = np.ones((1, options), dtype=bool) if s.allowed is None else s.allowed
    x, y = items * options, groups * level_count
    size = x + y + len(modes)  # choices, openings, cases
    entries: list[tuple[int, int, float]] = []
    above: list[float] = []
    i, k = np.divmod(np.arange(x), options)
    for level in range(1, level_count + 1):  # options of an item need its block open
        for item in range(items):
            columns_of = [int(j) for j in np.flatnonzero((i == item) & (s.levels[k] >= level))]
            entries += [(len(above), j, 1.0) for j in columns_of]
            entries.append((len(above), x + int(s.groups[item]) * level_count + level - 1, -1.0))
            above.append(0.0)
    for j in range(x):  # an option needs a case that allows it
        cases = np.flatnonzero(allowed[modes[:, s.groups[i[j]]], k[j]])
        if len(cases) < len(modes):
            entries.append((len(above), j, 1.0))
            entries += [(len(above), x + y + int(case), -1.0) for case in cases]
            above.append(0.0)
    rows, columns, weights = zip(*entries, strict=True)
    links = coo_matrix((weights, (rows, columns)), shape=(len(above), size)).tocsr()
    ones = coo_matrix((np.ones(x), (i, np.arange(x))), shape=(items, size)).tocsr()
    case = np.zeros((1, size))
    case[0, x + y :] = 1
    budget = np.zeros((size, len(capacity)))
    budget[:x], budget[x : x + y] = costs.reshape(x, -1), openings.reshape(y, -1)
    result = milp(
        -np.concatenate([values.ravel(), np.zeros(size - x)]),
        constraints=[
            LinearConstraint(ones, 1, 1),
            LinearConstraint(case, 1, 1),
            LinearConstraint((budget / capacity).T, -np.inf, 1),
            LinearConstraint(links, -np.inf, above),
        ],
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        options={"time_limit": SECONDS_OF_HIGHS, "mip_rel_gap": 1e-5},
    )
    return -float(result.fun) if result.status == 0 else float("nan")
