"""TOML read, with errors in a line, and written."""

import json
import tomllib
from pathlib import Path
from typing import Any

from d2ft_fl.errors import ConfigError


def dump_toml(entries: dict[str, Any]) -> str:
    """Return flat TOML: JSON's spelling of strings, numbers and truth values is TOML's too."""
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items()
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Return the keys of a configuration file.

    Raises:
        ConfigError: When it cannot be read or is not flat TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} is not TOML: {error}") from None
