"""The base class of tunings, whose documentation says when each hook is called."""

from d2ft_fl import Tuning

__all__ = ["Tuning"]
