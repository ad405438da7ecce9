"""A rolling window of heads: as in HeteroFL, but the window moves by one head every round.

So clients of every width train every head in turn, and not the leading heads alone.

Deviates: the paper's window is one of channels; here it is one of heads with their part of the
feed-forward layer.
"""

import numpy as np

from d2ft_fl import Assignment, Round

from .heterofl import some_heads

PAPER = """Alam et al., FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model
Extraction, NeurIPS 2022, arXiv 2212.01548"""
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign the widest window that fits, for everyone."""
    heads = context.shape[1]
    first = (context.number - 1) % heads
    widths = [some_heads(context, (first + np.arange(w)) % heads) for w in range(1, heads + 1)]
    return [context.largest(client, widths) for client in context.clients]
