"""D2FT (arXiv 2504.12471): a knapsack per client over common scores.

Every client trains the subnets of highest backward score and runs those of highest forward score
that its budgets afford. Scores are common, so clients with like budgets would choose alike, round
after round. With ``exploration`` above 0 a client's scores are weighed by a draw of its own each
round: a subnet is chosen by its score in proportion, none is left untrained for long, and no gap in
what runs is shared by everyone. ``exploration = 0`` is the paper's fixed choice.
"""

import numpy as np

from d2ft_fl.rounds import Assignment, Round


def schedule(round: Round) -> list[Assignment]:
    """Each client's best schedule under its budgets."""
    exploration = round.federation.config.exploration
    scores = np.stack([round.backward_scores(), round.forward_scores()])
    assignments = []
    for client in round.clients:
        draws = round.generator(client).random((2, *round.shape))
        weights = 1 + exploration * (2 * draws - 1)  # mean 1
        backward, forward = scores * weights
        assignments.append(round.plan(client, backward, forward))
    return assignments
