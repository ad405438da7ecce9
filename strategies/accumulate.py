"""Everything FULL, in passes of a batch that are small enough for a client's memory.

The baseline to beat where memory is the only budget: gradients of a batch's parts add up, so that a
step is the same, with the same FLOPs, in less memory and more time. A client whose memory does not
even hold the weights and one example sits out. Compute and bytes are those of full fine-tuning, so
of these it keeps no budget.
"""

from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.rounds.context import Round, Way

KEEPS = ("memory",)
SCORES = ()


def schedule(round: Round) -> list[Assignment]:
    """The fewest passes that fit, for everyone."""
    return [_fewest_passes(round, client) for client in round.clients]


def _fewest_passes(round: Round, client: Participant) -> Assignment:
    for passes in round.pass_counts():
        found = round.assign(client, round.everything(), way=Way(accumulate=passes))
        if found.cost.memory <= client.capacity[1]:
            return found
    return round.sit_out(client)
