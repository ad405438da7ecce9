"""Folders for a run's temporary files, which nobody needs when the processes of the run are gone.

Each is locked by the process that made it, and by others that have its lock. A process that is
killed cannot delete its folder: whoever finds it without a lock does, see :func:`prune`.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from d2ft_fl.errors import RunError
from d2ft_fl.util import lifeline
from d2ft_fl.util.files import unlock

EXCHANGE = "d2ft-exchange-"  # models and replies of a round, see runtime/shared_memory.py
FORKS = "d2ft-forks-"  # a fork server's socket
RUN = "d2ft-run-"  # whatever a command and its libraries write for temporary use
FLOWER = "d2ft-home-"  # the home of a SuperLink
PREFIXES = (
    EXCHANGE,
    FORKS,
    RUN,
)  # of what goes with its lock; what lives in a home is ended before
UNFINISHED = ".d2ft-"
UNFINISHED_SECONDS = 60.0  # after which nobody finishes it any more
MEMORY = Path("/dev/shm")
SHORT = Path("/tmp")


@dataclass(frozen=True)
class Scratch:
    """A folder of this process.

    Attributes:
        path: Where it is.
        lock: File descriptor of the folder, locked. Another process that is given it has the lock
            too.
    """

    path: Path
    lock: int

    @classmethod
    def make(cls, path: Path) -> "Scratch":
        """Make a folder, private to the user, that no other process finds without a lock."""
        new = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
        lock = lifeline.own(os.open(new, os.O_RDONLY))
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(new.rename(path), lock)

    def delete(self) -> None:
        """Delete the folder and all that is in it."""
        delete(self.path)
        unlock(self.lock)
        lifeline.close(self.lock)


def delete(folder: Path) -> None:
    """Delete a folder, though processes that end may yet write to it."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


_outer: list[Path] = []  # folders for temporary files, before another took their place


@contextmanager
def instead(folder: Path) -> Iterator[None]:
    """Have this process, and those that it starts, write temporary files into a folder."""
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    _outer.append(root())
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        _outer.pop()
        tempfile.tempdir = before[0]
        os.environ.pop("TMPDIR")
        if before[1] is not None:
            os.environ["TMPDIR"] = before[1]


def root() -> Path:
    """Return the folder for temporary files, whatever is there instead for a while."""
    return _outer[0] if _outer else Path(tempfile.gettempdir())


def new_path(prefix: str, where: Path | None = None) -> Path:
    """Return a path that is not there; it says what will be, and by ``where`` in which folder."""
    return (where or root()) / f"{prefix}{secrets.token_hex(4)}"


def short_path(prefix: str, longest: int) -> Path:
    """Return a path that is not there, of a folder that will have sockets in it.

    Args:
        prefix: What its name begins with.
        longest: Bytes that it may have: a socket's name has few (107 on Linux, 103 on macOS).

    Raises:
        RunError: When neither the folder for temporary files nor ``/tmp`` will do.
    """
    paths = [new_path(prefix), new_path(prefix, SHORT)]
    for path in paths:
        if len(os.fsencode(path)) <= longest and os.access(path.parent, os.W_OK):
            return path
    room = longest - len(os.fsencode(paths[0].name)) - 1
    raise RunError(
        f"TMPDIR = {str(paths[0].parent)!r} is too long for sockets, and {str(SHORT)!r} cannot be "
        f"written to: set TMPDIR to a folder with a name of {room} bytes at most"
    )


def found(prefixes: Iterable[str]) -> Iterator[Path]:
    """Yield the folders of this user whose names begin so, wherever they may be."""
    for place in {MEMORY, root(), SHORT}:
        for prefix in prefixes:
            for folder in place.glob(f"{prefix}*"):
                with suppress(OSError):
                    if folder.lstat().st_uid == os.getuid() and folder.is_dir():
                        yield folder


def prune(prefixes: Iterable[str] = PREFIXES) -> None:
    """Delete the folders that processes left when they were killed."""
    for folder in found(prefixes):
        delete_unless_locked(folder)
    for folder in found([UNFINISHED]):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > UNFINISHED_SECONDS:
                delete_unless_locked(folder)


def delete_unless_locked(folder: Path) -> None:
    """Delete a folder, unless a process that lives has locked it."""
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def is_locked(folder: Path) -> bool:
    """Tell whether a process that lives has locked a folder."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # it is gone
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(lock)
