"""Subnets drawn at random: budgets and solver of D2FT, without its scores.

Each client draws scores every round, so that clients are not coordinated. A baseline of D2FT's
paper, which draws the operations of micro-batches instead.
"""

import numpy as np

from d2ft_fl import Assignment, Round

PAPER = "Ding et al., 2025, arXiv 2504.12471 (a baseline there)"
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Plan each client's best schedule for scores that are drawn."""
    draws = np.stack([context.generator(c).random((2, *context.shape)) for c in context.clients])
    return context.plan(draws[:, 0], draws[:, 1], coupled=False)
