"""FedAvg (McMahan et al., AISTATS 2017): everyone trains everything. The reference.

It does not look at budgets; what it uses beyond them is reported.
"""

from d2ft_fl.rounds import Assignment, Round

USES_SCORES = False
KEEPS_BUDGETS = False


def schedule(round: Round) -> list[Assignment]:
    """Everything FULL for everyone."""
    return [round.assign(client, round.everything()) for client in round.clients]
