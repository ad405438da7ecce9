"""Everything FULL on all examples, on as many tokens of each as compute and deadline afford.

The patches of an image that are kept are drawn each time that it is used. Like `fewer-examples`, it
is a baseline where compute is the only budget: no method, only less of the data. It needs the whole
model's bytes, and memory for the weights and tokens, so that their budgets are not kept.
"""

from functools import partial

from d2ft_fl import Assignment, ExecutionPolicy, Participant, Round, most

PAPER = "Liu et al., PatchDropout, WACV 2023, arXiv 2208.07220"
KEEPS = ("flops", "deadline")
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign everything on the most tokens that fit, for everyone."""
    return [_most_tokens(context, client) for client in context.clients]


def _most_tokens(context: Round, client: Participant) -> Assignment:
    arch = context.federation.arch
    assignment = most(arch.prefix, arch.tokens + 1, partial(_affordable, context, client))
    return assignment or context.sit_out(client)


def _affordable(context: Round, client: Participant, tokens: int) -> Assignment | None:
    """Return everything FULL on ``tokens`` tokens; None where compute or deadline forbid it."""
    tried = context.assign(client, context.everything(), policy=ExecutionPolicy(tokens=tokens))
    fits = tried.cost.flops <= client.capacity[0] and client.on_time(tried.cost)
    return tried if fits else None
