"""numba for this package. Compiling takes ten seconds, loading what was compiled a fraction of one.

An entry is what Python calls; the functions that it calls are its parts. numba optimises every
function together with all that it calls, and generates machine code for it: what is deep inside
would be optimised once for each function around it. Here parts wait until the entry around them is
optimised as a whole, once.
"""

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import config, types
from numba.core.caching import UserWideCacheLocator
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering

from d2ft_fl.util import compile_cache

OPTIONS = {"error_model": "numpy"}  # of all compiled functions; without ``fastmath``


class ByContent(UserWideCacheLocator):
    """Finds compiled code by what the sources say; see :mod:`d2ft_fl.util.compile_cache`."""

    def __init__(self, function: Callable, file: str):
        self._lineno = function.__code__.co_firstlineno
        self._cache_path = str(compile_cache.folder())

    def get_source_stamp(self) -> str:
        """Return what the compiled code has to agree with."""
        return compile_cache.stamp()


class PartLibrary(JITCodeLibrary):
    """The code of a part, which is linked into an entry and never runs by itself."""

    def _optimize_final_module(self) -> None:
        """Leave it to the entry."""

    def _finalize_final_module(self) -> None:
        """Make the code ready to be linked, without generating machine code."""
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Return 0: no function can be called from outside."""
        return 0

    @property
    def codegen(self) -> "PartLibrary":
        """What numba tells the address of a function's environment, of which a part needs none."""
        return self

    def set_env(self, env_name: str, env: Any) -> None:
        """Do nothing."""


@register_pass(mutates_CFG=True, analysis_only=False)
class PartLowering(NativeLowering):
    """numba's lowering, into a :class:`PartLibrary`."""

    _name = "part_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower a function."""
        state.library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return super().run_pass(state)


class PartCompiler(Compiler):
    """numba's compiler, with :class:`PartLowering`."""

    def define_pipelines(self) -> list:
        """Return the passes of a compilation."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        at = [step[0] for step in passes.passes].index(NativeLowering)
        passes.passes[at] = (PartLowering, "lowering of a part")
        passes._finalized = False
        passes.finalize()
        return [passes]


class Part(CPUDispatcher):
    """A part, compiled once for all values of its arguments: a literal is a number as others are.

    numba compiles a function anew for each constant that it is called with.
    """

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Return how the part is called with arguments of some types."""
        kws = {name: types.unliteral(kind) for name, kind in kws.items()}
        return super().get_call_template([types.unliteral(kind) for kind in args], kws)


def entry(function: Callable) -> Any:
    """Compile a function that Python calls, without ``fastmath``, cached by content if possible."""
    before = config.CACHE_LOCATOR_CLASSES  # type: ignore[attr-defined]
    if compile_cache.can_cache():
        config.CACHE_LOCATOR_CLASSES = f"{__name__}.ByContent"  # type: ignore[attr-defined]
    options: dict[str, Any] = {"cache": True, "no_cfunc_wrapper": True, **OPTIONS}
    try:
        return njit(**options)(function)
    finally:
        config.CACHE_LOCATOR_CLASSES = before  # type: ignore[attr-defined]


def inner(function: Callable) -> Any:
    """Compile a function that compiled functions call, as a part of them."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return function
    options = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}
    return Part(function, targetoptions=options, pipeline_class=PartCompiler)
