"""Everything FULL, in passes of a batch that are small enough for a client's memory.

The baseline to beat where memory is the only budget: gradients of a batch's parts add up, so that a
step is the same, with the same FLOPs, in less memory and more time. A client whose memory does not
even hold the weights and one example sits out. Compute and bytes are those of full fine-tuning, so
of these it keeps no budget.
"""

from d2ft_fl import Assignment, ExecutionPolicy, Participant, Round

KEEPS = ("memory",)
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign everything in the fewest micro-batches that fit, for everyone."""
    return [_fewest_micro_batches(context, client) for client in context.clients]


def _fewest_micro_batches(context: Round, client: Participant) -> Assignment:
    for count in context.micro_batch_counts():
        found = context.assign(
            client, context.everything(), policy=ExecutionPolicy(micro_batches=count)
        )
        if found.cost.memory <= client.capacity[1]:
            return found
    return context.sit_out(client)
