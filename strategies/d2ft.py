"""D2FT (arXiv 2504.12471): a knapsack per client over common scores.

Every client trains the subnets of highest backward score and runs those of highest forward score
that its budgets afford. Scores are common, so clients with like budgets choose alike.
"""

from d2ft_fl.rounds import Assignment, Round


def schedule(round: Round) -> list[Assignment]:
    """Each client's best schedule under its budgets."""
    backward, forward = round.backward_scores(), round.forward_scores()
    return [round.plan(client, backward, forward) for client in round.clients]
