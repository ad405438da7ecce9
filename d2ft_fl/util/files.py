"""Files that are the old one or the new one, whenever the machine stops; errors that name them."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2ft_fl.errors import RunError
from d2ft_fl.util import limits

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what is written to where that fails: of a full disk Python says no more than that.

    Raises:
        RunError: With the path, and what went wrong.
    """
    from safetensors import SafetensorError  # a command that only reads files needs none

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        # safetensors has an error of its own, with a text only.
        full = getattr(error, "errno", None) in FULL or any(
            f"os error {number})" in reason for number in FULL
        )
        todo = "; make room there, and go on with d2ft run --resume" if full else ""
        if isinstance(error, OSError):
            todo += limits.advice(error)
        raise RunError(f"{str(path)!r} cannot be written to: {reason}{todo}") from error


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(part: Path, path: Path) -> None:
    """Have a file that is written take another's place, once it is on the disk."""
    sync(part)
    part.replace(path)
    sync(path.parent)


def unlock(handle: int) -> None:
    """Give a lock (``flock``) back, whoever has a copy of the handle.

    A process that was forked meanwhile has one until it runs its program; closing ours alone would
    leave the lock to it for so long.
    """
    fcntl.flock(handle, fcntl.LOCK_UN)
