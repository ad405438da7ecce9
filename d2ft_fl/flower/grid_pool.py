"""The clients of a federation behind Flower's grid: the ServerApp's end of every message.

Flower's own ``Strategy.start`` collects every reply before it aggregates and wants equal keys in
all of them; head-wise replies differ and are aggregated as they arrive, so messages are pushed and
pulled here.

In a simulation every worker can serve every client. A round is one message for each worker
process, with clients of about the same predicted cost; the model goes to workers and replies come
back through shared memory (:mod:`d2ft_fl.runtime.shared_memory`), and messages carry the rest. On
real devices, and where ``transport`` says so, messages carry everything.
"""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.data.labels import digest_of
from d2ft_fl.errors import ConfigError
from d2ft_fl.flower.answers import Answer, Reply, reports_of, results_of
from d2ft_fl.flower.grid_messages import GridMessages
from d2ft_fl.flower.nodes import NodeDirectory
from d2ft_fl.flower.records import pack_blobs
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Report
from d2ft_fl.runtime.ray_model_store import ModelStore, machines
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.server.dispatch import ClientFailure, RoundDispatch
from d2ft_fl.util.strict_json import write_json

GRACE_SECONDS = 5.0  # for what workers end at the deadline to be heard of
NODES_GRACE_SECONDS = 30.0  # where messages are fetched every few seconds, and take a while


