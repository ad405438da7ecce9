"""Knapsacks solved by mixed-integer programming."""

from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from d2ft_fl.planning.problem import Structure


def cases_of(structure, items, options):
    """What each case leaves: bool [I, K] each."""
    if structure.modes is None:
        return [np.ones((items, options), dtype=bool)]
    return [structure.allowed[modes[structure.groups]] for modes in structure.modes]


def optimum(values, costs, capacities, structure=None, seconds=np.inf):
    """The optimum by mixed-integer programming, openings as binaries: the best of all cases.

    Where ``seconds`` run out, the best that was found in them.
    """
    items, options, resources = costs.shape
    structure = structure or Structure.plain(items, options, resources)
    openings = structure.openings[0]
    groups, levels = openings.shape[:2]
    x, y = items * options, groups * levels
    links = []
    for i, k in product(range(items), range(options)):
        for m in range(structure.levels[k]):
            row = np.zeros(x + y)
            row[i * options + k], row[x + structure.groups[i] * levels + m] = 1, -1
            links.append(row)
    budget = np.concatenate([costs.reshape(x, resources), openings.reshape(y, resources)]).T
    constraints = [
        LinearConstraint(
            np.hstack([np.kron(np.eye(items), np.ones(options)), np.zeros((items, y))]), 1, 1
        ),
        LinearConstraint(budget, -np.inf, capacities),
    ]
    if links:
        constraints.append(LinearConstraint(np.array(links), -np.inf, 0))
    gain = np.concatenate([np.where(np.isfinite(values), values, 0).ravel(), np.zeros(y)])
    best = -np.inf
    for allowed in cases_of(structure, items, options):
        upper = np.concatenate([(allowed & np.isfinite(values)).ravel(), np.ones(y)])
        result = milp(
            -gain,
            constraints=constraints,
            integrality=np.ones(x + y),
            bounds=Bounds(0, upper),
            options={"mip_rel_gap": 0.0, **({"time_limit": seconds} if seconds < np.inf else {})},
        )
        assert result.status in (0, 1, 2)  # optimal, time limit, infeasible
        if result.x is not None:
            best = max(best, -result.fun)
    return best
