"""The solver's modules as Python, beside the compiled ones: numba's parts cannot be called."""

import importlib
import sys
from types import ModuleType

from numba.core import config

import d2ft_fl.planning

PACKAGE = "d2ft_fl.planning.solver"
NAMES = "instance", "choices", "prices", "moves", "search", "many", "exact", "feasible"


def _pop() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGE)}


def _imported() -> list[ModuleType]:
    kept, disabled = _pop(), config.DISABLE_JIT
    config.DISABLE_JIT = 1
    try:
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in NAMES]
    finally:
        config.DISABLE_JIT = disabled
        _pop()
        sys.modules.update(kept)
        if PACKAGE in kept:
            d2ft_fl.planning.solver = kept[PACKAGE]
        else:
            del d2ft_fl.planning.solver


instance, choices, prices, moves, search, many, exact, feasible = _imported()
