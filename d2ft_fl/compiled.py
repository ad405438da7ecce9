"""numba for this package: how the kernel is compiled, and where the result is kept.

Compiling takes half a minute, loading what was compiled less than a second. numba keeps it beside
the source, by path and time of change; but Flower unpacks an app anew for every run. So it is kept
in the user's cache folder, by what the source says.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
from numba import njit
from numba.core import config
from numba.core.caching import UserWideCacheLocator


class ByContent(UserWideCacheLocator):
    """Finds compiled code by a hash of the source file that it comes from."""

    def __init__(self, function: Callable, file: str):
        self._lineno = function.__code__.co_firstlineno
        self._stamp = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        self._cache_path = str(_root() / self._stamp[:16])

    def get_source_stamp(self) -> str:
        """What the compiled code has to agree with."""
        return self._stamp


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """numba's ``njit``, without ``fastmath``, its result kept by content where that can be."""

    def decorate(function: Callable) -> Any:
        before = config.CACHE_LOCATOR_CLASSES  # type: ignore[attr-defined]
        if _can_keep(inspect.getfile(function)):
            config.CACHE_LOCATOR_CLASSES = f"{__name__}.ByContent"  # type: ignore[attr-defined]
        try:
            jit = njit(cache=True, error_model="numpy", nogil=True, **options)
            return jit(function)
        finally:
            config.CACHE_LOCATOR_CLASSES = before  # type: ignore[attr-defined]

    return decorate


def _can_keep(file: str) -> bool:
    folder = _root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK) and Path(file).is_file()


def _root() -> Path:
    return platformdirs.user_cache_path("d2ft-fl", appauthor=False) / "numba"


def is_kept(file: str, function: str) -> bool:
    """Whether a function of a source file, as it is now, was compiled on this machine before."""
    stamp = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return any(_root().joinpath(stamp[:16]).glob(f"*.{function}-*.nbi"))
