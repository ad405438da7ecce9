"""One round's work for the clients, failures of clients, and a stopwatch."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # those who only carry blobs need no torch
    from torch import Tensor


MOST_LETTERS = 300  # of the reason of a failure


def short_reason(reason: str) -> str:
    """Return a reason as one line of readable length, of letters that can be printed.

    It comes from a client, which may send any text.

    Args:
        reason: Any text.
    """
    lines = reason[: 10 * MOST_LETTERS].strip().splitlines()
    line = lines[0] if lines else "no reason is known"
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 3] + "..."


@dataclass(frozen=True)
class ClientFailure:
    """A client that did not answer, and why, as :func:`short_reason` has it."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", short_reason(self.reason))


class Stopwatch:
    """Adds up seconds, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the time of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - started)

    def add(self, what: str, seconds: float) -> None:
        """Count some seconds."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds


@dataclass(frozen=True, eq=False)
class RoundDispatch:
    """One round's assignments, for a pool of clients to carry out.

    Attributes:
        round: The round's number, counted from 1.
        costs: Client -> how long its assignment is predicted to compute, as ``Cost.work`` has it.
        weights: The global model, for those that share memory with the server.
        encode: (client, shared) -> its message, without the model where that is shared.
        stopwatch: Seconds that the server spent, by what it did.
    """

    round: int
    costs: Mapping[int, int]
    weights: "Mapping[str, Tensor]"
    encode: Callable[[int, bool], bytes]
    stopwatch: "Stopwatch" = field(default_factory=Stopwatch)

    @property
    def model_bytes(self) -> int:
        """How large the global model is."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    @property
    def longest_first(self) -> list[int]:
        """Clients in the order in which few workers end at about the same time (Graham 1969)."""
        return sorted(self.costs, key=lambda client: (-self.costs[client], client))

    def shares(self, count: int) -> list[list[int]]:
        """Divide clients into ``count`` shares of about equal cost, longest first; none empty."""
        shares: list[list[int]] = [[] for _ in range(count)]
        totals = [0] * count
        for client in self.longest_first:
            least = totals.index(min(totals))
            shares[least].append(client)
            totals[least] += self.costs[client] or 1
        return [share for share in shares if share]
