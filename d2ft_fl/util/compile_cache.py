"""Where compiled code is kept, and whether it is there; does not need numba.

numba would keep it beside the source, by path and time of change; but Flower unpacks an app anew
for every run. So it is kept in the user's cache folder, by what the compiled sources say.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parents[1]
# Every module with compiled functions (a test holds that); they hold parts of one another.
SOURCES = ("planning/solver/*.py", "aggregation/fixed_point.py", "util/compiled.py")


@cache
def stamp() -> str:
    """Return a hash of all sources that are compiled."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(PACKAGE.glob(pattern)):
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
