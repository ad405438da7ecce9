"""Federated dropout: each client trains heads drawn at random, the same number of every layer.

Each layer's heads are drawn on their own, by every client and round anew.

Deviates: the paper drops single units, at one rate for all clients; here heads with their part of
the feed-forward layer, as many as a client's budgets do not afford.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round

PAPER = """Caldas et al., Expanding the Reach of Federated Learning by Reducing Client Resource
Requirements, 2018, arXiv 1812.07210"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the most drawn heads of every layer that fit, for everyone."""
    found = []
    for client in context.clients:
        order = context.generator(client).random(context.shape).argsort(axis=1).argsort(axis=1)
        widths = [
            context.schedule(np.where(order < width, Operation.FULL, Operation.SHORTCUT))
            for width in range(1, context.shape[1] + 1)
        ]
        found.append(context.largest(client, widths))
    return found
