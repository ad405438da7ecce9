"""Waking the nodes of a simulation: they import PyTorch while the server does. Loads no torch."""

import time

from flwr.app import Message
from flwr.serverapp import Grid

from d2ft_fl.flower.records import PLACE, query_of

SECONDS = 5.0  # for nodes to be registered


def is_simulated(grid: Grid) -> bool:
    """Whether a grid is a simulation's, which keeps messages in this process's memory.

    Ray, which tells a node that it is one of a simulation, is not there yet when a server starts.
    """
    return type(grid).__name__ == "InMemoryGrid"


def wake(grid: Grid) -> None:
    """Ask every node for its place, which has it start its workers; nobody waits for the answers.

    Args:
        grid: Of a simulation.
    """
    deadline = time.monotonic() + SECONDS
    while not (nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
        time.sleep(0.05)
    grid.push_messages(
        [Message(query_of(PLACE), dst_node_id=n, message_type="query", ttl=60.0) for n in nodes]
    )
