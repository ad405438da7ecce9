"""Units, labels and words of everything that is shown, in one place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2ft_fl.budgets.budget import DEADLINE
from d2ft_fl.config.renamed import policy_entries
from d2ft_fl.tasks.metrics import MetricSpec

LABELS = {"flops": "FLOPs", "memory": "memory", "bytes_up": "up", "bytes_down": "down"}


USED = {
    "flops": "FLOPs, all clients and rounds",
    "memory": "peak memory, mean client",
    "bytes_up": "bytes up, all clients and rounds",
    "bytes_down": "bytes down, all clients and rounds",
}


PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float, unit: str) -> str:
    """Write a number with a prefix and its unit: 1.23 GFLOP."""
    for factor, prefix in PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def unit_of(resource: str) -> str:
    """Return the unit of a resource."""
    return "FLOP" if resource == "flops" else "B"


def policy_words(entries: Mapping[str, Any]) -> str:
    """Say in few words how a client runs its schedule, where that is not as it is configured.

    Args:
        entries: Of an :class:`~d2ft_fl.config.training_options.ExecutionPolicy`, as
            ``clients.jsonl`` has them.
    """
    entries = policy_entries(entries)
    batch = entries.get("batch")
    tokens, micro_batches = entries.get("tokens"), entries.get("micro_batches") or 1
    up, down = entries.get("bits_up"), entries.get("bits_down")
    parts = [
        f"batch {batch}" * bool(batch),
        f"{tokens} tokens" * bool(tokens),
        f"{micro_batches} micro-batches" * (micro_batches > 1),
        "checkpointing" * bool(entries.get("checkpointing")),
        f"{up} bits both ways" if up and up == down else f"{up} bits up" * bool(up),
        f"{down} bits down" * bool(down and up != down),
    ]
    return ", ".join(filter(None, parts))


LIMIT_LABELS = {**LABELS, DEADLINE: "deadline"}


OPERATIONS = {"full": "FULL", "frozen": "FROZEN", "forward_only": "FWD", "shortcut": "SKIP"}


def seconds(value: float) -> str:
    """Write seconds with three digits, or whole seconds where there are more."""
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


UNNAMED = "unnamed"  # devices without a name


@dataclass(frozen=True)
class MetricFormat:
    """How values of a metric are written: shares in per cent, everything else as numbers.

    Attributes:
        factor: What values are multiplied by where they are written without a sign of their unit.
        value: Format of one value.
        mean: Format of a mean over runs, times ``factor``.
        unit: What follows a mean.
        half: Format of half a mean's interval, times ``factor``.
        difference: Format of a difference of means, times ``factor``.
        points: What differences are counted in, as it follows their number.
        difference_title: Title of an axis of differences.
        difference_head: Head of a column of differences.
        tick: Format of a chart's ticks, as d3 has them.
        hover: Format of a chart's values under the pointer, as d3 has them.
        range: The least and the greatest possible value.
    """

    factor: float
    value: str
    mean: str
    unit: str
    half: str
    difference: str
    points: str
    difference_title: str
    difference_head: str
    tick: str
    hover: str
    range: tuple[float, float]

    def text(self, value: float) -> str:
        """Write one value: 97.4%."""
        return format(value, self.value)

    def mean_text(self, mean: float, half: float | None) -> str:
        """Write a mean and half its interval: 97.4% ± 1.2; a dash for NaN."""
        if mean != mean:
            return "-"
        return f"{self.factor * mean:{self.mean}}{self.unit}" + self._interval(half)

    def bare_text(self, mean: float, half: float | None) -> str:
        """Write a mean and half its interval without a unit: 97.4 ± 1.2."""
        return f"{self.factor * mean:{self.mean}}" + self._interval(half)

    def difference_text(self, mean: float, half: float | None) -> str:
        """Write a mean difference and half its interval: +1.2 ± 0.3."""
        if mean != mean:
            return "no pairs"
        return f"{self.factor * mean:{self.difference}}" + self._interval(half)

    def _interval(self, half: float | None) -> str:
        return "" if half is None else f" ± {self.factor * half:{self.half}}"


PERCENT = MetricFormat(
    factor=100.0,
    value=".1%",
    mean=".1f",
    unit="%",
    half=".1f",
    difference="+.1f",
    points=" points",
    difference_title="difference, percentage points",
    difference_head="difference, points",
    tick=".0%",
    hover=".1%",
    range=(0.0, 1.0),
)
NUMBER = MetricFormat(
    factor=1.0,
    value=".3f",
    mean=".4g",
    unit="",
    half=".2g",
    difference="+.3g",
    points="",
    difference_title="difference",
    difference_head="difference",
    tick="",
    hover=".3g",
    range=(-math.inf, math.inf),
)


def metric_format(spec: MetricSpec, name: str) -> MetricFormat:
    """Return how a task's metric is written."""
    return PERCENT if name in spec.percent else NUMBER


def metric_label(name: str) -> str:
    """Return a metric's name as it stands in a sentence."""
    return name.replace("_", " ")


def heading(text: str) -> str:
    """Return a text with a capital first letter; the others stay as they are."""
    return text[:1].upper() + text[1:]
