"""Ordered dropout: a client trains a random number of the leading heads that it affords.

Every client has a largest width, as in HeteroFL. In each slot of a batch it trains the leading
heads up to a width that is drawn evenly from 1 to its largest, so that leading heads learn to work
without the others. Use several slots: with one slot, one width is drawn a round.

Deviates: the paper draws a width every batch from five ratios and lets the largest teach the drawn
one (self-distillation); here a width is drawn for a slot and a round, and there is
no distillation.
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
    assignments = []
    for client in context.clients:
        largest = context.largest(client, widths)
        most = int(largest.schedule.trained.any(axis=0).sum())
        operations = largest.schedule.operations.copy()
        drawn = context.generator(client).integers(min(1, most), most + 1, len(operations))
        for slot, width in enumerate(drawn.tolist()):
            operations[slot, :, width:] = Operation.SHORTCUT
        narrower = context.assign(client, Schedule(operations), probes=largest.probes)
        # Operations that differ from slot to slot split into head groups that can take more memory.
        assignments.append(narrower if client.affords(narrower.cost) else largest)
    return assignments
