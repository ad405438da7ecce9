"""Files that are the old one or the new one, whenever the machine stops."""

import fcntl
import os
from pathlib import Path


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
