"""D2FT: a knapsack per client over common scores.

Every client trains the subnets of highest backward score and runs those of highest forward score
that its budgets afford. Scores are common, so clients with like budgets would choose alike, round
after round. With ``exploration`` above 0 a client's scores are weighed by a draw of its own each
round: a subnet is chosen by its score in proportion, none is left untrained for long, and no gap in
what runs is shared by everyone.

Deviates from the paper, which distributes one model's training over devices and knows one budget:
clients are federated and have up to four budgets and a deadline; scores are Fisher information for
both directions instead of magnitude and Fisher; one solver weighs all operations at once. The
paper's choices are ``backward-score = "magnitude"``, ``exploration = 0``, ``planner = "two-stage"``
and ``slots = 5``.
"""

import numpy as np

from d2ft_fl.rounds import Assignment, Round

PAPER = """Ding et al., You Don't Need All Attentions: Distributed Dynamic Fine-Tuning for
Foundation Models, 2025, arXiv 2504.12471"""


def schedule(round: Round) -> list[Assignment]:
    """Each client's best schedule under its budgets."""
    config = round.federation.config
    backward, forward = round.backward_scores(), round.forward_scores()
    if config.coupling == "agenda":
        backward = round.agenda(backward)
    if config.coupling != "none" or not config.exploration:
        return round.plan(backward, forward)
    draws = np.stack([round.generator(c).random((2, *round.shape)) for c in round.clients], axis=1)
    weights = 1 + config.exploration * (2 * draws - 1)  # mean 1
    return round.plan(backward * weights[0], forward * weights[1])
