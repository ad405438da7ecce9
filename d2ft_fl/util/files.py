"""Files that are the old one or the new one, whenever the machine stops; errors that name them."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d2ft_fl.errors import RunError, first_line
from d2ft_fl.util import limits
from d2ft_fl.util.strict_json import write_json

ANYBODY, OWNER = 0o666, 0o600  # modes of new files; the user's mask takes rights from both
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
        reason = getattr(error, "strerror", None) or first_line(error)
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


def write_whole(path: Path, text: str, mode: int = ANYBODY) -> None:
    """Write a file, whole or not at all.

    Args:
        path: The file.
        text: What it is to hold.
        mode: Its mode.
    """
    part = path.with_suffix(path.suffix + ".part")
    part.unlink(missing_ok=True)  # another's mode would stay
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    put_in_place(part, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON up to the first broken one; none of no file."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]], mode: int = ANYBODY) -> None:
    """Append lines of JSON to a file so that they survive a power cut.

    Args:
        path: The file; a new one where there is none.
        lines: What to append, an object a line.
        mode: The mode of a new file.
    """
    new = not path.exists()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode), "a") as file:
        file.writelines(write_json(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def keep_lines(path: Path, rounds: int, mode: int = ANYBODY) -> None:
    """Take from a file of JSON the lines of later rounds, and what follows a broken line.

    Args:
        path: The file; nothing happens where there is none.
        rounds: The last round whose lines stay.
        mode: The mode of the file.
    """
    if path.exists():
        kept = [line for line in read_lines(path) if line["round"] <= rounds]
        write_whole(path, "".join(write_json(line) + "\n" for line in kept), mode)


def unlock(handle: int) -> None:
    """Give a lock (``flock``) back, whoever has a copy of the handle.

    A process that was forked meanwhile has one until it runs its program; closing ours alone would
    leave the lock to it for so long.
    """
    fcntl.flock(handle, fcntl.LOCK_UN)
