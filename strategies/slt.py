"""Successive layer training: layers train one after the other, under a narrowed rest of the model.

In each stage one layer trains whole, those below are done (FORWARD_ONLY: nothing of them is kept
for the backward pass), and of those above every client trains as many leading heads as its budgets
afford and skips the rest. Once every layer had its stage the last one goes on.

Deviates: the paper gives all clients the same width of the rest, and fills the layers with the next
stage's width when they come to it; here widths are each client's own, and layers begin pretrained.
Its first stages train several layers where memory allows; here always one.
"""

import numpy as np

from d2ft_fl.rounds import Assignment, Round
from d2ft_fl.subnets import Operation, Schedule

PAPER = """Pfeiffer et al., Aggregating Capacity in FL through Successive Layer Training for
Computationally-Constrained Devices, NeurIPS 2023, arXiv 2305.17005"""
SCORES = ()


def schedule(round: Round) -> list[Assignment]:
    """The stage's layer and the widest rest that fits, for everyone."""
    blocks, heads = round.shape
    layer = round.stage(blocks)
    widths = [_narrowed(round, layer, width) for width in range(1, heads + 1)]
    return [round.largest(client, widths) for client in round.clients]


def _narrowed(round: Round, layer: int, width: int) -> Schedule:
    operations = np.full(round.shape, Operation.SHORTCUT)
    operations[:layer] = Operation.FORWARD_ONLY
    operations[layer] = Operation.FULL
    operations[layer + 1 :, :width] = Operation.FULL
    return round.schedule(operations)
