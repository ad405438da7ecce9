"""The compile cache: where compiled code lies, and whether it is there; does not need numba.

numba would cache it beside the source, by path and time of change; but Flower unpacks an app anew
for every run. So it is cached in the user's cache folder, by what the compiled sources say.
"""

import fcntl
import hashlib
import os
from functools import cache as once
from pathlib import Path

from d2ft_fl.util import cache

PACKAGE = Path(__file__).resolve().parents[1]
# Every module with compiled functions (a test checks that): one inlines parts of another.
SOURCES = ("planning/solver/*.py", "aggregation/fixed_point.py", "util/compiled.py")


@once
def stamp() -> str:
    """Return a hash of all sources that are compiled."""
    total = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(PACKAGE.glob(pattern)):
            total.update(file.read_bytes())
    return total.hexdigest()


def folder() -> Path:
    """Return the folder of the code that the sources compile to."""
    return cache.folder("numba") / stamp()[:16]


def can_cache() -> bool:
    """Tell whether the compile cache can be written to."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder(), os.W_OK)


def is_compiled(function: str) -> bool:
    """Tell whether a function was compiled on this machine before."""
    return any(folder().glob(f"*.{function}-*.nbi"))


def try_lock() -> int | None:
    """Take the lock that says that a process compiles.

    Returns:
        The open file that holds it, also in a child that gets it; None where another process has
        it, or nothing can be cached.
    """
    if not can_cache():
        return None
    lock = os.open(folder() / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


_compiles_here = False


def compile_here() -> None:
    """Say that this is the process that compiles, which waits for nobody."""
    global _compiles_here
    _compiles_here = True


@once
def wait_for(function: str) -> None:
    """Wait while another process compiles, unless a function is there already."""
    if _compiles_here or is_compiled(function) or not can_cache():
        return
    lock = os.open(folder() / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)
