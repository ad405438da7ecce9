"""The clients of a federation behind Flower's grid: the ServerApp's end of every message.

Flower's own ``Strategy.start`` collects every reply before it aggregates and wants equal keys in
all of them; head-wise replies differ and are folded in as they arrive, so messages are pushed and
pulled here.

In a simulation every worker can serve every client. A round is one message for each worker
process, with clients of about the same predicted cost; the model goes to workers and replies come
back through memory (:mod:`d2ft_fl.runtime.shared_memory`), and messages carry what is left. On real
devices, and where ``transport`` says so, messages carry everything.
"""

import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, D2FTError, RunError
from d2ft_fl.flower.client_app import simulated
from d2ft_fl.flower.records import pack_blobs, unpack_blobs
from d2ft_fl.rounds.federation import Report
from d2ft_fl.runtime.ray_model_store import ModelStore, machines
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.server.dispatch import ClientFailure, RoundDispatch

log = logging.getLogger(__name__)
POLL_SECONDS = 0.02  # in memory
NODES_POLL_SECONDS = 0.2  # over a network
NODES_TIMEOUT = 120.0
PLACE_SECONDS = 60.0  # for a node to say which clients it serves
GRACE_SECONDS = 5.0  # for what workers end at the deadline to be heard of
NODES_GRACE_SECONDS = 30.0  # where messages are fetched every few seconds, and take a while
WORKER_LOST = ("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError")
MOST_EXAMPLES = 10**7  # of a client

Reply = bytes | memoryview | ClientFailure


