"""What nodes answer, read with distrust: a malformed answer fails the node's clients alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.flower.records import unpack_blobs
from d2ft_fl.rounds.federation import Report
from d2ft_fl.server.dispatch import ClientFailure
from d2ft_fl.util.strict_json import read_json

log = logging.getLogger(__name__)
MOST_EXAMPLES = 10**7  # of a client
# Letters of a node's answer: so many, and so many for each client that it is asked for or was sent.
# A budget with a curve has 4,000.
ANSWER_LETTERS, CLIENT_LETTERS = 1 << 14, 1 << 14

Answer = dict[str, Any] | ClientFailure
Reply = bytes | memoryview | ClientFailure


def answer_of(reply: Message | ClientFailure, clients: int = 0) -> Answer:
    """Return what a node answers to a question, or why there is no answer.

    Args:
        reply: The node's message.
        clients: For how many clients it was asked.
    """
    if isinstance(reply, ClientFailure):
        return reply
    try:
        return _told(reply, "answer", clients)
    except Exception as error:
        return ClientFailure(f"its SuperNode's answer is malformed: {error}")


def _told(reply: Message, record: str, clients: int) -> dict[str, Any]:
    """Return the JSON of one of a message's records, which speaks of so many clients.

    Raises:
        Exception: Of any kind, when it is malformed.
    """
    text = reply.content.config_records[record]["json"]
    if not isinstance(text, str):
        raise TypeError(f"JSON that is a {type(text).__name__}")
    return read_json(text, ANSWER_LETTERS + CLIENT_LETTERS * clients)


def reports_of(answer: Mapping[str, Any], asked: Sequence[int]) -> list[Report]:
    """Return the reports in a node's answer; those of clients that were not asked are left out.

    Args:
        answer: With ``reports``, a list of [client, examples, budget as a mapping].
        asked: The clients whose reports the node was asked for.

    Raises:
        ValueError: When a report cannot be true.
        ConfigError: When a budget is malformed.
        Exception: Of any kind, when the answer has another form.
    """
    reports = []
    for client, examples, budget in answer["reports"]:
        if type(examples) is not int or not 0 < examples <= MOST_EXAMPLES:
            raise ValueError(f"client {client!r} has {examples!r} examples")
        if type(client) is int and client in asked:
            reports.append(Report(client, examples, Budget.from_json(budget, f"client {client}")))
    return reports


def results_of(reply: Message, sent: Sequence[int]) -> Iterator[tuple[int, Reply]]:
    """Yield the clients' replies that a node's message carries, and the failures it reports.

    What a node says of clients that it was not sent is ignored.

    Args:
        reply: The node's answer to a message with assignments.
        sent: The clients whose assignments the message had.
    """
    try:
        outcome = _told(reply, "outcome", len(sent))
        results = dict(unpack_blobs(reply.content.array_records["results"], outcome["index"]))
        failures = {int(client): str(why) for client, why in outcome["failures"].items()}
        if others := (results.keys() | failures.keys()) - set(sent):
            log.warning("a SuperNode answers for client %r, which it was not sent", min(others))
    except Exception as error:
        malformed = ClientFailure(f"its SuperNode's answer is malformed: {error}")
        yield from ((client, malformed) for client in sent)
        return
    for client in sent:
        if (blob := results.get(client)) is not None:
            yield client, blob
        if (reason := failures.get(client)) is not None:
            yield client, ClientFailure(reason)
