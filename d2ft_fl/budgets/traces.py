"""Budgets that vary by round: a factor for every client and round, without any state.

With ``u = frac((round - 1) / period + client * phi)``, ``phi`` the golden ratio's fraction (which
spreads the clients of any class over the period; Knuth, The Art of Computer Programming 3, 6.4):

* ``battery``, period 10: ``1 - 0.7 u / 0.8`` while the charge falls (``u < 0.8``), then back up,
  ``0.3 + 0.7 (u - 0.8) / 0.2``. The device saves power: FLOPs and speed.
* ``load``, period 24, a day: ``1 - 0.6 (1 - |2 u - 1|)``; 1 at night, 0.4 at noon. Other programs
  use the device: FLOPs, speed and memory.
* a list of factors in (0, 1], for all clients alike, over and over: FLOPs and speed.

They are shapes to test with, not measurements of devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from d2ft_fl.budgets.budget import Amount, Budget
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import meant

PHI = (math.sqrt(5) - 1) / 2


def _battery(u: float) -> float:
    return 1 - 0.7 * u / 0.8 if u < 0.8 else 0.3 + 0.7 * (u - 0.8) / 0.2


def _load(u: float) -> float:
    return 1 - 0.6 * (1 - abs(2 * u - 1))


@dataclass(frozen=True)
class _Shape:
    period: int
    at: Callable[[float], float]
    scales: tuple[str, ...]


_SHAPES = {
    "battery": _Shape(10, _battery, ("flops", "speed")),
    "load": _Shape(24, _load, ("flops", "speed", "memory")),
}


@dataclass(frozen=True)
class Trace:
    """How a class's budget goes up and down.

    Attributes:
        name: ``battery``, ``load`` or ``list``.
        factors: Of a list.
    """

    name: str
    factors: tuple[float, ...] = ()

    @property
    def scales(self) -> tuple[str, ...]:
        """The entries of a budget that the trace scales."""
        return _SHAPES[self.name].scales if self.name in _SHAPES else ("flops", "speed")

    def factor(self, client: int, round_number: int) -> float:
        """Return the factor of a client's budget in a round, in (0, 1]; rounds count from 1."""
        if self.factors:
            return self.factors[(round_number - 1) % len(self.factors)]
        shape = _SHAPES[self.name]
        return shape.at(((round_number - 1) / shape.period + client * PHI) % 1)

    def apply(self, budget: Budget, client: int, round_number: int) -> Budget:
        """Return a client's budget in a round; what ``budget`` does not limit stays unlimited."""
        factor = self.factor(client, round_number)
        scaled: dict[str, Any] = {}
        for name in self.scales:
            value = getattr(budget, name)
            if isinstance(value, Amount):
                scaled[name] = replace(value, value=value.value * factor)
            elif value is not None:
                scaled[name] = value * factor
        return replace(budget, **scaled)

    def __str__(self) -> str:
        """Return the trace as a file spells it."""
        return f"[{', '.join(f'{f:g}' for f in self.factors)}]" if self.factors else self.name


def parse_trace(value: Any, where: str) -> Trace:
    """Return a trace from its TOML value.

    Args:
        value: A name, or a list of factors.
        where: What error messages begin with.

    Raises:
        ConfigError: When there is none such, naming what may be written.
    """
    if isinstance(value, str) and value in _SHAPES:
        return Trace(value)
    numbers = isinstance(value, list) and all(type(f) in (int, float) for f in value)
    if not numbers or not value or not all(0 < f <= 1 for f in value):
        raise ConfigError(
            f"{where}: trace = {value!r} is unknown{meant(str(value), _SHAPES)}; use "
            f"{', '.join(map(repr, _SHAPES))}, or a list of factors above 0 and at most 1"
        )
    return Trace("list", tuple(float(f) for f in value))
