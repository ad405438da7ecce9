"""TOML read, with errors in a line, and written."""

import codecs
import tomllib
from pathlib import Path
from typing import Any

from d2ft_fl.errors import ConfigError
from d2ft_fl.util.strict_json import write_json


def dump_toml(entries: dict[str, Any]) -> str:
    """Return flat TOML: JSON's spelling of strings, numbers and truth values is TOML's too."""
    return "".join(
        f"{key} = {write_json(value, ensure_ascii=False)}\n" for key, value in entries.items()
    )


def read_text(path: Path, what: str) -> str:
    """Return the text of a file, without the mark that some editors begin it with.

    Args:
        path: The file.
        what: What messages call it, like ``configuration file``.

    Raises:
        ConfigError: When it cannot be read or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {str(path)!r}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")  # Notepad writes a byte order mark
    except UnicodeDecodeError as error:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        reason = "UTF-16" if wide else f"not UTF-8 (byte {error.start})"
        raise ConfigError(f"{what} {str(path)!r} is {reason}; save it as UTF-8") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the keys of a configuration file.

    Raises:
        ConfigError: When it cannot be read or is not flat TOML.
    """
    try:
        return tomllib.loads(read_text(path, "configuration file"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {str(path)!r} is not TOML: {error}") from None
