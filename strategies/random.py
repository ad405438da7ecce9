"""Subnets drawn at random: the same budgets and solver as D2FT, without its scores.

Each client draws its own scores every round, so nothing is coordinated either.
"""

from d2ft_fl.rounds import Assignment, Round

USES_SCORES = False


def schedule(round: Round) -> list[Assignment]:
    """Each client's best schedule for scores that mean nothing."""
    assignments = []
    for client in round.clients:
        draw = round.generator(client)
        assignments.append(round.plan(client, draw.random(round.shape), draw.random(round.shape)))
    return assignments
