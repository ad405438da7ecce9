"""What a client refuses before it begins: others' messages, and plans that it cannot afford."""

from collections.abc import Collection, Iterable

import torch

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.client.job import Job
from d2ft_fl.costs.probe_costs import round_cost
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.errors import Refusal
from d2ft_fl.rounds.messages import Message
from d2ft_fl.util.torch_device import free_memory


def refuse_what_is_not_here(message: Message, asked: tuple[int, int] | None, local: int) -> None:
    """Check a message against who it came for, and the examples that there are.

    Args:
        message: What came.
        asked: The round and the client that it has to be of; None for any.
        local: How many examples the client has.

    Raises:
        Refusal: When it is another client's or round's, or of more examples than there are.
    """
    if asked is not None and (message.round, message.client) != asked:
        raise Refusal(
            f"a message of round {message.round} for client {message.client} came in round "
            f"{asked[0]} for client {asked[1]}"
        )
    probes = message.probes
    most = max(message.examples, probes.scored, probes.viewed)
    if most > local or probes.viewed not in (0, local):
        raise Refusal(
            f"the message is of {message.examples} examples, {probes.scored} to score and "
            f"{probes.viewed} to select from; there are {local}"
        )


def refuse_unless_it_fits(
    job: Job,
    budgets: Iterable[tuple[Budget, Collection[str]]],
    local: int,
    taken: int | None,
    device: torch.device,
) -> None:
    """Check a plan against a client's budgets and the free memory, before anything starts.

    Args:
        job: What the plan asks for.
        budgets: Each with the resources of it that have to be kept.
        local: How many examples the client has.
        taken: Bytes of this process beside the tensors of a round; None where budgets are of
            tensors.
        device: Where the client trains.

    Raises:
        Refusal: When the plan costs more than a budget allows, or more memory than is free.
    """
    message, costs = job.message, job.costs
    cost = round_cost(costs, message.schedule, message.examples, message.probes, message.cached)
    full = job.stage.costs.full_cost(local)
    for given, kept in budgets:
        budget = given.on(device.type, taken)
        limits = zip(RESOURCES, cost.vector(), budget.capacity(full), strict=True)
        for resource, planned, most in limits:
            if planned > most and resource in kept:
                raise Refusal(
                    f"the plan needs {planned} of {resource}, the budget allows {most}"
                    + (budget.beside if resource == "memory" else "")
                )
    if cost.memory > (free := free_memory(device)):
        raise Refusal(f"the plan needs {cost.memory} bytes of memory, {free} are free")
