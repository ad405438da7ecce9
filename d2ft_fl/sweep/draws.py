"""Random search: where values come from, and the draws themselves.

The draw of an option in a sample is a hash of (draw-seed, option, number of the sample). So it does
not depend on which other options, samples or groups there are: what is added to a sweep leaves its
other trials as they were, and groups that search the same option see the same values.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

DIGITS = 6


def uniform(draw_seed: int, key: str, sample: int) -> float:
    """Return a number in [0, 1), the same for the same arguments everywhere."""
    digest = hashlib.sha256(f"{draw_seed} {key} {sample}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    values: tuple[Any, ...]

    def draw(self, u: float) -> Any:
        """Return the value that ``u`` in [0, 1) stands for."""
        return self.values[int(u * len(self.values))]

    @property
    def tried(self) -> tuple[Any, ...]:
        """Values of which each has to be one that some run takes."""
        return self.values

    def to_toml(self) -> dict[str, Any]:
        """Return the distribution as a file has it."""
        return {"choice": list(self.values)}


@dataclass(frozen=True)
class Span:
    """A number between two others, those included: whole numbers where both ends are.

    Attributes:
        log: Whether the logarithm is spread evenly, not the number.
    """

    least: float
    most: float
    log: bool = False

    def draw(self, u: float) -> float:
        """Return the value that ``u`` in [0, 1) stands for.

        Numbers have six digits, so that they can be read, and so that the last bits of another
        machine's logarithm do not make another trial.
        """
        whole = isinstance(self.least, int)
        low, high = (self.least - 0.5, self.most + 0.5) if whole else (self.least, self.most)
        if self.log:
            x = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            x = low + u * (high - low)
        x = round(x) if whole else float(f"{x:.{DIGITS}g}")
        return min(max(x, self.least), self.most)

    @property
    def tried(self) -> tuple[float, ...]:
        """Both ends: where a run takes neither of them, none between is meant."""
        return self.least, self.most

    def to_toml(self) -> dict[str, Any]:
        """Return the distribution as a file has it."""
        return {"min": self.least, "max": self.most} | ({"log": True} if self.log else {})


Draw = Choice | Span
