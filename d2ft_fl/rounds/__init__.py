"""One round as a pure function: state and reports in, plan and messages out."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Offer what strategies imported from here before ``from d2ft_fl import ...``."""
    if name in ("Assignment", "Round"):
        from d2ft_fl.rounds import context

        return getattr(context, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
