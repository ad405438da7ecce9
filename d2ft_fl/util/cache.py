"""Caches on this machine: what can be sent or worked out again.

Of what lies in a cache only files that have the names of this project's are ever deleted, and only
in folders that it made.
"""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

KEEP_DAYS = 30.0  # after which what was not used is deleted
UNFINISHED_DAYS = 1.0  # and what a process that was killed was writing
_PART = r"\.[a-z0-9_]{8}\.part"


def folder(name: str) -> Path:
    """Return the folder of one of this project's caches, in the user's cache folder."""
    return platformdirs.user_cache_path("d2ft-fl", appauthor=False) / name


@contextmanager
def filling(path: Path) -> Iterator[Path]:
    """Lend a file to write, which becomes that of a cache, whole or not at all.

    Other processes may write the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def prune(where: Path, pattern: str, days: float = KEEP_DAYS) -> None:
    """Delete a cache's files that were not used for long, and nothing else.

    Args:
        where: The cache's folder.
        pattern: What their paths in it look like, as a regular expression.
        days: After how many days.
    """
    now = time.time() / 86_400
    for path in where.glob("/".join("*" * (1 + pattern.count("/")))):
        name = path.relative_to(where).as_posix()
        whole, part = re.fullmatch(pattern, name), re.fullmatch(pattern + _PART, name)
        if not (whole or part) or path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError):  # another process deletes it, too
            if now - path.stat().st_mtime / 86_400 > (days if whole else UNFINISHED_DAYS):
                path.unlink()
