"""The model store: brings the model to other machines of a Ray cluster, through Ray's object store.

The model travels to a machine once a round; each of Flower's processes there then writes it to
shared memory for its worker processes.

A message could only name an object of the store by a pickle. So the server keeps the reference in a
named actor, which processes ask.
"""

import atexit
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.runtime.shared_memory import SharedMemory


class _ModelStore:
    """The actor. References stand in lists: otherwise Ray would hand over what they stand for."""

    def __init__(self) -> None:
        self.round_number = 0
        self.references: list[Any] = []

    def put(self, round_number: int, references: list[Any]) -> None:
        self.round_number, self.references = round_number, references

    def get(self, round_number: int) -> list[Any]:
        """Return the references of a round; none where those of another round are stored."""
        return self.references if self.round_number == round_number else []


class ModelStore:
    """The server's end of the model store. Needs a connection to Ray.

    Attributes:
        name: Of the actor, for :func:`fetch`.
        actor: Ray's handle of the actor.
    """

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
    """Return this process's folder in shared memory, which goes when the process ends."""
    folder = SharedMemory.create()
    atexit.register(folder.close)
    return folder


def fetch(name: str, round_number: int) -> Path:
    """Return a round's model, from the server's :class:`ModelStore`, as a file of this machine.

    Raises:
        LookupError: When the server has stored another round's model by now.
    """
    import ray

    path = _shared_memory().model_path(round_number)
    if not path.exists():
        references: list[Any] = ray.get(ray.get_actor(name).get.remote(round_number))
        if not references:
            raise LookupError(f"the model of round {round_number} is gone")
        _shared_memory().store(path, memoryview(ray.get(references[0])))
    return path


def machines() -> int:
    """Return how many machines the Ray cluster has to which this process belongs."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())
