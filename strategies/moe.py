"""A gated mixture of experts: each slot of a batch goes to some of every layer's heads.

In every slot and layer a noisy gate keeps the k heads of highest ``log(score) + Gumbel noise``: k
heads drawn without replacement, in proportion to their scores. The others are skipped. k is the
largest that a client's budgets afford. Use several slots, so that examples of a batch see different
experts.

A baseline of D2FT's paper. Deviates from a mixture of experts: the gate is not a layer that learns
and sees the input, but Fisher information measured by scoring probes; slots stand for routed
tokens. No loss balances the experts.
"""

import numpy as np

from d2ft_fl import Assignment, Operation, Round, Schedule

PAPER = """Lepikhin et al., GShard: Scaling Giant Models with Conditional Computation and Automatic
Sharding, ICLR 2021, arXiv 2006.16668 (as a baseline in arXiv 2504.12471)"""
SCORES = ("fisher",)


def schedule(context: Round) -> list[Assignment]:
    """Assign the most experts a layer that fit, for everyone."""
    gate = np.log(np.maximum(context.scores("fisher"), 1e-12))
    heads, slots = context.shape[1], context.federation.config.slots
    assignments = []
    for client in context.clients:
        noise = context.generator(client).gumbel(size=(slots, *context.shape))
        place = (-(gate + noise)).argsort(axis=2).argsort(axis=2)  # [slots, blocks, heads]
        experts = [
            Schedule(np.where(place < k, Operation.FULL, Operation.SHORTCUT).astype(np.int8))
            for k in range(1, heads + 1)
        ]
        assignments.append(context.largest(client, experts))
    return assignments
