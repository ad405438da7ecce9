"""Arrays that are worked out once on a machine and kept in the user's cache folder.

What works them out may take seconds to import and a hundred megabytes, in every worker process.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from d2ft_fl.util import cache

FILES = r"[0-9a-f]{32}\.npz"


def kept(key: object, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return named arrays, from the cache folder where they are there.

    Args:
        key: All that the arrays depend on, with a ``repr`` that says it, versions included.
        make: Works them out. What it raises is raised, and nothing is kept.
    """
    file = cache.folder("data") / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        os.utime(file)
        return found
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = make()
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        _write(file, arrays)
    return arrays


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file that is whole whenever it is there, and delete old ones."""
    with cache.filling(file) as part, part.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]
    cache.prune(file.parent, FILES)
