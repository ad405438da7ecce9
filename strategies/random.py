"""Subnets drawn at random: the same budgets and solver as D2FT, without its scores.

Each client draws its own scores every round, so nothing is coordinated either.
"""

import numpy as np

from d2ft_fl.rounds import Assignment, Round

USES_SCORES = False


def schedule(round: Round) -> list[Assignment]:
    """Each client's best schedule for scores that mean nothing."""
    draws = np.stack([round.generator(c).random((2, *round.shape)) for c in round.clients], axis=1)
    return round.plan(*draws)
