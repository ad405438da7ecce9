"""Flower's ServerApp: drives the pure round over Flower's messages.

Flower's own ``Strategy.start`` collects every reply before it aggregates and wants equal keys in
all of them; head-wise replies differ and are folded in as they arrive, so messages are pushed and
pulled here.

In a simulation every worker can serve every client. A round is one message for each worker
process, with clients of about the same predicted cost; the model goes to workers and replies come
back through memory (:mod:`d2ft_fl.exchange`), and messages carry what is left. On real devices, and
where ``transport`` says so, messages carry everything.
"""

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from d2ft_fl import display, loop
from d2ft_fl.budgets import Budget
from d2ft_fl.client_app import pack_blob, simulated, unpack_blob
from d2ft_fl.config import RunConfig
from d2ft_fl.errors import ConfigError, D2FTError, RunError
from d2ft_fl.exchange import Exchange
from d2ft_fl.federation import Report
from d2ft_fl.recorder import claim_folder, note_failure, read_status
from d2ft_fl.shelf import Shelf, machines
from d2ft_fl.work import Fault, Work

log = logging.getLogger(__name__)
app = ServerApp()
POLL_SECONDS = 0.02  # in memory
NODES_POLL_SECONDS = 0.2  # over a network
NODES_TIMEOUT = 120.0
GRACE_SECONDS = 5.0  # for what nodes end at the deadline to be heard of
WORKER_LOST = ("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError")

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
MOST_EXAMPLES = 10**9  # of a client

Reply = bytes | Path | Fault


