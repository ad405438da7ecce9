"""Where compiled code is kept, and whether it is there; does not need numba.

numba would keep it beside the source, by path and time of change; but Flower unpacks an app anew
for every run. So it is kept in the user's cache folder, by what the sources of this package say.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

import platformdirs


@cache
def stamp() -> str:
    """A hash of this package's sources: compiled code holds parts of all of them."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def folder() -> Path:
    """Where what these sources compile to is kept."""
    return platformdirs.user_cache_path("d2ft-fl", appauthor=False) / "numba" / stamp()[:16]


def can_keep() -> bool:
    """Whether that folder can be written to."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder(), os.W_OK)


def is_kept(function: str) -> bool:
    """Whether a function was compiled on this machine before."""
    return any(folder().glob(f"*.{function}-*.nbi"))
