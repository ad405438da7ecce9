"""Successive layer training: layers train in turn, with a narrowed model above them.

In each stage one layer trains whole, or several where the run has fewer rounds than the model has
layers. The layers below have trained and run FORWARD_ONLY: nothing of them is kept for the backward
pass. Of the layers above, every client trains as many leading heads as its budgets afford, and
skips the others. A client that cannot afford all layers of a stage trains the last of them. A stage
has ``stage-rounds`` rounds; by default stages divide the run evenly.

Deviates: the paper gives all clients one width of the layers above, and widens layers when their
stage comes; here each client has the width that it affords, and layers begin pretrained. The
paper's first stages train several layers where memory allows; here stages are alike.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule

PAPER = """Pfeiffer et al., Aggregating Capacity in FL through Successive Layer Training for
Computationally-Constrained Devices, NeurIPS 2023, arXiv 2305.17005"""
SCORES = ()
STAGED = True


def schedule(context: Round) -> list[Assignment]:
    """Assign the stage's layers, and the widest layers above that fit, for everyone."""
    blocks, heads = context.shape
    stage, stages = context.stage(blocks)
    first, end = stage * blocks // stages, (stage + 1) * blocks // stages
    fewer = [_narrowed(context, begin, end, 1) for begin in range(end - 1, first, -1)]
    widths = [_narrowed(context, first, end, width) for width in range(1, heads + 1)]
    return [context.largest(client, fewer + widths) for client in context.clients]


def _narrowed(context: Round, first: int, end: int, width: int) -> Schedule:
    """Return layers ``first`` to ``end`` whole, and ``width`` leading heads of those above."""
    operations = np.full(context.shape, Operation.SHORTCUT)
    operations[:first] = Operation.FORWARD_ONLY
    operations[first:end] = Operation.FULL
    operations[end:, :width] = Operation.FULL
    return context.schedule(operations)
