"""Options as people write them: files and ``key=value`` pairs, made into a configuration."""

import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2ft_fl.config.run_config import BUILTIN, HUB, RunConfig, resolve_path
from d2ft_fl.errors import ConfigError
from d2ft_fl.rounds.checks import checked
from d2ft_fl.util.toml import read_toml


def gather(files: list[Path], pairs: list[str], resume: Path | None = None) -> RunConfig:
    """The configuration of some files and ``key=value`` pairs, checked, its paths absolute.

    Args:
        resume: The folder of a run to go on with, whose options come before all others.

    Raises:
        ConfigError: When anything does not fit.
    """
    return checked(collect(files, pairs, resume))


def collect(files: list[Path], pairs: list[str], resume: Path | None = None) -> RunConfig:
    """The same, not checked yet.

    Raises:
        ConfigError: For a file that cannot be read, an unknown key or a wrong type.
    """
    entries: dict[str, Any] = {}
    if resume is not None:
        folder = resolve_path(str(resume))
        if not folder.joinpath("config.toml").is_file():
            raise ConfigError(f"--resume {str(resume)!r} holds no run: there is no config.toml")
        entries |= read_toml(folder / "config.toml") | {"resume": str(folder), "run-folder": ""}
    for file in files:
        entries |= absolute(read_toml(file), file.parent)
    entries |= parse_pairs(pairs)
    import_from_here()
    return RunConfig.from_mapping(entries)


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Options given as ``key=value``, their paths absolute.

    Raises:
        ConfigError: For what is no such pair.
    """
    entries: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set {pair!r} is not key=value")
        entries |= absolute({key.strip(): parse_value(text.strip())}, Path())
    return entries


def parse_value(text: str) -> Any:
    """A value as TOML spells it; what TOML does not know is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def absolute(entries: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Paths among the options, made absolute from the folder of the file that names them."""
    out = dict(entries)
    for key, builtin in BUILTIN.items():
        value = out.get(key)
        if isinstance(value, str) and value not in builtin and not value.startswith(HUB):
            out[key] = str(resolve_path(str(base / Path(out[key]).expanduser())))
    if isinstance(out.get("budgets"), str) and out["budgets"].endswith(".toml"):
        out["budgets"] = str(resolve_path(str(base / Path(out["budgets"]).expanduser())))
    return out


def import_from_here() -> None:
    """Find plug-ins where the command was started, which a console script does not import from."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
