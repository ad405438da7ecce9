"""Flower's ClientApp: carries blobs between Flower and the processes that do the work.

A SuperNode serves the clients p = k (mod N), where k and N are the ``partition-id`` and
``num-partitions`` of its node configuration; in a simulation, where every process could serve all
clients, those that it is sent. What else a node decides for itself says :mod:`.node_terms`. A
message is used only after it was checked: the server may be another than it should be.

Clients train in worker processes (:mod:`d2ft_fl.runtime.worker_pool`), which live from message to
message as long as this process does: one for each of a simulated SuperNode's CPUs, one on a real
device.
"""

import json
import re
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from d2ft_fl.errors import D2FTError, Refusal, RunError
from d2ft_fl.flower import node_terms
from d2ft_fl.flower.node_terms import NodeTerms
from d2ft_fl.flower.records import pack_blobs, unpack_blobs
from d2ft_fl.runtime import ray_model_store
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.runtime.worker_pool import Job, WorkerPool
from d2ft_fl.server.dispatch import ClientFailure
from d2ft_fl.util.strict_json import read_json, whole, write_json

app = ClientApp()
ASK_SECONDS = 600.0
MOST_SECONDS, MOST_ROUNDS = 1e9, 10**9
# Letters of a question or of what comes with assignments: so many, and for each client of the run.
ASKED_LETTERS, CLIENT_LETTERS = 1 << 14, 64


def simulated() -> bool:
    """Return whether this process belongs to Flower's simulation engine."""
    # Flower imports it beside a running ServerApp: it may be there and not have that yet.
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
    return is_initialized is not None and is_initialized()


def _cpus() -> float:
    """Return the CPUs that the simulation sets aside for this process."""
    import ray

    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0))


@lru_cache(maxsize=1)
def _worker_pool(options: str, owns_budget: bool) -> WorkerPool:
    """Return the worker processes of this process, under one configuration."""
    entries = json.loads(options)
    size = max(1, int(_cpus() / entries["threads-per-client"])) if simulated() else 1
    return WorkerPool(entries, size, owns_budget, on_device=not simulated())


def _worker_pool_of(context: Context) -> WorkerPool:
    terms = NodeTerms.of(context.run_config, context.node_config, simulated())
    return _worker_pool(write_json(terms.options, sort_keys=True), terms.owns_budget)


def _round_clients(context: Context) -> int:
    """Return how many clients take part in a round."""
    config = context.run_config
    return int(config["sample-clients"]) or int(config["clients"])


def _told(message: Message, record: str, context: Context) -> dict[str, Any]:
    """Return what a message of the server says, as JSON.

    Raises:
        ReplyError: When that is longer than it can be, or no JSON.
    """
    clients = int(context.run_config["clients"])
    text = str(message.content.config_records[record]["json"])
    return read_json(text, ASKED_LETTERS + CLIENT_LETTERS * clients)


def _classes(asked: dict[str, Any]) -> str:
    """Return the digest of the run's classes that a question names; empty for none.

    Raises:
        Refusal: When it is no such digest.
    """
    digest = asked.get("classes", "")
    if not isinstance(digest, str) or not re.fullmatch(r"([0-9a-f]{16})?", digest):
        raise Refusal("the message's classes are no digest")
    return digest


def _check_clients(clients: Any, context: Context) -> None:
    """Refuse a question, or work, for clients that this node does not serve.

    In a simulation every node serves those that it is sent.

    Raises:
        Refusal: Naming the first of them.
    """
    node, nodes = node_terms.place(context.node_config)
    if not isinstance(clients, list):
        raise Refusal("the message names no clients")
    for client in clients:
        served = type(client) is int and 0 <= client < int(context.run_config["clients"])
        if not served or not (simulated() or client % nodes == node):
            raise Refusal(f"node {node} of {nodes} does not serve client {str(client)[:20]}")


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer which clients this node serves, or with the reports of some of them."""
    answer: dict[str, object] = {}
    try:
        asked = _told(message, "query", context)
        node, nodes = node_terms.place(context.node_config)
        NodeTerms.of(context.run_config, context.node_config, simulated())
        if asked.get("clients") is None:
            if simulated():
                with suppress(Exception):  # that there are none is said when they are needed
                    _worker_pool_of(context).start(_round_clients(context))
            answer = {"node": node, "nodes": nodes, "cpus": _cpus() if simulated() else None}
        else:
            _check_clients(asked["clients"], context)
            number = whole(asked.get("round"), "round", 1, MOST_ROUNDS)
            answer["reports"] = _worker_pool_of(context).reports(
                asked["clients"], number, ASK_SECONDS, _classes(asked)
            )
    except RunError as error:  # not of the configuration: others may answer
        answer["failed"] = str(error)
    except D2FTError as error:
        answer["error"] = str(error)
    content = RecordDict({"answer": ConfigRecord({"json": write_json(answer)})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Carry out the assignments of a message in its order, several at once."""
    dispatch = _checked(_told(message, "dispatch", context))
    model, shared_memory = _model(dispatch)
    blobs = dict(unpack_blobs(message.content.array_records["assignments"], dispatch["index"]))
    _check_clients(list(blobs), context)
    jobs = [
        Job(
            dispatch["round"],
            client,
            blob,
            str(model) if model else None,
            str(shared_memory.reply_path(dispatch["round"], client)) if shared_memory else None,
        )
        for client, blob in blobs.items()
    ]
    results: dict[int, bytes] = {}
    failures: dict[str, str] = {}
    pool = _worker_pool_of(context)
    for client, reply in pool.work(jobs, dispatch["seconds"], dispatch["client-seconds"]):
        if isinstance(reply, ClientFailure):
            failures[str(client)] = reply.reason
        elif reply:
            results[client] = reply
    arrays, index = pack_blobs(results)
    outcome = ConfigRecord({"json": write_json({"index": index, "failures": failures})})
    return Message(RecordDict({"results": arrays, "outcome": outcome}), reply_to=message)


def _checked(dispatch: dict[str, Any]) -> dict[str, Any]:
    """Return what comes with assignments, once it is what :mod:`.grid_pool` sends.

    Raises:
        Refusal: When it is not, or says that a real device shares memory with the server.
    """
    whole(dispatch.get("round"), "round", 1, MOST_ROUNDS)
    for name in ("seconds", "client-seconds"):
        seconds: Any = dispatch.get(name)
        if type(seconds) not in (int, float) or not 0 <= seconds <= MOST_SECONDS:
            raise Refusal(f"the message has no {name} from 0 to {MOST_SECONDS:g}")
    for name in ("model", "model-store"):
        path = dispatch.setdefault(name, None)
        if path is not None and not (simulated() and isinstance(path, str)):
            raise Refusal(f"the message has {name}, which only a simulation shares")
    return dispatch


def _model(dispatch: dict[str, Any]) -> tuple[Path | None, SharedMemory | None]:
    """Return where the round's model is, and where replies go; None for what messages carry.

    On another machine of a Ray cluster, each process fetches the model once a round.
    """
    if dispatch["model"] is None:
        return None, None
    model = Path(dispatch["model"])
    if model.exists():
        return model, SharedMemory(model.parent)
    return ray_model_store.fetch(dispatch["model-store"], dispatch["round"]), None
