"""What somebody may have meant by a name that nothing has."""

import difflib
from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str:
    """Return a remark with the nearest known name; empty where none is near.

    Args:
        name: What was written.
        known: All names there are.
    """
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]!r}?)" if near else ""


def unknown(where: str, name: str, known: Iterable[str]) -> str:
    """Return the refusal of a name, with the nearest one and all that there are.

    Args:
        where: What the message begins with, up to the name, like ``strategy = ``.
        name: What was written.
        known: All names there are, in the order to show them.
    """
    known = list(known)
    return f"{where}{name!r} is unknown{meant(name, known)}; use one of {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: the nearest of many names, or all where none is near.

    Args:
        name: What was written.
        known: All names there are.
    """
    known = list(known)
    return meant(name, known).strip(" ()") or f"known are {', '.join(known)}"
