"""A folder in memory that the processes of one machine share: the model down, replies up.

The server writes the global model once a round, and workers map it; a worker writes each client's
reply, and the server folds it in where it lies. Files of replies are used again and stay mapped on
both sides: pages that are there already are written and read several times as fast as new ones.
Nothing else of either travels.

A file of replies has a number of its own, and is called

    NUMBER.spare                        while nobody needs it
    NUMBER.part                         while a worker writes it
    NUMBER.ROUND-CLIENT-LENGTH.reply    with a reply of so many bytes at its beginning
"""

import fcntl
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
from d2ft_fl.util.files import unlock

if TYPE_CHECKING:  # those who only pass its path on need no torch
    from torch import Tensor

PREFIX = "d2ft-exchange-"
MEMORY = Path("/dev/shm")
WAITING = 4  # replies that may wait to be folded in, before workers wait
_REPLY = re.compile(r"(?P<number>\w+)\.(?P<round>\d+)-(?P<client>\d+)-(?P<length>\d+)\.reply")
_mapped: dict[Path, dict[str, mmap.mmap]] = {}  # folder -> files of replies, by number


@dataclass(frozen=True)
class SharedMemory:
    """The folder of one run on one machine. Private to the user; gone when the run is.

    Attributes:
        held: The open folder, locked by who made it: whoever can lock it may delete it.
    """

    folder: Path
    held: int | None = None

    @classmethod
    def create(cls, model_bytes: int = 0, workers: int = 1) -> "SharedMemory":
        """A new one; those of ended processes are deleted.

        It is in shared memory, if there is enough, and else on disk.

        Args:
            model_bytes: Of the global model; no reply is longer.
            workers: How many write replies at once.
        """
        prune()
        root, needed = _memory(), (2 + WAITING + workers) * model_bytes
        if root is None or shutil.disk_usage(root).free < needed:
            root = Path(tempfile.gettempdir())
        new = Path(tempfile.mkdtemp(prefix=".d2ft-", dir=root))
        held = os.open(new, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)  # before anybody could take it for one that is not held
        name = new.name.removeprefix(".d2ft-")
        return cls(new.rename(root / f"{PREFIX}{os.getpid()}-{name}"), held)

    def close(self) -> None:
        """Delete it."""
        _mapped.pop(self.folder, None)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.held is not None:
            unlock(self.held)
            os.close(self.held)

    # -- the model, down ---------------------------------------------------------------------

    def publish(self, round_number: int, weights: "Mapping[str, Tensor]") -> Path:
        """Write a round's model, in place of the one before; returns where.

        Raises:
            RunError: When there is no room for it.
        """
        import safetensors.torch

        path = self.model_path(round_number)
        for left in self.folder.glob("*.part"):  # by who was ended in the round before
            _mapped.get(self.folder, {}).pop(left.stem, None)
            left.unlink(missing_ok=True)
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
        """The same of what was published on another machine."""
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(content)
        self._put_in_place(part, path)

    def model_path(self, round_number: int) -> Path:
        """Where a round's model is."""
        return self.folder / f"{round_number}.model"

    def _put_in_place(self, part: Path, path: Path) -> None:
        part.replace(path)
        for old in self.folder.glob("*.model"):
            if old != path:
                old.unlink()

    # -- replies, up -------------------------------------------------------------------------

    def reply_path(self, round_number: int, client: int) -> Path:
        """Where a client's reply goes: what :func:`put` is told."""
        return self.folder / f"{round_number}-{client}"

    def arrived(self, round_number: int) -> Iterator[tuple[int, memoryview]]:
        """Replies that are there; each is gone once the next is asked for."""
        for entry in list(os.scandir(self.folder)):
            if match := _REPLY.fullmatch(entry.name):
                path, length = Path(entry.path), int(match["length"])
                try:
                    if int(match["round"]) == round_number:  # else it was too late for its own
                        pages = _pages(path, match["number"], length)
                        yield int(match["client"]), memoryview(pages)[:length]
                finally:
                    with suppress(FileNotFoundError):
                        path.replace(self.folder / f"{match['number']}.spare")


def put(path: Path, tensors: "Mapping[str, Tensor]", meta: Mapping[str, Any], until: float) -> None:
    """Write a reply, whole or not at all; waits while many others wait to be folded in.

    Args:
        path: Of :meth:`SharedMemory.reply_path`.
        until: Of ``time.monotonic``: when not to wait any more.

    Raises:
        OSError: When it cannot be written.
    """
    from d2ft_fl.wire import blob

    folder = path.parent
    while time.monotonic() < until and _waiting(folder) >= WAITING:
        time.sleep(0.005)
    number = _taken(folder)
    part = folder / f"{number}.part"
    try:
        length = blob.fill(partial(_pages, part, number), tensors, meta)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    part.replace(folder / f"{number}.{path.name}-{length}.reply")


def _taken(folder: Path) -> str:
    """The number of a file for a reply, which is nobody else's now."""
    for spare in folder.glob("*.spare"):
        with suppress(FileNotFoundError):  # another worker was faster
            spare.replace(spare.with_suffix(".part"))
            return spare.stem
    number = uuid4().hex
    folder.joinpath(f"{number}.part").touch(mode=0o600)
    return number


def _pages(path: Path, number: str, length: int) -> mmap.mmap:
    """A file of replies in memory, so many bytes of it at least.

    Raises:
        OSError: When there is no room for them. Nothing is left to find that out by writing, which
            would end this process.
    """
    own = _mapped.setdefault(path.parent, {})
    if number not in own or len(own[number]) < length:
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size < length:
                os.posix_fallocate(file.fileno(), 0, length)
            own[number] = mmap.mmap(file.fileno(), 0)
    return own[number]


def _waiting(folder: Path) -> int:
    return sum(name.endswith(".reply") for name in os.listdir(folder))


@lru_cache(maxsize=1)
def read_model(path: Path) -> "dict[str, Tensor]":
    """A published model, mapped into memory and not copied."""
    from d2ft_fl.wire import blob

    return blob.mapped(path)[1]


def _memory() -> Path | None:
    """A folder in memory that others of this machine see too, if there is one."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None


def prune() -> None:
    """Delete the folders of processes that have ended without doing so, wherever these ran."""
    for root in filter(None, {_memory(), Path(tempfile.gettempdir())}):
        for folder in root.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if folder.stat().st_uid == os.getuid():
                    _delete_unless_held(folder)


def _delete_unless_held(folder: Path) -> None:
    """Delete a folder, if it is not another's at the moment.

    Raises:
        OSError: When it is.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)
