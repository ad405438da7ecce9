"""Waking the nodes of a simulation: they import PyTorch while the server does. Loads no torch."""

import json
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

SECONDS = 5.0  # for nodes to be registered


def is_simulated(grid: Grid) -> bool:
    """Whether a grid is a simulation's, which keeps messages in this process's memory."""
    return type(grid).__name__ == "InMemoryGrid"


def wake(grid: Grid) -> None:
    """Ask every node for its place, which has it start its workers; nobody waits for the answers.

    Args:
        grid: Of a simulation.
    """
    deadline = time.monotonic() + SECONDS
    while not (nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
        time.sleep(0.05)
    question = ConfigRecord({"json": json.dumps({"clients": None})})
    grid.push_messages(
        [
            Message(
                RecordDict({"query": question}), dst_node_id=node, message_type="query", ttl=60.0
            )
            for node in nodes
        ]
    )
