"""Reading what runs and sweeps leave behind; what is damaged is named in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2ft_fl.errors import ConfigError


def damaged(path: Path, what: str) -> ConfigError:
    """Return the error that says what is wrong with a file."""
    return ConfigError(f"{str(path)!r} {what}: the folder is damaged, or not written by d2ft")


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file's value of a type; None where there is no such file.

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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, without a last one that is being written.

    They come one after the other: those of many clients and rounds need far more memory than what
    is made of them.

    Raises:
        ConfigError: When it cannot be read, with the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                yield _object(path, line, number)
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"cannot be read ({error})") from None


def _object(path: Path, line: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise damaged(path, f"is not JSON in line {number}") from None
    if not isinstance(value, dict):
        raise damaged(path, f"holds no object in line {number}")
    return value