class FlowerPool:
    """The clients of a federation behind Flower's grid.

    Nodes are strangers: whatever one says, and however it fails, costs its own clients' answers.
    """

    def __init__(self, grid: Grid, config: RunConfig):
        self.grid, self.config = grid, config
        self.nodes: dict[int, range] = {}  # Flower's node id -> the clients that it serves
        self.joined: dict[int, int] = {}  # node -> how many had come before it did, last
        self.refused: dict[int, tuple[str, float]] = {}  # node -> why it cannot, and until when
        self._places: dict[int, range] = {}  # of those that said so
        self.waiting: set[int] = set()  # for another, which serves clients of theirs, to go
        self._asked: dict[str, tuple[int, float]] = {}  # message -> the node, and until when
        self.workers = 0  # of a simulation; 0 on real devices
        self.shared_memory: SharedMemory | None = None
        self.model_store: ModelStore | None = None

    def close(self) -> None:
        """Delete what was shared."""
        if self.shared_memory:
            self.shared_memory.close()

    # -- who is there ------------------------------------------------------------------------

    def clients(self, round_number: int) -> dict[int, int]:
        """Those whose SuperNodes are there; waits for all of them when it is called first.

        Returns:
            Client -> a number that is another one when its SuperNode was gone in between.

        Raises:
            RunError: When fewer are there after a while than are needed; of a simulation's, which
                are no strangers, all of them are. Or when one of these fails.
        """
        started, first = time.monotonic(), not self.joined
        wanted = self.config.clients if first else max(1, self.config.min_replies)
        while True:
            self._meet()
            found = {c: self.joined[node] for node, own in self.nodes.items() for c in own}
            if len(found) >= wanted:
                return found
            seconds = self._patience
            if not simulated():  # to start is no part of a round
                seconds = NODES_TIMEOUT if first else min(NODES_TIMEOUT, seconds)
            if time.monotonic() > started + seconds:
                break
            time.sleep(NODES_POLL_SECONDS)
        if simulated():
            raise RunError(
                f"the simulation's SuperNodes of {len(found)} of {wanted} clients answer, after "
                f"{seconds:.0f} s"
            )
        if len(found) < max(1, self.config.min_replies):
            why = next((f"; one says: {reason}" for reason, _ in self.refused.values()), "")
            raise RunError(
                f"SuperNodes of {len(found)} clients are there, after {seconds:.0f} s; "
                f"min-replies = {self.config.min_replies}{why}"
            )
        return found

    @property
    def _patience(self) -> float:
        """For how many seconds nodes are asked; those of a simulation may be starting still."""
        own = self.config.round_timeout
        return max(NODES_TIMEOUT, own) if simulated() else own

    def _meet(self) -> None:
        """Ask nodes that are new which clients they serve, and forget those that are gone."""
        there, now = set(self.grid.get_node_ids()), time.monotonic()
        self._places = {node: own for node, own in self._places.items() if node in there}
        self.refused = {n: r for n, r in self.refused.items() if n in there and r[1] > now}
        for own, reply in self._pulled(self._asked):
            self._place(self._asked.pop(own)[0], _answer(reply))
        self._asked = {
            own: (node, until)
            for own, (node, until) in self._asked.items()
            if node in there and until > now
        }
        known = self._places.keys() | self.refused.keys() | {n for n, _ in self._asked.values()}
        for node in sorted(there - known):
            # Good for longer than it is waited for: then it is asked anew, and nothing has failed.
            if own := self._ask(node, {"clients": None}, 2 * PLACE_SECONDS):
                self._asked[own] = node, now + PLACE_SECONDS
        self._serve()

    def _place(self, node: int, answer: "dict[str, Any] | ClientFailure") -> None:
        """Note which clients a node says it serves, or why it cannot."""
        try:
            if isinstance(answer, ClientFailure):
                raise RunError(answer.reason)
            if "error" in answer:
                raise ConfigError(str(answer["error"]))
            served = range(int(answer["node"]), self.config.clients, int(answer["nodes"]))
            if served.step < 1 or served.start < 0:
                raise ValueError(f"node {answer['node']} of {answer['nodes']}")
            cpus = answer["cpus"]
        except Exception as error:
            if simulated():
                raise error if isinstance(error, D2FTError) else RunError(str(error)) from error
            again = time.monotonic() + PLACE_SECONDS if isinstance(error, RunError) else math.inf
            self.refused[node] = str(error), again
            log.warning("SuperNode %s is left out: %s", node, error)
            return
        self._places[node] = served
        if simulated() and cpus is not None:
            self._share(cpus)

    def _serve(self) -> None:
        """Have nodes serve the clients that they say, each client one node, whoever came first."""
        before, self.nodes = self.nodes, {}
        for node in sorted(self._places, key=lambda node: (node not in before, node)):
            own = self._places[node]
            if any(set(own) & set(others) for others in self.nodes.values()):
                if node not in self.waiting:
                    log.warning("SuperNode %s waits: another serves some of its clients", node)
                self.waiting.add(node)
                continue
            self.waiting.discard(node)
            self.nodes[node] = own
            if node not in before:
                self.joined[node] = max(self.joined.values(), default=0) + 1

    def _share(self, cpus: float) -> None:
        """Find out how many workers a simulation has.

        Args:
            cpus: What each is given.
        """
        import ray

        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1.0) / max(cpus, 1e-3)))

    # -- messages ----------------------------------------------------------------------------

    def _push(self, node: int, kind: str, content: RecordDict, seconds: float) -> str:
        """Send a node a message; returns its id, or nothing where Flower does not take it."""
        message = Message(content, dst_node_id=node, message_type=kind, ttl=seconds)
        return next(iter(self.grid.push_messages([message])), None) or ""

    def _ask(self, node: int, question: Mapping[str, Any], seconds: float) -> str:
        content = RecordDict({"query": ConfigRecord({"json": json.dumps(question)})})
        return self._push(node, "query", content, seconds)

    def _pulled(self, waiting: Collection[str]) -> Iterator[tuple[str, Message | ClientFailure]]:
        """Of messages that are waited for, what came back by now.

        Raises:
            RunError: When a worker of the simulation is lost.
        """
        # One that cannot be read takes those with it that are pulled together.
        parts = [list(waiting)] if self.workers and waiting else [[own] for own in waiting]
        for part in parts:
            try:
                replies = list(self.grid.pull_messages(part))
            except httpx.HTTPError:  # the SuperLink's
                raise
            except Exception as error:
                reason = f"its SuperNode's answer cannot be read: {type(error).__name__}: {error}"
                yield from ((own, ClientFailure(reason)) for own in part)
                continue
            for reply in replies:
                if (own := reply.metadata.reply_to_message_id) in part:
                    failed = ClientFailure(self._reason(reply)) if reply.has_error() else None
                    yield own, failed or reply

    @property
    def _poll_seconds(self) -> float:
        return POLL_SECONDS if self.workers else NODES_POLL_SECONDS

    def _query(
        self, questions: Mapping[int, Mapping[str, Any]], seconds: float
    ) -> Iterator[tuple[int, "dict[str, Any] | ClientFailure"]]:
        """Ask nodes; yields what each answers, or why it does not."""
        deadline = time.monotonic() + seconds
        waiting = {self._ask(node, questions[node], seconds): node for node in sorted(questions)}
        waiting.pop("", None)
        silent = set(questions)
        while waiting and time.monotonic() < deadline:
            for own, reply in self._pulled(list(waiting)):
                node = waiting.pop(own)
                silent.discard(node)
                yield node, _answer(reply)
            if waiting:
                time.sleep(self._poll_seconds)
        yield from (
            (node, ClientFailure("its SuperNode does not answer")) for node in sorted(silent)
        )

    def _reason(self, reply: Message) -> str:
        """Why a node failed.

        Raises:
            RunError: When it is a worker of the simulation that is lost: it goes back into Flower's
                pool, and fails every message that it draws.
        """
        reason = (reply.error.reason or "").strip() or f"error {reply.error.code}"
        if self.workers and any(name in reason for name in WORKER_LOST):
            raise RunError("a worker process of Flower's simulation died; the run can be resumed")
        return f"its SuperNode failed: {reason}"

    # -- what clients say --------------------------------------------------------------------

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], dict[int, ClientFailure]]:
        """What clients say of themselves.

        Raises:
            ConfigError: With what a simulated client finds wrong with the configuration. A real one
                may be the only one that does, and is left out.
        """
        groups = self._groups(clients, [list(part) for part in self._split(clients)])
        questions = {node: {"round": round_number, "clients": own} for node, own in groups.items()}
        found: list[Report] = []
        silent: dict[int, ClientFailure] = {}
        for node, answer in self._query(questions, self._patience):
            own = groups[node]
            if isinstance(answer, ClientFailure):
                failure = answer
            elif "error" in answer and self.workers:
                raise ConfigError(str(answer["error"]))
            elif reason := answer.get("error") or answer.get("failed"):
                failure = ClientFailure(str(reason))
            else:
                try:
                    said = _reports(answer, own)
                except Exception as error:
                    failure = ClientFailure(f"its SuperNode's report is malformed: {error}")
                else:
                    found += said
                    own = sorted(set(own) - {report.client for report in said})
                    failure = ClientFailure("its SuperNode says nothing of it")
            silent |= dict.fromkeys(own, failure)
        return found, silent

    def _split(self, clients: Sequence[int]) -> list[Sequence[int]]:
        """Clients in as many parts as can be asked at once."""
        size = -(-len(clients) // max(1, min(self.workers, len(self.nodes))))
        return [clients[start : start + size] for start in range(0, len(clients), size)]

    def _groups(self, clients: Sequence[int], parts: Sequence[list[int]]) -> dict[int, list[int]]:
        """Nodes, and of the clients those that each is sent: ``parts``, where any can serve any."""
        if self.workers:
            return dict(zip(sorted(self.nodes), parts, strict=False))
        wanted = set(clients)
        groups = {n: [c for c in own if c in wanted] for n, own in sorted(self.nodes.items())}
        return {node: own for node, own in groups.items() if own}

    # -- a round -----------------------------------------------------------------------------

    def train(self, work: RoundDispatch) -> Iterator[tuple[int, Reply]]:
        """Send everything, and hand on replies as they arrive, until the deadline."""
        deadline = time.monotonic() + self.config.round_timeout + self._grace
        if self.workers and self.config.transport == "shared" and self.shared_memory is None:
            self.shared_memory = SharedMemory.create(work.model_bytes, self.workers)
            self.model_store = ModelStore(f"d2ft-{uuid4().hex}") if machines() > 1 else None
        with work.stopwatch.of("broadcast"):
            waiting = self._send(work)
        missing = set(work.costs)
        while waiting and time.monotonic() < deadline:
            for client, reply in self._arrived(work, waiting):
                missing.discard(client)
                yield client, reply
            time.sleep(self._poll_seconds)
        late = "no answer before the round's deadline" if waiting else "its SuperNode said nothing"
        yield from ((client, ClientFailure(late)) for client in sorted(missing))

    def _send(self, work: RoundDispatch) -> dict[str, list[int]]:
        """Push a round's messages: message -> its clients."""
        model = None
        if self.shared_memory:
            model = self.shared_memory.publish(work.round, work.weights)
            if self.model_store:
                self.model_store.publish(work.round, model)
        parts = work.shares(max(1, min(self.workers, len(self.nodes))))
        place = {client: place for place, client in enumerate(work.longest_first)}
        waiting = {}
        for node, own in self._groups(list(work.costs), parts).items():
            order = sorted(own, key=place.__getitem__)
            content = self._content(work, order, model)
            # After as much again nobody waits for a reply any more.
            seconds = self.config.round_timeout + 2 * self._grace
            waiting[self._push(node, "train", content, seconds)] = order
        waiting.pop("", None)
        return waiting

    def _content(self, work: RoundDispatch, order: list[int], model: Path | None) -> RecordDict:
        arrays, index = pack_blobs({c: work.encode(c, model is not None) for c in order})
        how = {
            "round": work.round,
            "index": index,
            "seconds": self.config.round_timeout,
            "client-seconds": self.config.client_timeout,
            "model": model and str(model),
            "shelf": self.model_store and self.model_store.name,
        }
        return RecordDict({"assignments": arrays, "how": ConfigRecord({"json": json.dumps(how)})})

    @property
    def _grace(self) -> float:
        return GRACE_SECONDS if self.workers else NODES_GRACE_SECONDS

    def _arrived(
        self, work: RoundDispatch, waiting: dict[str, list[int]]
    ) -> Iterator[tuple[int, Reply]]:
        """What has arrived by now, in memory and in messages."""
        if self.shared_memory:
            yield from self.shared_memory.arrived(work.round)
        for message, reply in self._pulled(list(waiting)):
            own = waiting.pop(message)
            if self.shared_memory:  # all that the node wrote is there now
                yield from self.shared_memory.arrived(work.round)
            if isinstance(reply, ClientFailure):
                yield from ((client, reply) for client in own)
            else:
                yield from _results(reply, own)


def _answer(reply: Message | ClientFailure) -> dict[str, Any] | ClientFailure:
    """What a node says to a question."""
    if isinstance(reply, ClientFailure):
        return reply
    try:
        return dict(json.loads(str(reply.content.config_records["answer"]["json"])))
    except Exception as error:
        return ClientFailure(f"its SuperNode's answer is malformed: {error}")


def _reports(answer: Mapping[str, Any], own: Sequence[int]) -> list[Report]:
    """What a node says of its clients, once it can be true."""
    found = []
    for client, examples, budget in answer["reports"]:
        if type(examples) is not int or not 0 < examples <= MOST_EXAMPLES:
            raise ValueError(f"client {client!r} has {examples!r} examples")
        if type(client) is int and client in own:
            found.append(Report(client, examples, Budget.from_mapping(budget, f"client {client}")))
    return found


def _results(reply: Message, own: Sequence[int]) -> Iterator[tuple[int, Reply]]:
    """What a node's own clients answered, and what it says of those who did not.

    What it says of others nobody heeds.
    """
    try:
        said = json.loads(str(reply.content.config_records["said"]["json"]))
        results = dict(unpack_blobs(reply.content.array_records["results"], said["index"]))
        failures = {int(client): str(reason) for client, reason in said["faults"].items()}
        if others := (results.keys() | failures.keys()) - set(own):
            log.warning("a SuperNode answers for %r, which is not its own", min(others))
    except Exception as error:
        yield from (
            (c, ClientFailure(f"its SuperNode's answer is malformed: {error}")) for c in own
        )
        return
    for client in own:
        if (blob := results.get(client)) is not None:
            yield client, blob
        if (reason := failures.get(client)) is not None:
            yield client, ClientFailure(reason)
