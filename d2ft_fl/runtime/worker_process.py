"""A worker process, which trains clients and can be ended when it hangs.

See :mod:`d2ft_fl.runtime.worker_pool`, which asks a fork server for it. Over its connection come,
after the configuration as JSON and whether this process is a device's, requests of two frames, JSON
and a blob, and go answers of one.
When no process has the other end of its lifeline open any more, this process ends at once, whatever
it is doing.
"""

import json
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from d2ft_fl.errors import D2FTError
from d2ft_fl.util.lifeline import end_with
from d2ft_fl.util.strict_json import write_json


def run(connection: int, lifeline: int) -> None:
    """Be a worker until there is nobody to ask.

    Args:
        connection: File descriptor of the connection.
        lifeline: File descriptor of the lifeline.
    """
    end_with(lifeline)
    main(Connection(connection))


def main(connection: Connection) -> None:
    """Answer requests until there is nobody to ask."""
    from d2ft_fl.client.trainer import ClientTrainer
    from d2ft_fl.config.run_config import RunConfig

    try:
        terms = json.loads(connection.recv_bytes())
        config = RunConfig.from_mapping(terms["options"]).check_values()
        trainer = ClientTrainer(config, terms["owns-budget"], terms["on-device"])
    except EOFError:
        return
    except D2FTError as error:
        connection.send_bytes(write_json({"error": str(error)}).encode())
        return
    connection.send_bytes(b"{}")
    while True:
        try:
            request, blob = json.loads(connection.recv_bytes()), connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(trainer, request, blob))


def _answer(trainer: Any, request: dict[str, Any], blob: bytes) -> bytes:
    if request["do"] == "report":
        return _reports(trainer, request)
    if request["do"] == "resident":
        # It brings NumPy in, whose threads a fork server must not have.
        from d2ft_fl.budgets.process_memory import resident

        return write_json({"resident": resident()}).encode()
    return _work(trainer, request, blob)


def _reports(trainer: Any, request: dict[str, Any]) -> bytes:
    """Return the reports of clients, as JSON."""
    try:
        trainer.check_classes(request["classes"])
        reports = [trainer.report(client, request["round"]) for client in request["clients"]]
    except D2FTError as error:
        return write_json({"error": str(error)}).encode()
    except Exception as error:  # a budget may be a user's function
        return write_json({"failed": f"{type(error).__name__}: {error}"}).encode()
    rows = [[r.client, r.examples, r.budget.to_json()] for r in reports]
    return write_json({"reports": rows}).encode()


def _work(trainer: Any, request: dict[str, Any], blob: bytes) -> bytes:
    """Return a client's reply; empty where it went to shared memory."""
    from d2ft_fl.runtime import shared_memory
    from d2ft_fl.wire import blob as wire

    model = request["model"]
    asked = request["round"], request["client"]
    weights = None if model is None else shared_memory.read_model(Path(model))
    if request["reply"] is None:
        return trainer.work(blob, weights, asked)
    until = time.monotonic() + request["seconds"]
    tensors, meta = trainer.answer(blob, weights, asked)
    try:
        shared_memory.put(Path(request["reply"]), tensors, meta, until)
    except OSError as error:  # such as no room
        return wire.encode({}, {"error": f"its answer cannot be written: {error.strerror}"})
    return b""
