"""Arrays that are worked out once on a machine and kept in the user's cache folder.

What works them out may take seconds to import and a hundred megabytes, in every worker process.
"""

import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import platformdirs

KEEP_DAYS = 30.0  # after which what was not used is deleted


def kept(key: object, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return named arrays, from the cache folder where they are there.

    Args:
        key: All that the arrays depend on, with a ``repr`` that says it, versions included.
        make: Works them out. What it raises is raised, and nothing is kept.
    """
    folder = platformdirs.user_cache_path("d2ft-fl", appauthor=False) / "data"
    file = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"
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
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    Path(part.name).replace(file)
    oldest = time.time() - 86_400 * KEEP_DAYS
    for other in file.parent.iterdir():
        if other.stat().st_mtime < oldest:
            other.unlink()
