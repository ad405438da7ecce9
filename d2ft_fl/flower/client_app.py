"""Flower's ClientApp: carries blobs between Flower and the processes that do the work.

A SuperNode serves the clients p = k (mod N), where k and N are the ``partition-id`` and
``num-partitions`` of its node configuration; in a simulation, where every process could serve all
clients, those that it is sent. Options of :data:`NODE_OPTIONS` in it take the place of the run's:
the node's data, how they are shared out, its budgets.

Clients train in worker processes (:mod:`d2ft_fl.runtime.worker_pool`), which live from message to
message as long as this process does: one for each of a simulated SuperNode's CPUs, one on a real
device.
"""

import json
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from d2ft_fl.errors import ConfigError, D2FTError, RunError
from d2ft_fl.flower.records import pack_blobs, unpack_blobs
from d2ft_fl.runtime import ray_model_store
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.runtime.worker_pool import Job, WorkerPool
from d2ft_fl.server.dispatch import ClientFailure
from d2ft_fl.util.spelling import meant
from d2ft_fl.util.strict_json import write_json

app = ClientApp()
ASK_SECONDS = 600.0
# Options of a run that a node may set for itself, in its node configuration.
NODE_OPTIONS = (
    "dataset",
    "label-column",
    "image-column",
    "test-split",
    "bad-examples",
    "partitioner",
    "partitioner-args",
    "train-examples",
    "budgets",
    "device",
    "threads-per-client",
)
PLACE = ("partition-id", "num-partitions")


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
def _worker_pool(options: str) -> WorkerPool:
    """Return the worker processes of this process, under one configuration."""
    entries = json.loads(options)
    size = max(1, int(_cpus() / entries["threads-per-client"])) if simulated() else 1
    return WorkerPool(entries, size)


def _worker_pool_of(context: Context) -> WorkerPool:
    node_options = {k: context.node_config[k] for k in NODE_OPTIONS if k in context.node_config}
    return _worker_pool(write_json({**context.run_config, **node_options}, sort_keys=True))


def _round_clients(context: Context) -> int:
    """Return how many clients take part in a round."""
    config = context.run_config
    return int(config["sample-clients"]) or int(config["clients"])


def _place(context: Context) -> tuple[int, int]:
    """Return the number of this node, counted from 0, and how many nodes there are.

    Raises:
        ConfigError: When the node's configuration does not say it, or says what cannot be.
    """
    node_config = context.node_config
    if unknown := sorted(node_config.keys() - {*NODE_OPTIONS, *PLACE}):
        allowed = *PLACE, *NODE_OPTIONS
        raise ConfigError(
            f"node-config: {unknown[0]!r} is unknown{meant(unknown[0], allowed)}; allowed are "
            f"{', '.join(allowed)}"
        )
    node, nodes = (node_config.get(key) for key in PLACE)
    if type(node) is not int or type(nodes) is not int or not 0 <= node < nodes:
        raise ConfigError(
            f"node-config has partition-id = {node!r} and num-partitions = {nodes!r}: of N nodes, "
            "the k-th has partition-id=k, counted from 0, and num-partitions=N"
        )
    return node, nodes


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer which clients this node serves, or with the reports of some of them."""
    asked = json.loads(str(message.content.config_records["query"]["json"]))
    answer: dict[str, object] = {}
    try:
        node, nodes = _place(context)
        if asked["clients"] is None:
            if simulated():
                with suppress(Exception):  # that there are none is said when they are needed
                    _worker_pool_of(context).start(_round_clients(context))
            answer = {"node": node, "nodes": nodes, "cpus": _cpus() if simulated() else None}
        else:
            answer["reports"] = _worker_pool_of(context).reports(
                asked["clients"], asked["round"], ASK_SECONDS, asked["classes"]
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
    dispatch = json.loads(str(message.content.config_records["dispatch"]["json"]))
    model, shared_memory = _model(dispatch)
    jobs = [
        Job(
            client,
            blob,
            str(model) if model else None,
            str(shared_memory.reply_path(dispatch["round"], client)) if shared_memory else None,
        )
        for client, blob in unpack_blobs(
            message.content.array_records["assignments"], dispatch["index"]
        )
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
