"""Names in a configuration that stand for code: a built-in's name or the path of a user's own.

The built-in strategies and tunings are the packages ``d2ft_fl.strategies`` and ``d2ft_fl.clients``,
wherever they lie (see :mod:`d2ft_fl`), so that a user's folders of these names never hide them.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import unknown


def load_attribute(spec: str, what: str) -> Any:
    """Return what ``module:attribute`` names.

    Args:
        spec: Module and attribute, like ``mine.budgets:of``.
        what: The option whose value it is, for messages.

    Raises:
        ConfigError: When the module or attribute does not exist or does not import.
    """
    module_name, _, attribute = spec.partition(":")
    module = _import(module_name, f"{what} = {spec!r}")
    if not hasattr(module, attribute):
        raise ConfigError(f"{what} = {spec!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def load_module(package: str, spec: str, what: str, builtin: tuple[str, ...]) -> ModuleType:
    """Return a built-in module by its name, or any importable module by its dotted path.

    Args:
        package: The built-ins' package inside ``d2ft_fl``: ``strategies`` or ``clients``.
        spec: The name or dotted path.
        what: The option whose value it is, for messages.
        builtin: Names of the built-in modules.

    Raises:
        ConfigError: When there is no module of that name, or it does not import.
    """
    if spec in builtin:
        return importlib.import_module(_path(package, spec))
    if "." not in spec:
        raise ConfigError(
            f"{unknown(f'{what} = ', spec, builtin)}, or the dotted path of a module of your own"
        )
    return _import(spec, f"{what} = {spec!r}")


def source_of(package: str, name: str) -> str:
    """Return the source of a built-in module, which is not imported.

    Args:
        package: The built-ins' package inside ``d2ft_fl``: ``strategies`` or ``clients``.
        name: The module, as options name it.
    """
    spec = importlib.util.find_spec(_path(package, name))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {_path(package, name)}", name=_path(package, name))
    return Path(spec.origin).read_text(encoding="utf-8")


def _path(package: str, name: str) -> str:
    """Return the dotted path of a built-in module."""
    return f"d2ft_fl.{package}.{name.replace('-', '_')}"


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot import {name!r} ({error}); it must be importable where the run "
            "starts, for example through PYTHONPATH"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"{where}: importing {name!r} raised {type(error).__name__}: {error}"
        ) from error
