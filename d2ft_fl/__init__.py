"""Federated fine-tuning of transformers under hard per-client budgets, head by head.

What this package itself offers is public and listed in ``__all__``; :mod:`d2ft_fl.api` describes
it. Each name is imported when it is first used, so that ``import d2ft_fl`` takes no time. All other
modules are internal and may move in any version.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from d2ft_fl import api
from d2ft_fl.api import __all__ as __all__

if TYPE_CHECKING:
    from d2ft_fl.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        return getattr(api, name)


__version__ = "0.1.0"

# A wheel has the packages `strategies` and `clients` inside this one, a checkout beside it. Here
# they are d2ft_fl.strategies and d2ft_fl.clients in both, whatever a user's own folders are called.
if not (Path(__file__).parent / "strategies").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))  # noqa: F405


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
