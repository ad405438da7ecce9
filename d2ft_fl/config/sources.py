"""Options as people write them: files and ``key=value`` pairs, made into a configuration."""

import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2ft_fl.config.choices import HUB
from d2ft_fl.config.renamed import RENAMED, renamed
from d2ft_fl.config.run_config import NO_PATHS, OPTIONS, RunConfig, resolve_path
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.toml import read_toml


def collect(files: list[Path], pairs: list[str], resume: Path | None = None) -> RunConfig:
    """Return the configuration of some files and ``key=value`` pairs, its paths absolute.

    It is not checked yet; see :func:`d2ft_fl.rounds.checks.checked`.

    Args:
        files: TOML files of options, of which a later one wins.
        pairs: Options as ``key=value``, which win over files.
        resume: The folder of a run to go on with, whose options come before all others.

    Raises:
        ConfigError: For a file that cannot be read, an unknown key or a wrong type.
    """
    entries: dict[str, Any] = {}
    if resume is not None:
        folder = resolve_path(str(resume))
        if not folder.joinpath("config.toml").is_file():
            raise ConfigError(f"--resume {str(resume)!r} holds no run: there is no config.toml")
        entries |= renamed(read_toml(folder / "config.toml")) | {
            "resume": str(folder),
            "run-folder": "",
        }
    for file in files:
        entries |= read_options(file)
    entries |= parse_pairs(pairs)
    import_from_here()
    return RunConfig.from_mapping(entries)


def read_options(file: Path) -> dict[str, Any]:
    """Return the options of a TOML file under their present names, their paths absolute.

    Raises:
        ConfigError: When the file cannot be read, or gives an option under two names.
    """
    return absolute(renamed(read_toml(file)), file.parent)


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Return options given as ``key=value`` under their present names, their paths absolute.

    Raises:
        ConfigError: For what is no such pair, and for an option that is given under two names.
    """
    entries: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set {pair!r} is not key=value")
        key = key.strip()
        option = OPTIONS.get(RENAMED.get(key, key))
        as_text = option is not None and option.kind is str
        entries[key] = parse_text(text.strip()) if as_text else parse_value(text.strip())
    return absolute(renamed(entries), Path())


def parse_text(text: str) -> str:
    """Return the value of a text option, which is the text itself; quotes around it are taken off.

    ``2026-11-29`` is a date in TOML, and ``[0.1]`` a list: neither is meant here.
    """
    value = parse_value(text) if text[:1] in ('"', "'") else text
    return value if isinstance(value, str) else text


def parse_value(text: str) -> Any:
    """Return a value as TOML spells it; what TOML does not know is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def absolute(entries: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return options whose paths are absolute.

    Args:
        entries: Options by their present names.
        base: The folder that relative paths start from: that of the file that names them.
    """
    out = dict(entries)
    for key, no_path in NO_PATHS.items():
        value = out.get(key)
        if isinstance(value, str) and value not in no_path and not value.startswith(HUB):
            out[key] = str(resolve_path(str(base / Path(out[key]).expanduser())))
    if isinstance(out.get("budgets"), str) and out["budgets"].endswith(".toml"):
        out["budgets"] = str(resolve_path(str(base / Path(out["budgets"]).expanduser())))
    return out


def import_from_here() -> None:
    """Find plug-ins where the command was started, which a console script does not import from."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
