"""Messages of the ServerApp, pushed to nodes and pulled one by one.

Flower's own ``send_and_receive`` returns when all replies are there; here each is handed on as it
arrives.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from d2ft_fl.errors import RunError
from d2ft_fl.flower.answers import Answer, answer_of
from d2ft_fl.flower.records import query_of
from d2ft_fl.server.dispatch import ClientFailure

POLL_SECONDS = 0.02  # in memory
NODES_POLL_SECONDS = 0.2  # over a network
WORKER_LOST = ("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError")


class GridMessages:
    """Sends messages over a grid and hands on replies as they arrive.

    Attributes:
        grid: Flower's grid.
        workers: Worker processes of a simulation; 0 on real devices.
    """

    def __init__(self, grid: Grid):
        self.grid = grid
        self.workers = 0

    @property
    def poll_seconds(self) -> float:
        """Seconds from one look for replies to the next."""
        return POLL_SECONDS if self.workers else NODES_POLL_SECONDS

    def push(self, node: int, kind: str, content: RecordDict, seconds: float) -> str:
        """Send a message to a node; return its id, or nothing where Flower does not take it."""
        message = Message(content, dst_node_id=node, message_type=kind, ttl=seconds)
        return next(iter(self.grid.push_messages([message])), None) or ""

    def ask(self, node: int, question: Mapping[str, Any], seconds: float) -> str:
        """Send a question to a node; return the message's id as :meth:`push` does."""
        return self.push(node, "query", query_of(question), seconds)

    def pull(self, waiting: Collection[str]) -> Iterator[tuple[str, Message | ClientFailure]]:
        """Yield the id and reply of each message in ``waiting`` whose reply is there.

        Raises:
            RunError: When a worker process of the simulation is lost.
        """
        # A reply that cannot be read takes those with it that are pulled together.
        parts = [list(waiting)] if self.workers and waiting else [[sent] for sent in waiting]
        for part in parts:
            try:
                replies = list(self.grid.pull_messages(part))
            except httpx.HTTPError:  # the SuperLink failed, not a node
                raise
            except Exception as error:
                reason = f"its SuperNode's answer cannot be read: {type(error).__name__}: {error}"
                yield from ((sent, ClientFailure(reason)) for sent in part)
                continue
            for reply in replies:
                if (sent := reply.metadata.reply_to_message_id) in part:
                    failed = ClientFailure(self._reason(reply)) if reply.has_error() else None
                    yield sent, failed or reply

    def query(
        self, questions: Mapping[int, Mapping[str, Any]], seconds: float
    ) -> Iterator[tuple[int, Answer]]:
        """Ask nodes at once; yield each node and what it answers, or why it does not.

        Args:
            questions: Node -> its question.
            seconds: How long to wait for answers.
        """
        deadline = time.monotonic() + seconds
        waiting = {self.ask(node, questions[node], seconds): node for node in sorted(questions)}
        waiting.pop("", None)
        silent = set(questions)
        while waiting and time.monotonic() < deadline:
            for sent, reply in self.pull(list(waiting)):
                node = waiting.pop(sent)
                silent.discard(node)
                yield node, answer_of(reply, len(questions[node]["clients"]))
            if waiting:
                time.sleep(self.poll_seconds)
        yield from (
            (node, ClientFailure("its SuperNode does not answer")) for node in sorted(silent)
        )

    def _reason(self, reply: Message) -> str:
        """Return why a node failed.

        Raises:
            RunError: When a worker process of the simulation is lost: it goes back into Flower's
                pool, and fails every message that it draws.
        """
        reason = (reply.error.reason or "").strip() or f"error {reply.error.code}"
        if self.workers and any(name in reason for name in WORKER_LOST):
            raise RunError("a worker process of Flower's simulation died; the run can be resumed")
        return f"its SuperNode failed: {reason}"
