"""Depth: each client trains as many of the first layers as its budgets afford, and skips the rest.

Accuracy is measured with all layers, even where few clients or none trained the last ones.

Deviates: the paper gives every depth its classifier, and these teach each other
(self-distillation); here all depths share one classifier.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule

PAPER = """Kim et al., DepthFL: Depthwise Federated Learning for Heterogeneous Clients, ICLR 2023,
openreview pf8RIZTMU58"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the most of the first layers that fit, for everyone."""
    depths = [first_layers(context, count) for count in range(1, context.shape[0] + 1)]
    return [context.largest(client, depths) for client in context.clients]


def first_layers(context: Round, count: int) -> Schedule:
    """Return the first ``count`` layers FULL, those above skipped."""
    operations = np.full(context.shape, Operation.SHORTCUT)
    operations[:count] = Operation.FULL
    return context.schedule(operations)
