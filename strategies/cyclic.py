"""Cyclic blocks: in each round a client trains a run of layers, which moves on from round to round.

After t rounds, client c begins with layer (c + t) modulo the number of layers, and trains as many
layers from it on as its budgets afford. The other layers are FROZEN: gradients flow through them to
the layers that train. Where not even one layer fits beside all others, evenly chosen other layers
are skipped, as few as the budgets require.

Deviates: the paper's clients take turns, one layer each, and are sent the other layers compressed
(some dropped, the weights of some pruned); here all train at once, and what is sent is whole.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule, effective

PAPER = """Wang et al., Save It All: Enabling Full Parameter Tuning for Federated Large Language
Models via Cycle Block Gradient Descent, 2024, arXiv 2406.11187"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign as many layers from the client's first on as fit, for everyone."""
    blocks = context.shape[0]
    cycles = [_candidates(context, first) for first in range(blocks)]
    return [
        context.largest(client, cycles[(client.client + context.number - 1) % blocks])
        for client in context.clients
    ]


def _candidates(context: Round, first: int) -> list[Schedule]:
    """Return candidates, cheapest first: one layer beside ever more others, then more layers."""
    blocks = context.shape[0]
    others = np.delete(np.arange(blocks), first)
    kept = [others[np.arange(n) * len(others) // n] if n else others[:0] for n in range(blocks)]
    alone = [_layers(context, first, 1, beside) for beside in kept]
    return alone + [_layers(context, first, count, others) for count in range(2, blocks + 1)]


def _layers(context: Round, first: int, count: int, beside: np.ndarray) -> Schedule:
    """Return a run of ``count`` layers FULL, those in ``beside`` FROZEN, the rest skipped."""
    operations = np.full(context.shape, Operation.SHORTCUT)
    operations[beside] = Operation.FROZEN
    operations[(first + np.arange(count)) % len(operations)] = Operation.FULL
    return Schedule(effective(context.schedule(operations).operations))