class FlowerPool:
    """The clients of a federation behind Flower's grid."""

    def __init__(self, grid: Grid, config: RunConfig):
        self.grid, self.config = grid, config
        self.nodes: dict[int, range] = {}  # Flower's node id -> the clients that it serves
        self.refused: dict[int, str] = {}  # nodes that cannot serve any, and why
        self.joined: dict[int, int] = {}  # node -> how many had come before it did, last
        self.workers = 0  # of a simulation; 0 on real devices
        self.exchange: Exchange | None = None
        self.shelf: Shelf | None = None

    def close(self) -> None:
        """Delete what was shared."""
        if self.exchange:
            self.exchange.close()

    # -- who is there ------------------------------------------------------------------------

    def clients(self, round: int) -> dict[int, int]:
        """Those whose SuperNodes are there; waits for all of them before the first round.

        Returns:
            Client -> a number that is another one when its SuperNode was gone in between.

        Raises:
            RunError: When fewer are there after a while than are needed.
        """
        deadline = time.monotonic() + min(NODES_TIMEOUT, self.config.round_timeout)
        wanted = self.config.clients if round == 1 else max(1, self.config.min_replies)
        while True:
            self._meet()
            found = {c: self.joined[node] for node, own in self.nodes.items() for c in own}
            if len(found) >= wanted:
                return found
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if len(found) < max(1, self.config.min_replies):
            why = next((f"; one says: {reason}" for reason in self.refused.values()), "")
            raise RunError(
                f"SuperNodes of {len(found)} clients are there, after {NODES_TIMEOUT:.0f} s; "
                f"min-replies = {self.config.min_replies}{why}"
            )
        return found

    def _meet(self) -> None:
        """Ask nodes that are new which clients they serve, and forget those that are gone."""
        there = set(self.grid.get_node_ids())
        self.nodes = {node: own for node, own in self.nodes.items() if node in there}
        self.refused = {node: why for node, why in self.refused.items() if node in there}
        fresh = there - self.nodes.keys() - self.refused.keys()
        answers, _ = self._query({node: {"clients": None} for node in fresh})
        for node, answer in answers.items():
            try:
                if "error" in answer:
                    raise ConfigError(str(answer["error"]))
                served = range(int(answer["node"]), self.config.clients, int(answer["nodes"]))
                if served.step < 1 or served.start < 0:
                    raise ValueError(f"node {answer['node']} of {answer['nodes']}")
            except (ConfigError, *MALFORMED) as error:
                self.refused[node] = str(error)
                log.warning("SuperNode %s is left out: %s", node, error)
                continue
            self.nodes[node] = served
            self.joined[node] = max(self.joined.values(), default=0) + 1
            if simulated() and answer["cpus"] is not None:
                self._share(answer["cpus"])

    def _share(self, cpus: float) -> None:
        """Find out how many workers a simulation has, and share memory with them if that is asked.

        Args:
            cpus: What each is given.
        """
        import ray

        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1.0) / max(cpus, 1e-3)))
        if self.config.transport == "shared" and self.exchange is None:
            self.exchange = Exchange.create()
            if machines() > 1:
                self.shelf = Shelf(f"d2ft-{uuid4().hex}")

    def _query(
        self, questions: Mapping[int, Mapping[str, Any]]
    ) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """Ask nodes; returns answers, and reasons of those who have none.

        Raises:
            RunError: When a worker of the simulation is lost.
        """
        messages = [
            Message(
                RecordDict({"query": ConfigRecord({"json": json.dumps(questions[node])})}),
                dst_node_id=node,
                message_type="query",
                ttl=self._ttl,
            )
            for node in sorted(questions)
        ]
        answers: dict[int, dict[str, Any]] = {}
        silent = dict.fromkeys(questions, "its SuperNode does not answer")
        for reply in self.grid.send_and_receive(messages, timeout=self.config.round_timeout):
            node = reply.metadata.src_node_id
            if node not in silent:  # that a node is gone, Flower says in its own name
                continue
            if reply.has_error():
                silent[node] = self._reason(reply)
                continue
            try:
                answer = json.loads(str(reply.content.config_records["answer"]["json"]))
                answers[node] = dict(answer)
            except MALFORMED as error:
                silent[node] = f"its SuperNode's answer is malformed: {error}"
                continue
            del silent[node]
        return answers, silent

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

    def reports(self, round: int, clients: Sequence[int]) -> tuple[list[Report], dict[int, Fault]]:
        """What clients say of themselves.

        Raises:
            ConfigError: With what a simulated client finds wrong with the configuration. A real one
                may be the only one that does, and is left out.
        """
        groups = self._groups(clients, [list(part) for part in self._split(clients)])
        questions = {node: {"round": round, "clients": own} for node, own in groups.items()}
        answers, reasons = self._query(questions)
        silent = {c: Fault(reasons[node]) for node in reasons for c in groups[node]}
        found = []
        for node, answer in answers.items():
            if "error" in answer:
                if self.workers:
                    raise ConfigError(answer["error"])
                silent |= {c: Fault(answer["error"]) for c in groups[node]}
                continue
            try:
                found += _reports(answer, groups[node])
            except (ConfigError, *MALFORMED) as error:
                reason = f"its SuperNode's report is malformed: {error}"
                silent |= {c: Fault(reason) for c in groups[node]}
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

    def train(self, work: Work) -> Iterator[tuple[int, Reply]]:
        """Send everything, and hand on replies as they arrive, until the deadline."""
        deadline = time.monotonic() + self.config.round_timeout
        with work.clock.of("broadcast"):
            waiting = self._send(work)
        missing = set(work.costs)
        while waiting and time.monotonic() < deadline + GRACE_SECONDS:
            for client, reply in self._arrived(work, waiting):
                missing.discard(client)
                yield client, reply
            time.sleep(POLL_SECONDS if self.workers else NODES_POLL_SECONDS)
        late = "no answer before the round's deadline" if waiting else "its SuperNode said nothing"
        yield from ((client, Fault(late)) for client in sorted(missing))

    def _send(self, work: Work) -> dict[str, list[int]]:
        """Push a round's messages: message -> its clients."""
        model = None
        if self.exchange:
            model = self.exchange.publish(work.round, work.weights)
            if self.shelf:
                self.shelf.publish(work.round, model)
        parts = work.shares(max(1, min(self.workers, len(self.nodes))))
        place = {client: place for place, client in enumerate(work.longest_first)}
        waiting = {}
        for node, own in self._groups(list(work.costs), parts).items():
            order = sorted(own, key=place.__getitem__)
            message = self._message(work, node, order, model)
            if pushed := list(self.grid.push_messages([message])):
                waiting[pushed[0]] = order
        return waiting

    def _message(self, work: Work, node: int, order: list[int], model: Path | None) -> Message:
        how = {
            "round": work.round,
            "order": order,
            "seconds": self.config.round_timeout,
            "client-seconds": self.config.client_timeout,
            "model": model and str(model),
            "shelf": self.shelf and self.shelf.name,
        }
        blobs = {str(c): pack_blob(work.encode(c, model is not None)) for c in order}
        content = RecordDict(
            {"assignments": ArrayRecord(blobs), "how": ConfigRecord({"json": json.dumps(how)})}
        )
        return Message(content, dst_node_id=node, message_type="train", ttl=self._ttl)

    @property
    def _ttl(self) -> float:
        """Seconds after which nobody waits for a message's reply any more."""
        return self.config.round_timeout + 2 * GRACE_SECONDS

    def _arrived(self, work: Work, waiting: dict[str, list[int]]) -> Iterator[tuple[int, Reply]]:
        """What has arrived by now, in memory and in messages."""
        if self.exchange:
            yield from self.exchange.arrived(work.round)
        for reply in self.grid.pull_messages(list(waiting)):
            own = waiting.pop(reply.metadata.reply_to_message_id, [])
            if self.exchange:  # all that the node wrote is there now
                yield from self.exchange.arrived(work.round)
            if reply.has_error():
                reason = self._reason(reply)
                yield from ((client, Fault(reason)) for client in own)
                continue
            yield from _results(reply, own)


