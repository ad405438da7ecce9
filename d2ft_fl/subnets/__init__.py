"""The vocabulary: which slice of which parameter is whose, and what it does in a round."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Offer what strategies imported from here before ``from d2ft_fl import ...``."""
    if name in ("Operation", "Schedule"):
        from d2ft_fl.subnets import schedule

        return getattr(schedule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
