"""A folder in memory that the processes of one machine share: the model down, replies up.

The server writes the global model once a round, and worker processes map it; a worker process
writes each client's reply, and the server aggregates it where it lies. Files of replies are used
again and stay mapped on both sides: pages that are there already are written and read several times
as fast as new ones. Model and replies are copied nowhere else.

A file of replies has a number of its own, and is called

    NUMBER.spare                        while nobody needs it
    NUMBER.part                         while a worker process writes it
    NUMBER.ROUND-CLIENT-LENGTH.reply    with a reply of so many bytes at its beginning
"""

import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from d2ft_fl.errors import RunError
from d2ft_fl.util import scratch
from d2ft_fl.util.scratch import MEMORY, Scratch

if TYPE_CHECKING:  # a process that only passes paths on needs no torch
    from torch import Tensor

WAITING = 4  # replies that may wait to be aggregated, before worker processes wait
_REPLY = re.compile(r"(?P<number>\w+)\.(?P<round>\d+)-(?P<client>\d+)-(?P<length>\d+)\.reply")
_mapped: dict[Path, dict[str, mmap.mmap]] = {}  # folder -> files of replies, by number


@dataclass(frozen=True)
class SharedMemory:
    """The folder of one run on one machine. Private to the user; gone when the run is.

    Attributes:
        folder: Where it is.
        scratch: The same, of the process that made it. None in other processes.
    """

    folder: Path
    scratch: Scratch | None = None

    @classmethod
    def create(cls, model_bytes: int = 0, workers: int = 1) -> "SharedMemory":
        """Make a folder, in shared memory if there is enough of it, and else on disk.

        Folders of processes that have ended are deleted.

        Args:
            model_bytes: Size of the global model; no reply is longer.
            workers: How many worker processes write replies at once.
        """
        scratch.prune()
        root, needed = _memory(), (2 + WAITING + workers) * model_bytes
        if root is None or shutil.disk_usage(root).free < needed:
            root = Path(tempfile.gettempdir())
        own = Scratch.make(scratch.new_path(f"{scratch.EXCHANGE}{os.getpid()}-", root))
        return cls(own.path, own)

    def close(self) -> None:
        """Delete the folder."""
        _mapped.pop(self.folder, None)
        if self.scratch:
            self.scratch.delete()

    # -- the model, down ---------------------------------------------------------------------

    def publish(self, round_number: int, weights: "Mapping[str, Tensor]") -> Path:
        """Write a round's model in place of the one before; return its path.

        Raises:
            RunError: When there is no room for the model.
        """
        import safetensors.torch

        path = self.model_path(round_number)
        for unfinished in self.folder.glob("*.part"):  # of workers ended in the round before
            _mapped.get(self.folder, {}).pop(unfinished.stem, None)
            unfinished.unlink(missing_ok=True)
        part = path.with_suffix(".part")
        try:
            safetensors.torch.save_file(dict(weights), part)
        except (OSError, safetensors.SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise RunError(
                f"the model cannot be shared with workers in {str(self.folder)!r}: {error}; use "
                'transport = "message", or make room'
            ) from None
        self._put_in_place(part, path)
        return path

    def store(self, path: Path, content: memoryview) -> None:
        """Write a model that was published on another machine, in place of the one before."""
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(content)
        self._put_in_place(part, path)

    def model_path(self, round_number: int) -> Path:
        """Return the path of a round's model."""
        return self.folder / f"{round_number}.model"

    def _put_in_place(self, part: Path, path: Path) -> None:
        part.replace(path)
        for old in self.folder.glob("*.model"):
            if old != path:
                old.unlink()

    # -- replies, up -------------------------------------------------------------------------

    def reply_path(self, round_number: int, client: int) -> Path:
        """Return where a client's reply goes, for :func:`put`."""
        return self.folder / f"{round_number}-{client}"

    def arrived(self, round_number: int) -> Iterator[tuple[int, memoryview]]:
        """Yield the replies that are there, and whose; each is gone when the next is asked for."""
        for entry in list(os.scandir(self.folder)):
            if match := _REPLY.fullmatch(entry.name):
                path, length = Path(entry.path), int(match["length"])
                try:
                    if (
                        int(match["round"]) == round_number
                    ):  # else the reply is late, of an earlier round
                        pages = _pages(path, match["number"], length)
                        yield int(match["client"]), memoryview(pages)[:length]
                finally:
                    with suppress(FileNotFoundError):
                        path.replace(self.folder / f"{match['number']}.spare")


def put(path: Path, tensors: "Mapping[str, Tensor]", meta: Mapping[str, Any], until: float) -> None:
    """Write a reply, whole or not at all; wait while many others wait to be aggregated.

    Args:
        path: As :meth:`SharedMemory.reply_path` returns it.
        tensors: The reply's tensors, by name.
        meta: What else the reply says, as JSON.
        until: When to wait no more, in seconds of ``time.monotonic``.

    Raises:
        OSError: When the reply cannot be written.
    """
    from d2ft_fl.wire import blob

    folder = path.parent
    while time.monotonic() < until and _waiting(folder) >= WAITING:
        time.sleep(0.005)
    number = _take_file(folder)
    part = folder / f"{number}.part"
    try:
        length = blob.fill(partial(_pages, part, number), tensors, meta)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    part.replace(folder / f"{number}.{path.name}-{length}.reply")


def _take_file(folder: Path) -> str:
    """Take a file for a reply that no other worker uses now; return its number."""
    for spare in folder.glob("*.spare"):
        with suppress(FileNotFoundError):  # another worker was faster
            spare.replace(spare.with_suffix(".part"))
            return spare.stem
    number = uuid4().hex
    folder.joinpath(f"{number}.part").touch(mode=0o600)
    return number


def _pages(path: Path, number: str, length: int) -> mmap.mmap:
    """Return a file of replies, mapped into memory, with ``length`` bytes at least.

    Raises:
        OSError: When there is no room for them. The bytes are allocated here, since writing to a
            mapped page without room would end this process.
    """
    files = _mapped.setdefault(path.parent, {})
    if number not in files or len(files[number]) < length:
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size < length:
                os.posix_fallocate(file.fileno(), 0, length)
            files[number] = mmap.mmap(file.fileno(), 0)
    return files[number]


def _waiting(folder: Path) -> int:
    return sum(name.endswith(".reply") for name in os.listdir(folder))


@lru_cache(maxsize=1)
def read_model(path: Path) -> "dict[str, Tensor]":
    """Return a published model, mapped into memory and not copied."""
    from d2ft_fl.wire import blob

    return blob.mapped(path)[1]


def _memory() -> Path | None:
    """Return the folder of shared memory of this machine, if there is one."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None