def _reports(answer: Mapping[str, Any], own: Sequence[int]) -> list[Report]:
    """What a node says of its clients, once it can be true."""
    found = []
    for client, examples, budget in answer["reports"]:
        if type(examples) is not int or not 0 < examples <= MOST_EXAMPLES:
            raise ValueError(f"client {client} has {examples!r} examples")
        if client in own:
            found.append(Report(client, examples, Budget.from_mapping(budget, f"client {client}")))
    return found


def _results(reply: Message, own: Sequence[int]) -> Iterator[tuple[int, Reply]]:
    """What a node's own clients answered, and what it says of those who did not.

    What it says of others nobody heeds.
    """
    try:
        records = reply.content
        results = records.array_records.get("results", ArrayRecord())
        said = records.config_records.get("faults", ConfigRecord())
        faults = dict(json.loads(str(said.get("json", "{}"))))
        if others := (results.keys() | faults.keys()) - {str(client) for client in own}:
            log.warning("a SuperNode answers for %s, which is not its own", sorted(others)[0])
    except MALFORMED as error:
        yield from ((c, Fault(f"its SuperNode's answer is malformed: {error}")) for c in own)
        return
    for client in own:
        if (array := results.get(str(client))) is not None:
            try:
                yield client, unpack_blob(array)
            except MALFORMED as error:
                yield client, Fault(f"its answer cannot be read: {error}")
        if (reason := faults.get(str(client))) is not None:
            yield client, Fault(str(reason))


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured federation; its lines and tables go to the log."""
    folder: Path | None = None
    try:
        config = RunConfig.from_mapping(context.run_config).check()
        folder = claim_folder(config)
        display.say(f"run folder: {folder}")
        display.header(config)
        filled = RunConfig(**{**vars(config), "run_folder": str(folder)})
        with contextlib.closing(FlowerPool(grid, filled)) as pool:
            summary = loop.run(filled, pool, display.round_line)
        display.summary(summary)
    except BaseException as error:
        known = isinstance(error, D2FTError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        named = str(context.run_config.get("run-folder", ""))
        if folder or named:
            _note(folder, named, reason)
        if known:
            _last_word(f"d2ft: {error}")
        raise  # so that Flower calls the run failed


def _note(folder: Path | None, named: str, reason: str) -> None:
    """Say in the run's folder why it failed; where it could not be claimed, to who waits for it."""
    if folder or read_status(Path(named)).get("status") == "starting":
        note_failure(folder or Path(named), reason)


def _last_word(line: str) -> None:
    """Say one line and keep Flower from burying it under tracebacks in this ending process."""
    logging.getLogger("flwr").addFilter(lambda record: False)
    warnings.simplefilter("ignore")
    display.say(line)