class FlowerPool:
    """The clients of a federation behind Flower's grid; a :class:`~d2ft_fl.server.run.ClientPool`.

    Nodes are strangers: whatever one says, and however it fails, costs its own clients' answers.

    Attributes:
        messages: Messages to nodes and their replies.
        nodes: The nodes that are connected.
        shared_memory: Where a simulation's model and replies go, from its first round on.
        model_store: The model for other machines of a Ray cluster.
    """

    def __init__(self, grid: Grid, config: RunConfig):
        self.config = config
        self.messages = GridMessages(grid)
        self.nodes = NodeDirectory(self.messages, config)
        self.shared_memory: SharedMemory | None = None
        self.model_store: ModelStore | None = None

    @cached_property
    def _classes(self) -> str:
        """Digest of the run's classes, with which nodes compare theirs."""
        return digest_of(Components(self.config).class_names)

    def close(self) -> None:
        """Delete what was shared."""
        if self.shared_memory:
            self.shared_memory.close()

    def clients(self, round_number: int) -> dict[int, int]:
        """Return the clients that are there; see :meth:`.nodes.NodeDirectory.clients`."""
        return self.nodes.clients()

    # -- reports before a round --------------------------------------------------------------

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], dict[int, ClientFailure]]:
        """Return the reports of clients, and why others do not report.

        Raises:
            ConfigError: With what a simulated client reports to be wrong with the configuration. A
                real one may be the only one that does, and is left out.
        """
        groups = self._groups(clients, [list(part) for part in self._split(clients)])
        questions = {
            node: {"round": round_number, "clients": asked, "classes": self._classes}
            for node, asked in groups.items()
        }
        reports: list[Report] = []
        silent: dict[int, ClientFailure] = {}
        for node, answer in self.messages.query(questions, self.nodes.patience):
            asked = groups[node]
            told, failure = self._reports_of_node(answer, asked)
            reports += told
            silent |= dict.fromkeys(sorted(set(asked) - {r.client for r in told}), failure)
        return reports, silent

    def _reports_of_node(
        self, answer: Answer, asked: list[int]
    ) -> tuple[list[Report], ClientFailure]:
        """Return the reports in a node's answer, and why the other clients have none."""
        if isinstance(answer, ClientFailure):
            return [], answer
        if "error" in answer and self.messages.workers:
            raise ConfigError(str(answer["error"]))
        if reason := answer.get("error") or answer.get("failed"):
            return [], ClientFailure(str(reason))
        try:
            reports = reports_of(answer, asked)
        except Exception as error:
            return [], ClientFailure(f"its SuperNode's report is malformed: {error}")
        return reports, ClientFailure("its SuperNode says nothing of it")

    @property
    def _busy_nodes(self) -> int:
        """How many nodes of a simulation can work at once; 1 on real devices."""
        return max(1, min(self.messages.workers, len(self.nodes.serving)))

    def _split(self, clients: Sequence[int]) -> list[Sequence[int]]:
        """Divide clients into as many parts as can be asked at once."""
        size = -(-len(clients) // self._busy_nodes)
        return [clients[start : start + size] for start in range(0, len(clients), size)]

    def _groups(self, clients: Sequence[int], parts: Sequence[list[int]]) -> dict[int, list[int]]:
        """Divide clients over nodes: node -> the clients that it is sent.

        Args:
            clients: All of them.
            parts: The clients divided, for a simulation, where any node can serve any client.
        """
        if self.messages.workers:
            return dict(zip(sorted(self.nodes.serving), parts, strict=False))
        wanted = set(clients)
        groups = {
            node: [client for client in served if client in wanted]
            for node, served in sorted(self.nodes.serving.items())
        }
        return {node: group for node, group in groups.items() if group}

    # -- a round -----------------------------------------------------------------------------

    def train(self, work: RoundDispatch) -> Iterator[tuple[int, Reply]]:
        """Send everything, and hand on replies as they arrive, until the deadline."""
        deadline = time.monotonic() + self.config.round_timeout + self._grace
        if self._shares_memory and self.shared_memory is None:
            self.shared_memory = SharedMemory.create(work.model_bytes, self.messages.workers)
            self.model_store = ModelStore(f"d2ft-{uuid4().hex}") if machines() > 1 else None
        with work.stopwatch.of("broadcast"):
            waiting = self._send(work)
        missing = set(work.costs)
        while waiting and time.monotonic() < deadline:
            for client, reply in self._arrived(work, waiting):
                missing.discard(client)
                yield client, reply
            time.sleep(self.messages.poll_seconds)
        late = "no answer before the round's deadline" if waiting else "its SuperNode said nothing"
        yield from ((client, ClientFailure(late)) for client in sorted(missing))

    @property
    def _shares_memory(self) -> bool:
        return bool(self.messages.workers) and self.config.transport == "shared"

    @property
    def _grace(self) -> float:
        return GRACE_SECONDS if self.messages.workers else NODES_GRACE_SECONDS

    def _send(self, work: RoundDispatch) -> dict[str, list[int]]:
        """Push the messages of a round; return message id -> its clients."""
        model = None
        if self.shared_memory:
            model = self.shared_memory.publish(work.round, work.weights)
            if self.model_store:
                self.model_store.publish(work.round, model)
        parts = work.shares(self._busy_nodes)
        place = {client: place for place, client in enumerate(work.longest_first)}
        waiting = {}
        for node, group in self._groups(list(work.costs), parts).items():
            order = sorted(group, key=place.__getitem__)
            content = self._content(work, order, model)
            # After the deadline and twice the grace nobody waits for a reply any more.
            seconds = self.config.round_timeout + 2 * self._grace
            waiting[self.messages.push(node, "train", content, seconds)] = order
        waiting.pop("", None)
        return waiting

    def _content(self, work: RoundDispatch, order: list[int], model: Path | None) -> RecordDict:
        arrays, index = pack_blobs({c: work.encode(c, model is not None) for c in order})
        dispatch = {
            "round": work.round,
            "index": index,
            "seconds": self.config.round_timeout,
            "client-seconds": self.config.client_timeout,
            "model": model and str(model),
            "model-store": self.model_store and self.model_store.name,
        }
        record = ConfigRecord({"json": write_json(dispatch)})
        return RecordDict({"assignments": arrays, "dispatch": record})

    def _arrived(
        self, work: RoundDispatch, waiting: dict[str, list[int]]
    ) -> Iterator[tuple[int, Reply]]:
        """Yield the replies that have arrived by now, in shared memory and in messages."""
        if self.shared_memory:
            yield from self.shared_memory.arrived(work.round)
        for message, reply in self.messages.pull(list(waiting)):
            sent = waiting.pop(message)
            if self.shared_memory:  # all that the node wrote is there now
                yield from self.shared_memory.arrived(work.round)
            if isinstance(reply, ClientFailure):
                yield from ((client, reply) for client in sent)
            else:
                yield from results_of(reply, sent)
