"""The model on other machines of a Ray cluster: through Ray's object store.

It travels to a machine once a round; each of Flower's processes there then writes it for its
workers.

A message could only name an object of the store by a pickle. So the server keeps its reference in a
named actor, whom workers ask.
"""

import atexit
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.runtime.shared_memory import SharedMemory


class _ModelStore:
    """Holds references, in lists, for otherwise Ray would hand over what they stand for."""

    def __init__(self) -> None:
        self.held: tuple[int, list[Any]] = (0, [])

    def put(self, round_number: int, references: list[Any]) -> None:
        self.held = (round_number, references)

    def get(self, round_number: int) -> list[Any]:
        """References of a round; none where it is another's turn."""
        return self.held[1] if self.held[0] == round_number else []


class ModelStore:
    """The server's end. Needs a connection to Ray."""

    def __init__(self, name: str):
        import ray

        self.name = name
        self.actor: Any = ray.remote(num_cpus=0)(_ModelStore).options(name=name).remote()

    def publish(self, round_number: int, path: Path) -> None:
        """Put a published model into the object store."""
        import ray

        content = ray.put(np.fromfile(path, dtype=np.uint8))
        ray.get(self.actor.put.remote(round_number, [content]))


@lru_cache(maxsize=1)
def _shared_memory() -> SharedMemory:
    """This machine's folder, as long as this process lives."""
    own = SharedMemory.create()
    atexit.register(own.close)
    return own


def fetch(name: str, round_number: int) -> Path:
    """A round's model, from the server's :class:`ModelStore`, as a file of this machine.

    Raises:
        LookupError: When the server has another round's by now.
    """
    import ray

    path = _shared_memory().model_path(round_number)
    if not path.exists():
        found: list[Any] = ray.get(ray.get_actor(name).get.remote(round_number))
        if not found:
            raise LookupError(f"the model of round {round_number} is gone")
        _shared_memory().store(path, memoryview(ray.get(found[0])))
    return path


def machines() -> int:
    """How many machines the Ray cluster has, of which this process is part."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())
