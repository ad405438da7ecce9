"""Everything FULL on all examples, on as many tokens of each as compute and deadline afford.

Which patches of an image are kept is drawn anew each time. As `fewer-examples`, a baseline where
compute is the only budget: no method, only less of the data. It needs the whole model's bytes, and
of memory what weights and the tokens take, so of these it keeps no budget.
"""

from d2ft_fl.budgets import DEADLINE
from d2ft_fl.planner import Assignment, Participant
from d2ft_fl.rounds import Round, Way

PAPER = "Liu et al., PatchDropout, WACV 2023, arXiv 2208.07220"
KEEPS = ("flops", DEADLINE)
SCORES = ()


def schedule(round: Round) -> list[Assignment]:
    """The most tokens that fit, for everyone."""
    return [_most_tokens(round, client) for client in round.clients]


def _most_tokens(round: Round, client: Participant) -> Assignment:
    arch = round.federation.arch
    fits, over, found = arch.prefix, arch.tokens + 1, round.sit_out(client)  # more cost more
    while over - fits > 1:
        tokens = (fits + over) // 2
        tried = round.assign(client, round.everything(), way=Way(tokens=tokens))
        if tried.cost.flops <= client.capacity[0] and client.on_time(tried.cost):
            fits, found = tokens, tried
        else:
            over = tokens
    return found
