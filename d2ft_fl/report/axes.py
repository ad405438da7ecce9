"""What runs are drawn over: rounds, or what was spent so far, in readable units."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from d2ft_fl.report.charts import Choice, Option
from d2ft_fl.report.format import PREFIXES

# By column of :attr:`d2ft_fl.report.run_folder.RunFolder.rounds`: its button, its axis, its unit.
COLUMNS = {
    "round": ("rounds", "round", ""),
    "cum_flops": ("FLOPs", "{} so far, all clients", "FLOP"),
    "cum_bytes_up": ("bytes up", "{} sent up so far, all clients", "B"),
    "cum_bytes_down": ("bytes down", "{} sent down so far, all clients", "B"),
    "cum_seconds": ("simulated time", "simulated {} so far", "s"),
}
TIMES = ((3 * 3600.0, 3600.0, "hours"), (600.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def x_choice(column: Callable[[str], Sequence[np.ndarray]]) -> Choice:
    """Offer what to draw over: rounds, or what was spent so far.

    Args:
        column: Returns the values of a column, one array for each trace.
    """
    return Choice("over", [_over(name, column(name)) for name in COLUMNS])


def _over(name: str, arrays: Sequence[np.ndarray]) -> Option:
    label, title, unit = COLUMNS[name]
    most = max((float(a.max()) for a in arrays if a.size), default=0.0)
    factor, named = scale(most, unit)
    return Option(
        label,
        {"x": [short(a / factor) for a in arrays]},
        {
            "xaxis.title.text": title.format(named),
            "xaxis.dtick": round_step(most) if name == "round" else None,
            "xaxis.autorange": True,
        },
    )


def scale(most: float, unit: str) -> tuple[float, str]:
    """Return what to divide by so that numbers up to ``most`` read well, and the unit then."""
    if unit == "s":
        return next((factor, name) for least, factor, name in TIMES if most >= least)
    prefixes = PREFIXES if unit else ()
    return next(((f, prefix + unit) for f, prefix in prefixes if most >= f), (1.0, unit))


def round_step(most: float) -> int:
    """Return the step between ticks of rounds: 1, 2 or 5 times a power of ten, for ten at most."""
    least = max(1.0, most / 10)
    power = 10 ** math.floor(math.log10(least))
    return int(next(power * step for step in (1, 2, 5, 10) if power * step >= least))


def short(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Round numbers to few digits, so that pages stay small; None for those that are not finite."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values]
