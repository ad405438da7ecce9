"""Every client trains everything: the reference.

With every subnet FULL the engine runs the unmodified model, and head-wise averages equal those of
FedAvg. Budgets are not kept; records show what clients use beyond them.

Deviates: all clients take part in every round, where the paper draws some, and train by AdamW
unless ``optimizer = "sgd"``.
"""

from d2ft_fl import Assignment, Round

PAPER = """McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
Data, AISTATS 2017, arXiv 1602.05629"""
KEEPS = ()
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign everything FULL to everyone."""
    return [context.assign(client, context.everything()) for client in context.clients]
