"""Reading what runs and sweeps leave behind; what is damaged is named in one line."""

import json
from pathlib import Path
from typing import Any

from d2ft_fl.errors import ConfigError


def damaged(path: Path, what: str) -> ConfigError:
    """The error that says what is wrong with a file."""
    return ConfigError(f"{str(path)!r} {what}: the folder is damaged, or not written by d2ft")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file's value, of a type; None where there is no such file.

    Raises:
        ConfigError: When it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise damaged(path, f"is not JSON ({error})") from None
    if not isinstance(value, kind):
        raise damaged(path, f"holds no {kind.__name__}")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without a last one that is still being written.

    Raises:
        ConfigError: When it cannot be read, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            raise damaged(path, f"is not JSON in line {number}") from None
        if not isinstance(row, dict):
            raise damaged(path, f"holds no object in line {number}")
        rows.append(row)
    return rows
