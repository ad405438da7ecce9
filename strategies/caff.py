"""Layer fine-tuning: each client trains as many of the last layers as its budgets afford.

The layers below run FORWARD_ONLY, so that they leave nothing in memory for the backward pass; each
layer is averaged over the clients that trained it, weighted by examples. A client that affords no
layer trains the classifier. ``d2ft choose`` chooses among architectures, as the paper does, by the
number of layers that clients can train on average.

Deviates: the paper's clients have memory, compute and upload limits of a few classes; here any of
the four budgets and the deadline.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule

PAPER = """Pfeiffer et al., Efficient Federated Finetuning of Tiny Transformers with
Resource-Constrained Devices, 2024, arXiv 2411.07826"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the most of the last layers that fit, for everyone."""
    blocks = context.shape[0]
    depths = [last_layers(context, count) for count in range(blocks + 1)]
    return [context.largest(client, depths) for client in context.clients]


def last_layers(context: Round, count: int) -> Schedule:
    """Return the last ``count`` layers FULL, those below FORWARD_ONLY."""
    operations = np.full(context.shape, Operation.FORWARD_ONLY)
    operations[len(operations) - count :] = Operation.FULL
    return context.schedule(operations)
