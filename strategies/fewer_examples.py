"""Everything FULL, on as many examples as a client's compute and deadline afford.

The baseline to beat where compute is the only budget: no method, only less data. Examples are drawn
each round, or selected (``data-selection``) where the client can afford to probe all of them and to
train afterwards. It needs the whole model's memory and bytes, so that their budgets are not kept.
"""

from functools import partial

from d2ft_fl import Assignment, Participant, Probes, Round, most

KEEPS = ("flops", "deadline")
SCORES = ()


def schedule(context: Round) -> list[Assignment]:
    """Assign everything on the most examples that fit, for everyone."""
    return [_largest(context, client) for client in context.clients]


def _largest(context: Round, client: Participant) -> Assignment:
    count = client.examples
    if count == client.local:  # training on all examples needs no selection
        if (whole := _affordable(context, client, context.probes(client), count)) is not None:
            return whole
        count -= 1
    # Selecting probes all examples; a client that cannot afford that draws them at random.
    for probes in context.probes(client, count).alternatives:
        if assignment := most(0, count + 1, partial(_affordable, context, client, probes)):
            return assignment
    return context.sit_out(client)


def _affordable(
    context: Round, client: Participant, probes: Probes, count: int
) -> Assignment | None:
    """Return everything FULL on ``count`` examples; None where compute or deadline forbid it."""
    tried = context.assign(client, context.everything(), examples=count, probes=probes)
    fits = tried.cost.flops <= client.capacity[0] and client.on_time(tried.cost)
    return tried if fits else None
