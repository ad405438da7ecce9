"""What a round wants done, and what comes back when it is not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # those who only carry blobs need no torch
    from torch import Tensor


@dataclass(frozen=True)
class Fault:
    """A client that did not answer, and why."""

    reason: str


@dataclass(frozen=True, eq=False)
class Work:
    """One round's assignments, for a pool of clients to carry out.

    Attributes:
        round: Counted from 1.
        costs: Client -> predicted FLOPs of what it has to do.
        weights: The global model, for those that share memory with the server.
        encode: (client, shared) -> its message, without the model where that is shared.
    """

    round: int
    costs: Mapping[int, int]
    weights: "Mapping[str, Tensor]"
    encode: Callable[[int, bool], bytes]

    @property
    def longest_first(self) -> list[int]:
        """Clients in the order in which few workers end at about the same time (Graham 1969)."""
        return sorted(self.costs, key=lambda client: (-self.costs[client], client))

    def shares(self, count: int) -> list[list[int]]:
        """Clients in so many shares of about the same cost, longest first; none is empty."""
        shares: list[list[int]] = [[] for _ in range(count)]
        totals = [0] * count
        for client in self.longest_first:
            least = totals.index(min(totals))
            shares[least].append(client)
            totals[least] += self.costs[client] or 1
        return [share for share in shares if share]
