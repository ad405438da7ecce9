"""Width: each client trains the leading heads of every layer, as many as its budgets afford.

Deviates: the paper slices channels of convolutional networks at five fixed ratios and scales what
it cuts; here a slice is a head with its part of the feed-forward layer, any number of heads is
possible, norms stay whole, and nothing is scaled. The paper's masked cross-entropy, over the
classes that a client has, is left out.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule

PAPER = """Diao et al., HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients, ICLR 2021, arXiv 2010.01264"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the most leading heads that fit, for everyone."""
    widths = [some_heads(context, range(width)) for width in range(1, context.shape[1] + 1)]
    return [context.largest(client, widths) for client in context.clients]


def some_heads(context: Round, heads: range | np.ndarray) -> Schedule:
    """Return the given heads of every layer FULL, the others skipped."""
    operations = np.full(context.shape, Operation.SHORTCUT)
    operations[:, np.asarray(heads)] = Operation.FULL
    return context.schedule(operations)
