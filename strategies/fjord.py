"""Ordered dropout: of the leading heads that a client affords it trains now more, now fewer.

Every client has a largest width, as in HeteroFL; in each slot of a batch it trains the leading
heads up to a width drawn evenly from all up to its largest, so that leading heads learn to do
without those behind them. Take several slots: with one there is one draw a round.

Deviates: the paper draws a width every batch from five ratios and lets the largest teach the drawn
one (self-distillation); here one draw holds for a slot and a round, and nobody teaches.
"""

from d2ft_fl import Assignment, Operation, Round, Schedule

from .heterofl import some_heads

PAPER = """Horvath et al., FjORD: Fair and Accurate Federated Learning under heterogeneous targets
with Ordered Dropout, NeurIPS 2021, arXiv 2102.13451"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign drawn widths up to the largest that fits, for everyone."""
    heads = context.shape[1]
    widths = [some_heads(context, range(width)) for width in range(1, heads + 1)]
    found = []
    for client in context.clients:
        largest = context.largest(client, widths)
        most = int(largest.schedule.trained.any(axis=0).sum())
        operations = largest.schedule.operations.copy()
        drawn = context.generator(client).integers(min(1, most), most + 1, len(operations))
        for slot, width in enumerate(drawn.tolist()):
            operations[slot, :, width:] = Operation.SHORTCUT
        narrower = context.assign(client, Schedule(operations), probes=largest.probes)
        # What differs from slot to slot can take more memory in its pieces.
        found.append(narrower if client.affords(narrower.cost) else largest)
    return found
