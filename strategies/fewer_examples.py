"""Everything FULL, on as many examples as a client's compute and deadline afford.

The baseline to beat where compute is the only budget: no method, only less data. Examples are drawn
anew each round (or selected; see ``data-selection``). It needs the whole model's memory and bytes,
so of these it keeps no budget.
"""

from d2ft_fl.budgets import DEADLINE
from d2ft_fl.planner import Assignment, Participant
from d2ft_fl.rounds import Round

KEEPS = ("flops", DEADLINE)
SCORES = ()


def schedule(round: Round) -> list[Assignment]:
    """The most examples that fit, for everyone."""
    return [_largest(round, client) for client in round.clients]


def _largest(round: Round, client: Participant) -> Assignment:
    everything = round.everything()
    fits, over = 0, client.examples + 1  # more examples cost more
    found = round.sit_out(client)
    while over - fits > 1:
        count = (fits + over) // 2
        tried = round.assign(client, everything, examples=count)
        if tried.cost.flops <= client.capacity[0] and client.on_time(tried.cost):
            fits, found = count, tried
        else:
            over = count
    return found
