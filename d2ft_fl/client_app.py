"""Flower's ClientApp: carries blobs between Flower and the processes that do the work.

A SuperNode serves the clients p = k (mod N), where k and N are the ``partition-id`` and
``num-partitions`` of its node configuration; in a simulation, where every process could serve all
clients, those that it is sent. What else stands there of :data:`OWN` is the node's own and comes
before the run's: its data, how they are shared out, its budgets.

Work is done in child processes (:mod:`d2ft_fl.crew`), which live from message to message as long as
this process does: one for each of a simulated SuperNode's CPUs, one on a real device.
"""

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from d2ft_fl import shelf
from d2ft_fl.crew import Crew, Job
from d2ft_fl.errors import ConfigError, D2FTError, RunError
from d2ft_fl.exchange import Exchange
from d2ft_fl.work import Fault

app = ClientApp()
ASK_SECONDS = 600.0
# Options of a run that a node may set for itself, in its node configuration.
OWN = (
    "dataset",
    "label-column",
    "partitioner",
    "partitioner-args",
    "train-examples",
    "budgets",
    "device",
    "threads-per-client",
)
BLOB = "d2ft.blob"  # in place of the name of a way to serialise arrays
PLACE = ("partition-id", "num-partitions")


def simulated() -> bool:
    """Whether this process belongs to Flower's simulation engine."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _cpus() -> float:
    """What the simulation sets aside for this process."""
    import ray

    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0))


@lru_cache(maxsize=1)
def _crew(options: str) -> Crew:
    """The children of this process, under one configuration."""
    entries = json.loads(options)
    size = max(1, int(_cpus() / entries["threads-per-client"])) if simulated() else 1
    return Crew(entries, size)


def _crew_of(context: Context) -> Crew:
    own = {key: context.node_config[key] for key in OWN if key in context.node_config}
    return _crew(json.dumps({**context.run_config, **own}, sort_keys=True))


def _place(context: Context) -> tuple[int, int]:
    """The number of this node, and of how many.

    Raises:
        ConfigError: When its configuration says nothing of it, or what cannot be.
    """
    found = context.node_config
    if unknown := sorted(found.keys() - {*OWN, *PLACE}):
        allowed = ", ".join((*PLACE, *OWN))
        raise ConfigError(f"node-config: {unknown[0]!r} is unknown; allowed are {allowed}")
    node, nodes = (found.get(key) for key in PLACE)
    if type(node) is not int or type(nodes) is not int or not 0 <= node < nodes:
        raise ConfigError(
            f"node-config has partition-id = {node!r} and num-partitions = {nodes!r}: of N nodes, "
            "the k-th has partition-id=k, counted from 0, and num-partitions=N"
        )
    return node, nodes


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which clients this node serves; or, of some, what they say of themselves."""
    asked = json.loads(str(message.content.config_records["query"]["json"]))
    answer: dict[str, object] = {}
    try:
        node, nodes = _place(context)
        if asked["clients"] is None:
            answer = {"node": node, "nodes": nodes, "cpus": _cpus() if simulated() else None}
        else:
            answer["reports"] = _crew_of(context).reports(
                asked["clients"], asked["round"], ASK_SECONDS
            )
    except RunError as error:  # not of the configuration: others may answer
        answer["failed"] = str(error)
    except D2FTError as error:
        answer["error"] = str(error)
    content = RecordDict({"answer": ConfigRecord({"json": json.dumps(answer)})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Carry out the assignments of a message; in the order that it says, several at once."""
    how = json.loads(str(message.content.config_records["how"]["json"]))
    assignments = message.content.array_records["assignments"]
    model, exchange = _model(how)
    jobs = [
        Job(
            client,
            unpack_blob(assignments[str(client)]),
            str(model) if model else None,
            str(exchange.reply_path(how["round"], client)) if exchange else None,
        )
        for client in how["order"]
    ]
    results = ArrayRecord()
    faults: dict[str, str] = {}
    for client, reply in _crew_of(context).work(jobs, how["seconds"], how["client-seconds"]):
        if isinstance(reply, Fault):
            faults[str(client)] = reply.reason
        elif reply:
            results[str(client)] = pack_blob(reply)
    said = ConfigRecord({"json": json.dumps(faults)})
    return Message(RecordDict({"results": results, "faults": said}), reply_to=message)


def _model(how: dict[str, Any]) -> tuple[Path | None, Exchange | None]:
    """Where the round's model is, if it did not come with messages, and where replies go then.

    On another machine of a Ray cluster, each of its processes fetches it once a round.
    """
    if how["model"] is None:
        return None, None
    model = Path(how["model"])
    if model.exists():
        return model, Exchange(model.parent)
    return shelf.fetch(how["shelf"], how["round"]), None


def pack_blob(blob: bytes) -> Array:
    """A blob as Flower carries it: the data of an array, which nothing but this reads."""
    return Array(dtype="uint8", shape=(len(blob),), stype=BLOB, data=blob)


def unpack_blob(array: Array) -> bytes:
    """The blob of :func:`pack_blob`.

    Raises:
        ValueError: When it is none.
    """
    if array.stype != BLOB or type(array.data) is not bytes:
        raise ValueError(f"an array of {array.stype!r}, not {BLOB!r}")
    return array.data
