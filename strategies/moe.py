"""A gated mixture of experts: each slot of a batch goes to some of every layer's heads.

A noisy gate keeps, in every slot and layer, the k heads of highest ``log(score) + Gumbel noise``: k
drawn without replacement, by their score in proportion. The others are skipped. k is the most that
a client's budgets afford. Take several slots, so that examples of a batch see different experts.

A baseline of D2FT's paper. Deviates from a mixture of experts: the gate is no layer that learns and
sees the input, but Fisher information measured in scoring passes; slots stand for routed tokens.
Experts are not balanced by a loss.
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
    found = []
    for client in context.clients:
        noise = context.generator(client).gumbel(size=(slots, *context.shape))
        place = (-(gate + noise)).argsort(axis=2).argsort(axis=2)  # [slots, blocks, heads]
        experts = [
            Schedule(np.where(place < k, Operation.FULL, Operation.SHORTCUT).astype(np.int8))
            for k in range(1, heads + 1)
        ]
        found.append(context.largest(client, experts))
    return found
