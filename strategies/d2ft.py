"""A knapsack per client over common scores, on as much data as its budgets afford.

Every client trains the subnets of highest backward score that its budgets afford, and runs the
others, so that gradients flow through them. Clients with similar budgets choose similar subnets,
which coordinates them. Where a budget binds, a client may train on fewer examples, in more
micro-batches, with activations computed again, or get weights and send changes in fewer bits. The
execution policy of highest utility is taken (`d2ft_fl.planning.utility`). A client that trains less
of the model takes larger steps, and a client that trains on fewer examples takes smaller batches.
All of a client's examples count in the mean, whatever it trains on. The server takes a larger step
along the change of a client that trains on fewer.

Deviates: the paper distributes one model's training over devices and knows one budget, three
operations and no other execution policies; `d2ft-paper` is as published. With ``exploration`` above
0 the backward scores are multiplied by random factors, drawn each round for all clients together.
``coupling = "agenda"`` puts first what was trained longest ago. ``coupling = "spread"`` plans all
clients together, under the execution policy that is configured.
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
