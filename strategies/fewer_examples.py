"""Everything FULL, on as many examples as a client's compute and deadline afford.

The baseline to beat where compute is the only budget: no method, only less data. Examples are drawn
anew each round, or selected (``data-selection``) where the look at all of them leaves anything to
train on. It needs the whole model's memory and bytes, so of these it keeps no budget.
"""

from d2ft_fl.budgets import DEADLINE
from d2ft_fl.passes import Passes
from d2ft_fl.planner import Assignment, Participant
from d2ft_fl.rounds import Round

KEEPS = ("flops", DEADLINE)
SCORES = ()


def schedule(round: Round) -> list[Assignment]:
    """The most examples that fit, for everyone."""
    return [_largest(round, client) for client in round.clients]


def _largest(round: Round, client: Participant) -> Assignment:
    most = client.examples
    if most == client.local:  # for which nothing has to be selected
        if (whole := _affordable(round, client, most, round.passes(client))) is not None:
            return whole
        most -= 1
    # Selecting costs a look at all examples: who cannot afford that draws.
    for passes in round.passes(client, most).alternatives:
        fits, over, found = 0, most + 1, None  # more examples cost more
        while over - fits > 1:
            count = (fits + over) // 2
            tried = _affordable(round, client, count, passes)
            fits, over, found = (fits, count, found) if tried is None else (count, over, tried)
        if found is not None:
            return found
    return round.sit_out(client)


def _affordable(round: Round, client: Participant, count: int, passes: Passes) -> Assignment | None:
    """Everything on so many examples, if compute and deadline allow it."""
    tried = round.assign(client, round.everything(), examples=count, passes=passes)
    fits = tried.cost.flops <= client.capacity[0] and client.on_time(tried.cost)
    return tried if fits else None
