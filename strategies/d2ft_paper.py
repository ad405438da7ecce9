"""D2FT as published: training by magnitude, running by Fisher information, in two stages.

Every client trains the subnets of largest weights that its budgets afford. With what is left of its
budgets it runs the subnets of highest Fisher information, and skips the others. The paper plans
each of five micro-batches: set ``slots = 5``.

Deviates: the paper distributes one model's training over devices and knows one budget; here clients
are federated and have up to four budgets and a deadline.
"""

from d2ft_fl import Assignment, Round

PAPER = """Ding et al., You Don't Need All Attentions: Distributed Dynamic Fine-Tuning for
Foundation Models, 2025, arXiv 2504.12471"""
SCORES = ("fisher",)


def schedule(context: Round) -> list[Assignment]:
    """Plan each client's schedule in two stages."""
    return context.plan(context.scores("magnitude"), context.scores("fisher"), method="two-stage")
