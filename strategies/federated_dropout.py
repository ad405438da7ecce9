"""Federated dropout: each client trains heads drawn at random, equally many of every layer.

Heads are drawn independently for each layer, client and round.

Deviates: the paper drops single units, at one rate for all clients; here heads are dropped with
their part of the feed-forward layer, as many as a client's budgets require.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round

PAPER = """Caldas et al., Expanding the Reach of Federated Learning by Reducing Client Resource
Requirements, 2018, arXiv 1812.07210"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the most drawn heads of every layer that fit, for everyone."""
    assignments = []
    for client in context.clients:
        order = context.generator(client).random(context.shape).argsort(axis=1).argsort(axis=1)
        widths = [
            context.schedule(np.where(order < width, Operation.FULL, Operation.SHORTCUT))
            for width in range(1, context.shape[1] + 1)
        ]
        assignments.append(context.largest(client, widths))
    return assignments
