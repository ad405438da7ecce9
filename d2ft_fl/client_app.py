"""Flower's ClientApp: carries blobs between Flower and this process's worker.

A SuperNode serves the clients p = k (mod N), where k and N are the ``partition-id`` and
``num-partitions`` of its node configuration.
"""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from d2ft_fl.config import RunConfig
from d2ft_fl.errors import D2FTError
from d2ft_fl.meter import set_threads
from d2ft_fl.worker import Worker, worker

app = ClientApp()


def _worker(context: Context) -> Worker:
    config = RunConfig.from_mapping(context.run_config)
    set_threads(config.threads_per_client)  # Ray sets its own
    return worker(config)


@app.query()
def query(message: Message, context: Context) -> Message:
    """What the clients of this node say of themselves."""
    node, nodes = (
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
    )
    answer: dict[str, object] = {"node": node, "nodes": nodes}
    try:
        who = _worker(context)
        round = int(message.content.config_records["query"]["round"])  # type: ignore[arg-type]
        reports = [who.report(client, round) for client in range(node, who.config.clients, nodes)]
        answer["reports"] = [
            {"client": r.client, "examples": r.examples, "budget": r.budget.to_json()}
            for r in reports
        ]
    except D2FTError as error:
        answer["error"] = str(error)
    content = RecordDict({"answer": ConfigRecord({"json": json.dumps(answer)})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Carry out the assignments of this node's clients, one after the other."""
    who = _worker(context)
    assignments = message.content.array_records["assignments"]
    results = ArrayRecord()
    for client, array in assignments.items():
        results[client] = pack_blob(who.work(unpack_blob(array)))
    return Message(RecordDict({"results": results}), reply_to=message)


def pack_blob(blob: bytes) -> Array:
    """A blob as Flower carries it: one array of bytes."""
    return Array(np.frombuffer(blob, dtype=np.uint8))


def unpack_blob(array: Array) -> bytes:
    """The blob of :func:`pack_blob`."""
    return array.numpy().tobytes()
