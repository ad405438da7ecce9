"""Dynamic pruning by magnitude: the subnets of largest weights train, the others are skipped.

A baseline of D2FT's paper. Weights change from round to round, and so do the subnets that are
pruned.

Deviates: subnets are pruned for a round instead of an iteration, within every client's budgets.
"""

import numpy as np

from d2ft_fl import Assignment, Round

PAPER = "Ding et al., 2025, arXiv 2504.12471 (a baseline there)"
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the subnets of largest weights FULL, none FORWARD_ONLY."""
    return context.plan(context.scores("magnitude"), np.zeros(context.shape), coupled=False)
