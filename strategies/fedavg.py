"""Everyone trains everything. The reference.

With every subnet FULL the engine is the unmodified model, and head-wise averaging is FedAvg's. It
does not look at budgets; what it uses beyond them is reported.

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
