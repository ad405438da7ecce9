"""On which line of a TOML text each table and key stands, for messages that name it.

A TOML file is a sequence of statements (headers, and keys with their values), and whether a
statement is complete does not depend on those before it. So the text is cut where what was read
since the last cut parses on its own, and every statement's keys get the line that it starts on.
Tables of an array, ``[[name]]``, are told apart by their number: ``("name", "0", "key")``.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

Path = tuple[str, ...]


def line_numbers(text: str) -> dict[Path, int]:
    """Return lines, counted from 1, by path: ``("classes", "phone", "flops")``.

    Args:
        text: What :mod:`tomllib` accepts; of other texts the result means nothing.
    """
    found: dict[Path, int] = {}
    arrays: dict[Path, int] = {}
    table: Path = ()
    statement, start = "", 1
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value goes on in the next line
        paths = list(_paths(parsed))
        if statement.lstrip().startswith("["):
            if statement.lstrip().startswith("[["):
                array = (*_numbered(paths[-1][:-1], arrays), paths[-1][-1])
                found.setdefault(array, start)
                arrays[array] = arrays.get(array, -1) + 1
            paths = [_numbered(path, arrays) for path in paths]
            table = paths[-1]
        else:
            paths = [table + path for path in paths]
        for path in paths:
            found.setdefault(path, start)
        statement, start = "", number + 1
    return found


def _numbered(path: Path, arrays: Mapping[Path, int]) -> Path:
    """Return a header's path, with the number of the table at hand behind each array's name."""
    out: Path = ()
    for name in path:
        out += (name,)
        if out in arrays:
            out += (str(arrays[out]),)
    return out


def _paths(table: Mapping[str, Any], above: Path = ()) -> Iterator[Path]:
    """Yield the path of every key in nested tables, outer ones first."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, list) and value:  # the header of an array of tables
            value = value[0]
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def error_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    """Return the line that tomllib gives, or the last one where it says "at end of document"."""
    told = re.search(r"\(at line (\d+), column \d+\)$", str(error))
    return int(told[1]) if told else text.rstrip().count("\n") + 1


class Locator:
    """Names places of one TOML text: ``mine.toml:3``. Looks for them when first asked."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text

    @cached_property
    def _lines(self) -> dict[Path, int]:
        return line_numbers(self.text)

    def has(self, *path: str) -> bool:
        """Return whether a table or key stands in the text."""
        return path in self._lines

    def __call__(self, *path: str) -> str:
        """Return where ``path`` stands, or the nearest table above in the text; else line 1."""
        above = (path[:length] for length in range(len(path), 0, -1))
        return f"{self.name}:{next((self._lines[p] for p in above if p in self._lines), 1)}"
