"""The solver's modules as Python, beside the compiled ones: numba's parts cannot be called.

What ``np.empty`` returns there is full of nonsense, so that what is read was written before.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
from numba.core import config

import d2ft_fl.planning

PACKAGE = "d2ft_fl.planning.solver"
NAMES = "instance", "choices", "prices", "moves", "search", "many", "exact", "feasible"


def _pop() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGE)}


def _empty(shape, dtype=float):
    array = np.empty(shape, dtype=dtype)
    array.fill(np.nan if array.dtype.kind == "f" else 77)
    return array


def _imported() -> list[ModuleType]:
    kept, disabled = _pop(), config.DISABLE_JIT
    config.DISABLE_JIT = 1
    try:
        modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in NAMES]
    finally:
        config.DISABLE_JIT = disabled
        _pop()
        sys.modules.update(kept)
        if PACKAGE in kept:
            d2ft_fl.planning.solver = kept[PACKAGE]
        else:
            del d2ft_fl.planning.solver
    for module in modules:
        module.np = SimpleNamespace(**{**vars(np), "empty": _empty})
    return modules


instance, choices, prices, moves, search, many, exact, feasible = _imported()
