"""Successive layer training: layers train one after the other, under a narrowed rest of the model.

In each stage one layer trains whole (several, where the run has fewer rounds than the model
layers), those below are done (FORWARD_ONLY: nothing of them is kept for the backward pass), and of
those above every client trains as many leading heads as its budgets afford and skips the rest. Who
cannot afford all layers of a stage trains the last of them. A stage has ``stage-rounds`` rounds; by
default stages divide the run evenly.

Deviates: the paper gives all clients the same width of the rest, and fills the layers with the next
stage's width when they come to it; here widths are each client's own, and layers begin pretrained.
Its first stages train several layers where memory allows; here stages are alike.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule

PAPER = """Pfeiffer et al., Aggregating Capacity in FL through Successive Layer Training for
Computationally-Constrained Devices, NeurIPS 2023, arXiv 2305.17005"""
SCORES = ()
STAGED = True


def schedule(context: Round) -> list[Assignment]:
    """Assign the stage's layers, then the widest rest that fits, for everyone."""
    blocks, heads = context.shape
    stage, stages = context.stage(blocks)
    first, end = stage * blocks // stages, (stage + 1) * blocks // stages
    fewer = [_narrowed(context, begin, end, 1) for begin in range(end - 1, first, -1)]
    widths = [_narrowed(context, first, end, width) for width in range(1, heads + 1)]
    return [context.largest(client, fewer + widths) for client in context.clients]


def _narrowed(context: Round, first: int, end: int, width: int) -> Schedule:
    """Layers ``first`` to ``end`` whole, and so many heads of those above."""
    operations = np.full(context.shape, Operation.SHORTCUT)
    operations[:first] = Operation.FORWARD_ONLY
    operations[first:end] = Operation.FULL
    operations[end:, :width] = Operation.FULL
    return context.schedule(operations)
