"""Which way each client goes: on how many examples and tokens, in how many passes, at which price.

For a given way, the knapsack finds each client's schedule. Ways are tried where a budget binds that
they relieve, and of what comes out the client's :mod:`worth <d2ft_fl.worth>` decides:

* FLOPs or a deadline: fewer examples, fewer tokens of each;
* memory: passes of single examples to begin with, as few as still fit in the end, for they cost
  nothing but time; activations computed again; fewer tokens;
* bytes up: changes in fewer bits.

Besides, the knapsack is asked for schedules in which gradients pass everywhere, and for such of
D2FT's three operations.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from d2ft_fl.budgets import UNLIMITED
from d2ft_fl.coding import BITS
from d2ft_fl.costs import RESOURCES
from d2ft_fl.local_options import Way
from d2ft_fl.passes import round_cost
from d2ft_fl.planner import Assignment, Participant
from d2ft_fl.rounds import Round
from d2ft_fl.worth import Worth

FLOPS, MEMORY, UP = (RESOURCES.index(r) for r in ("flops", "memory", "bytes_up"))
COARSE = (1.0, 0.5, 0.25, 0.125)  # shares of the examples that are tried first
FINE = 2  # times that the neighbourhood of the best one is halved
TOKENS = (1.0, 0.75, 0.5)  # shares of the patches
# What running a subnet is worth beside training it, and what leaving its gradient uncut is.
PASSING, CUTTING = (8.0, 8.0), (1.0, 0.0)


@dataclass
class _Best:
    """The best found so far of one client."""

    worth: float = 0.0
    share: float = 1.0
    assignment: Assignment | None = None


@dataclass
class Search:
    """The search for all clients of a round.

    Attributes:
        backward, forward: Scores common to all clients: float64 [blocks, heads].
    """

    round: Round
    backward: np.ndarray
    forward: np.ndarray
    found: dict[int, _Best] = field(default_factory=dict)

    def best(self) -> list[Assignment]:
        """The best round of each client, in order."""
        groups: dict[tuple[bool, bool, int], list[Participant]] = {}
        for client in self.round.clients:
            groups.setdefault(self._bound(client), []).append(client)
        for (short, narrow, bits), clients in groups.items():
            self._search(clients, short, narrow, bits)
        return [self._finished(client) for client in self.round.clients]

    def _bound(self, client: Participant) -> tuple[bool, bool, int]:
        """Whether compute or time binds, whether memory does, and in how many bits changes go."""
        costs, everything = (
            self.round.federation.costs_of(self.round.state),
            self.round.everything(),
        )
        passes = self.round.passes(client)
        whole = round_cost(costs, everything, client.examples, passes, client.holds)
        over = whole.vector() > client.capacity
        late = not client.on_time(whole)
        bits = costs.bits
        if over[UP] or late:
            beside = whole.bytes_up - costs.bytes_up(everything)
            room = -1 if late else int(client.capacity[UP]) - beside
            fit = (b for b, up in self._bytes_up.items() if up <= room)
            bits = next(fit, min(self._bytes_up))
        return bool(over[FLOPS]) or late, bool(over[MEMORY]), bits

    @cached_property
    def _bytes_up(self) -> dict[int, int]:
        """Bytes up of everything, by the bits in which changes can travel, descending."""
        costs, everything = (
            self.round.federation.costs_of(self.round.state),
            self.round.everything(),
        )
        coded = {bits: costs.along(Way(bits=bits)) for bits in BITS if bits <= costs.bits}
        return {
            bits: model.bytes_up(everything)
            for bits, model in coded.items()
            if bits == costs.bits or model.coded.any()
        }

    def _search(self, clients: list[Participant], short: bool, narrow: bool, bits: int) -> None:
        """Try what may help these clients, who are bound alike."""
        federation, state = self.round.federation, self.round.state
        costs = federation.costs_of(state)
        tokens = (
            TOKENS if (short or narrow) and not (costs.compensated or costs.calibrating) else (1.0,)
        )
        for share in tokens:
            for again in (False, True) if narrow and not costs.options.checkpointing else (None,):
                way = Way(
                    accumulate=costs.options.batch_size if narrow else None,
                    checkpointing=again,
                    tokens=None if share == 1 else federation.arch.tokens_of(share),
                    bits=None if bits == costs.bits else bits,
                )
                for weights in (PASSING, CUTTING):
                    self._try(clients, way, share, bits, weights, short)

    def _try(
        self,
        clients: list[Participant],
        way: Way,
        tokens: float,
        bits: int,
        weights: tuple[float, float],
        short: bool,
    ) -> None:
        """Try a way with shares of the examples."""
        own = [_Best() for _ in clients]

        def attempt(shares: np.ndarray) -> None:
            for index, (worth, a) in enumerate(
                self._planned(clients, shares, way, tokens, bits, weights)
            ):
                if worth > own[index].worth:
                    own[index] = _Best(worth, float(shares[index]), a)

        ones = np.ones(len(clients))
        for share in COARSE if short else (1.0,):
            attempt(ones * share)
        for step in range(1, 1 + FINE if short else 1):
            centre = np.array([best.share for best in own])
            for factor in (2 ** (-(0.5**step)), 2 ** (0.5**step)):
                attempt(np.minimum(1.0, centre * factor))
        for client, best in zip(clients, own, strict=True):
            if best.worth > self.found.setdefault(client.client, _Best()).worth:
                self.found[client.client] = best

    def _planned(
        self,
        clients: list[Participant],
        shares: np.ndarray,
        way: Way,
        tokens: float,
        bits: int,
        weights: tuple[float, float],
    ) -> list[tuple[float, Assignment]]:
        """Each client's schedule for a way and a share of its examples, and its worth."""
        federation, state = self.round.federation, self.round.state
        some = [
            replace(c, examples=max(1, round(share * c.examples)))
            for c, share in zip(clients, shares, strict=True)
        ]
        planner = federation.planner_along(state, way, *weights)
        passes = [self.round.passes(c) for c in some]
        planned = planner.plan(some, self.backward, self.forward, self.round.number, passes)
        operations = np.stack([a.schedule.operations for a in planned])
        worth = self._worth.of(
            operations,
            np.stack([planner.rank_share(a.schedule) for a in planned]),
            np.array([s.examples / c.examples for s, c in zip(some, clients, strict=True)]),
            tokens,
            bits,
        )
        worth = worth * operations.any(axis=(1, 2, 3))
        return [
            (float(value), replace(a, way=way, examples=s.examples))
            for value, a, s in zip(worth, planned, some, strict=True)
        ]

    @cached_property
    def _worth(self) -> Worth:
        return Worth(self.backward, self.forward)

    def _finished(self, client: Participant) -> Assignment:
        """A client's best, with what its budgets leave spent: fewer passes, more examples."""
        best = self.found[client.client].assignment
        if best is None or best.schedule.sits_out:
            return self.round.sit_out(client)
        best = self._more_examples(client, best)
        return self._fewer_passes(client, best)

    def _more_examples(self, client: Participant, a: Assignment) -> Assignment:
        """As many more examples as compute affords."""
        count = a.examples or 0
        if not 0 < count < client.examples:
            return a
        left = min(client.capacity[FLOPS], UNLIMITED) / max(1, a.cost.flops)
        fits, over, found = count, min(client.examples, int(count * left) + 1) + 1, a
        while over - fits > 1:
            tried = self.round.assign(client, a.schedule, (fits + over) // 2, a.way, a.passes)
            if client.affords(tried.cost):
                fits, found = (fits + over) // 2, replace(tried, gap=a.gap)
            else:
                over = (fits + over) // 2
        return found

    def _fewer_passes(self, client: Participant, a: Assignment) -> Assignment:
        """The fewest passes in which memory still suffices."""
        batch = self.round.federation.config.batch_size
        if a.way.accumulate is None:
            return a
        counts = {-(-batch // size) for size in range(1, batch + 1)}
        for passes in sorted(counts):
            way = replace(a.way, accumulate=passes)
            tried = self.round.assign(client, a.schedule, a.examples, way, a.passes)
            if client.affords(tried.cost):
                return replace(tried, gap=a.gap)
        return a
