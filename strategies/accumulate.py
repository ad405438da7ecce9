"""Everything FULL, in micro-batches that are small enough for a client's memory.

The baseline to beat where memory is the only budget: the gradients of micro-batches add up to that
of the batch, so that a step takes equal FLOPs, less memory and more time. A client that has no
memory for the weights and one example sits out. Compute and bytes are those of full fine-tuning, so
that their budgets are not kept.
"""

from d2ft_fl import Assignment, ExecutionPolicy, Participant, Round

KEEPS = ("memory",)
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign everything in the fewest micro-batches that fit, for everyone."""
    return [_fewest_micro_batches(context, client) for client in context.clients]


def _fewest_micro_batches(context: Round, client: Participant) -> Assignment:
    for count in context.micro_batch_counts():
        assignment = context.assign(
            client, context.everything(), policy=ExecutionPolicy(micro_batches=count)
        )
        if assignment.cost.memory <= client.capacity[1]:
            return assignment
    return context.sit_out(client)
