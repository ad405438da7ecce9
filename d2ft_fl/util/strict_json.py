"""JSON that is always JSON: Python's own writes ``NaN`` and ``Infinity``, and reads them.

All that this project writes as JSON is written here, and what comes from another machine is read
here.
"""

import json
import math
from typing import Any

from d2ft_fl.errors import Refusal, ReplyError

SHOWN = 40  # letters of a value that is refused


def write_json(value: Any, **layout: Any) -> str:
    """Return a value as JSON; a number that is not finite is written as ``null``.

    Args:
        value: What to write.
        layout: Such as ``indent``, as ``json.dumps`` takes it.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_without_infinite(value), allow_nan=False, **layout)


def _without_infinite(value: Any) -> Any:
    """Return a value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: _without_infinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(text: str | bytes, most: int) -> dict[str, Any]:
    """Return the object that a stranger's JSON holds; its numbers are finite.

    Args:
        text: The JSON.
        most: The longest text that is looked at.

    Raises:
        ReplyError: When it is longer, or no such JSON.
    """
    if len(text) > most:
        raise ReplyError(f"JSON of {len(text)} characters, where {most} are the most that can be")
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ReplyError(f"JSON of a {type(value).__name__}, not of an object")
    return value


def whole(value: Any, what: str, low: int, high: int) -> int:
    """Return a whole number that a stranger sent, once it is one within a range.

    Args:
        value: What was sent.
        what: Its name.
        low: The smallest that it can be.
        high: The largest that it can be.

    Raises:
        Refusal: When it is none such.
    """
    if type(value) is not int or not low <= value <= high:
        raise refused(value, what, f"a whole number from {low} to {high}")
    return value


def refused(value: Any, what: str, allowed: str) -> Refusal:
    """Return the refusal of what a message says.

    Args:
        value: What it says.
        what: Of what.
        allowed: What it may say.
    """
    return Refusal(f"the message has {what} {repr(value)[:SHOWN]}, which is not {allowed}")


def _finite(text: str) -> float:
    """Return the number that a text says.

    Raises:
        ValueError: When it is not finite.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value
