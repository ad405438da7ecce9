"""Which SuperNodes are connected, and which clients each of them serves."""

import logging
import math
import time

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, D2FTError, RunError
from d2ft_fl.flower.answers import Answer, answer_of
from d2ft_fl.flower.client_app import simulated
from d2ft_fl.flower.grid_messages import NODES_POLL_SECONDS, GridMessages
from d2ft_fl.flower.records import PLACE
from d2ft_fl.server.dispatch import ClientFailure, short_reason

log = logging.getLogger(__name__)
NODES_TIMEOUT = 120.0
PLACE_SECONDS = 60.0  # for a node to say which clients it serves


class NodeDirectory:
    """The SuperNodes of a run: asked for their clients when they come, forgotten when they go.

    Attributes:
        serving: Flower's node id -> the clients that the node serves.
        joined: Node id -> how many had come before it did, the last time.
        refused: Node id -> why the node cannot serve, and until when that is not asked again.
        waiting: Nodes that wait until another one, which serves clients of theirs, is gone.
    """

    def __init__(self, messages: GridMessages, config: RunConfig):
        self.messages, self.config = messages, config
        self.serving: dict[int, range] = {}
        self.joined: dict[int, int] = {}
        self.refused: dict[int, tuple[str, float]] = {}
        self.waiting: set[int] = set()
        self._places: dict[int, range] = {}  # node -> the clients that it says it serves
        self._asked: dict[str, tuple[int, float]] = {}  # message -> the node, and until when

    @property
    def patience(self) -> float:
        """Seconds for which nodes are asked; those of a simulation may not have started yet."""
        seconds = self.config.round_timeout
        return max(NODES_TIMEOUT, seconds) if simulated() else seconds

    def clients(self) -> dict[int, int]:
        """Return the clients whose SuperNodes are connected; the first call waits for all of them.

        Returns:
            Client -> a number that is another one when its SuperNode was gone in between.

        Raises:
            RunError: When fewer clients are there after a while than are needed. A simulation
                needs all of its nodes, and fails when one of them does.
        """
        started, first = time.monotonic(), not self.joined
        wanted = self.config.clients if first else max(1, self.config.min_replies)
        while True:
            self.meet()
            there = {c: self.joined[node] for node, served in self.serving.items() for c in served}
            if len(there) >= wanted:
                return there
            seconds = self.patience
            if not simulated():  # to start is no part of a round
                seconds = NODES_TIMEOUT if first else min(NODES_TIMEOUT, seconds)
            if time.monotonic() > started + seconds:
                break
            time.sleep(NODES_POLL_SECONDS)
        if simulated():
            raise RunError(
                f"the simulation's SuperNodes of {len(there)} of {wanted} clients answer, after "
                f"{seconds:.0f} s"
            )
        if len(there) < max(1, self.config.min_replies):
            why = next((f"; one says: {reason}" for reason, _ in self.refused.values()), "")
            raise RunError(
                f"SuperNodes of {len(there)} clients are there, after {seconds:.0f} s; "
                f"min-replies = {self.config.min_replies}{why}"
            )
        return there

    def meet(self) -> None:
        """Ask nodes that are new which clients they serve, and forget those that are gone."""
        there, now = set(self.messages.grid.get_node_ids()), time.monotonic()
        self._places = {node: served for node, served in self._places.items() if node in there}
        self.refused = {n: r for n, r in self.refused.items() if n in there and r[1] > now}
        for sent, reply in self.messages.pull(self._asked):
            self._place(self._asked.pop(sent)[0], answer_of(reply))
        self._asked = {
            sent: (node, until)
            for sent, (node, until) in self._asked.items()
            if node in there and until > now
        }
        known = self._places.keys() | self.refused.keys() | {n for n, _ in self._asked.values()}
        for node in sorted(there - known):
            # The message is valid for longer than its answer is waited for: after that the node is
            # asked anew, and nothing has failed.
            if sent := self.messages.ask(node, PLACE, 2 * PLACE_SECONDS):
                self._asked[sent] = node, now + PLACE_SECONDS
        self._serve()

    def _place(self, node: int, answer: Answer) -> None:
        """Note which clients a node says it serves, or why it cannot."""
        try:
            if isinstance(answer, ClientFailure):
                raise RunError(answer.reason)
            if "error" in answer:
                raise ConfigError(str(answer["error"]))
            number, nodes, cpus = answer["node"], answer["nodes"], answer["cpus"]
            if type(number) is not int or type(nodes) is not int or not 0 <= number < nodes:
                raise ValueError(f"node {number!r} of {nodes!r}")
            served = range(number, self.config.clients, nodes)
        except Exception as error:
            if simulated():
                raise error if isinstance(error, D2FTError) else RunError(str(error)) from error
            reason = short_reason(str(error))
            again = time.monotonic() + PLACE_SECONDS if isinstance(error, RunError) else math.inf
            self.refused[node] = reason, again
            log.warning("SuperNode %s is left out: %s", node, reason)
            return
        self._places[node] = served
        if simulated() and cpus is not None:
            self.messages.workers = _simulated_workers(cpus)

    def _serve(self) -> None:
        """Give each client one node of those that say they serve it: whoever came first."""
        before, self.serving = self.serving, {}
        for node in sorted(self._places, key=lambda node: (node not in before, node)):
            served = self._places[node]
            if any(set(served) & set(others) for others in self.serving.values()):
                if node not in self.waiting:
                    log.warning("SuperNode %s waits: another serves some of its clients", node)
                self.waiting.add(node)
                continue
            self.waiting.discard(node)
            self.serving[node] = served
            if node not in before:
                self.joined[node] = max(self.joined.values(), default=0) + 1


def _simulated_workers(cpus: float) -> int:
    """Return how many worker processes a simulation has that gives ``cpus`` to each."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1.0) / max(cpus, 1e-3)))
