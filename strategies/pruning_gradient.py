"""Dynamic pruning by gradient: the subnets of largest gradients train, the others are skipped.

A baseline of D2FT's paper. Gradients are measured by scoring probes, which count in the
clients' budgets.

Deviates: subnets are pruned for a round instead of an iteration, within every client's budgets.
"""

import numpy as np

from d2ft_fl import Assignment, Round

PAPER = "Ding et al., 2025, arXiv 2504.12471 (a baseline there)"
SCORES = ("gradient",)


def schedule(context: Round) -> list[Assignment]:
    """Assign the subnets of largest gradients FULL, none FORWARD_ONLY."""
    return context.plan(context.scores("gradient"), np.zeros(context.shape), coupled=False)
