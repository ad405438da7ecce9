"""numba for this package. Compiling takes half a minute, loading what was compiled a second."""

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import config
from numba.core.caching import UserWideCacheLocator

from d2ft_fl.util import compile_cache


class ByContent(UserWideCacheLocator):
    """Finds compiled code by what the sources say; see :mod:`d2ft_fl.util.compile_cache`."""

    def __init__(self, function: Callable, file: str):
        self._lineno = function.__code__.co_firstlineno
        self._cache_path = str(compile_cache.folder())

    def get_source_stamp(self) -> str:
        """Return what the compiled code has to agree with."""
        return compile_cache.stamp()


def _compiled(**options: Any) -> Callable[[Callable], Any]:
    """Return numba's ``njit``, without ``fastmath``, cached by content where that can be."""

    def decorate(function: Callable) -> Any:
        before = config.CACHE_LOCATOR_CLASSES  # type: ignore[attr-defined]
        if compile_cache.can_cache():
            config.CACHE_LOCATOR_CLASSES = f"{__name__}.ByContent"  # type: ignore[attr-defined]
        try:
            return njit(cache=True, error_model="numpy", **options)(function)
        finally:
            config.CACHE_LOCATOR_CLASSES = before  # type: ignore[attr-defined]

    return decorate


# Called from Python, and from other compiled functions alone.
entry = _compiled()
inner = _compiled(no_cpython_wrapper=True, no_cfunc_wrapper=True)
