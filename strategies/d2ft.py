"""A knapsack per client over common scores, on as much data as its budgets afford.

Every client trains the subnets of highest backward score that its budgets afford, and runs the
rest, so that gradients pass: all clients with like budgets choose alike, which coordinates them.
Where a budget binds, it may do so on fewer examples, in more passes, with activations computed
again, or get weights and send changes in fewer bits: of all these ways the one is taken that is
worth most (`d2ft_fl.planning.utility`). Who trains less of the model takes larger steps, and who
trains on fewer examples takes them in smaller batches. All of a client's examples count in the
mean, whatever it trains on, and the server steps further along the change of who trains on fewer.

Deviates from the paper, which distributes one model's training over devices, knows one budget,
three operations and no other ways; `d2ft-paper` is as published. With ``exploration`` above 0 the
backward scores are weighed by a draw each round, the same for all clients; ``coupling = "agenda"``
puts first what was trained longest ago; ``coupling = "spread"`` plans all clients together, the one
way that is configured.
"""

import numpy as np

from d2ft_fl import Assignment, PolicySearch, Round

PAPER = """Ding et al., You Don't Need All Attentions: Distributed Dynamic Fine-Tuning for
Foundation Models, 2025, arXiv 2504.12471"""


def schedule(context: Round) -> list[Assignment]:
    """Assign each client its best round under its budgets."""
    config = context.federation.config
    backward, forward = context.backward_scores(), context.forward_scores()
    preferred = backward
    if config.coupling == "agenda":
        preferred = context.agenda(backward)
    elif config.exploration:
        draws = np.random.default_rng([config.seed, context.number]).random(context.shape)
        preferred = backward * (1 + config.exploration * (2 * draws - 1))  # mean 1
    if config.coupling == "spread" or config.planner == "two-stage":
        return context.plan(preferred, forward)
    return PolicySearch(context, backward, forward, preferred).best()
