"""Each client's execution policy: on how many examples, in how many micro-batches and bits.

For a given way, the knapsack finds each client's schedule. Ways are tried where a budget binds that
they relieve, and of what comes out the client's :mod:`worth <d2ft_fl.planning.utility>` decides:

* FLOPs or a deadline: fewer examples, in turn and in smaller batches. All that a client has count
  in the mean, whatever it trains on, and the server goes further along what few examples changed;
* memory: passes of single examples to begin with, as few as still fit in the end, for they cost
  nothing but time; activations computed again;
* bytes up: changes in the most bits in which everything could travel;
* bytes down: weights in fewer bits, which takes changes in fewer bits;
* a deadline: all of these bits.

The knapsack is asked for schedules in which gradients pass everywhere, and besides for such as
``forward-weight`` and ``frozen-weight`` say, which are of D2FT's three operations unless told
otherwise. Fewer tokens are not tried: fewer examples were better (docs/accuracy.md).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np

from d2ft_fl.config.choices import DOWNLOAD_BITS, PLAIN_BITS, UPLOAD_BITS
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.probe_costs import round_cost
from d2ft_fl.costs.resources import RESOURCES, Cost
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.utility import Utility
from d2ft_fl.rounds.context import Round, most

FLOPS, MEMORY, UP, DOWN = map(RESOURCES.index, ("flops", "memory", "bytes_up", "bytes_down"))
COARSE = (1.0, 0.5, 0.25, 0.125)  # shares of the examples that are tried first
FINE = (2**-0.5, 2**0.5, 2**-0.25, 2**0.25)  # times the best one so far, one after the other
RATE, MOST_RATE = 0.5, 3.0  # learning rates grow with the learned share to the power of -RATE
BATCH = 0.5  # batches shrink with the share of the examples to the power of BATCH
STEP, MOST_STEP = 0.25, 1.5  # the server's steps, with that of the examples to the power of -STEP
# What running a subnet is worth beside training it, and what leaving its gradient uncut is: so much
# that a gradient is cut, or a subnet skipped, where there is no other way.
PASSING = (8.0, 8.0)

BitWidths = tuple[int | None, int | None]  # bits up and down; None for as many as configured
AS_THEY_ARE: BitWidths = (None, None)


@dataclass(frozen=True)
class Bound:
    """What binds a client.

    Attributes:
        short: Whether compute or time does. narrow: Whether memory does.
        codings: In which bits numbers may travel; the first are tried first.
    """

    short: bool
    narrow: bool
    bit_widths: tuple[BitWidths, ...]


def _problem(c: Participant) -> Hashable:
    """Return what a client's best round depends on, beside the scores."""
    cached = None if c.cached is None else c.cached.tobytes()
    return c.examples, c.local, c.budget, c.capacity.tobytes(), cached


@dataclass
class _Best:
    """The best found so far of one client, on which share of its examples."""

    utility: float = 0.0
    share: float = 1.0
    assignment: Assignment | None = None


@dataclass
class Search:
    """The search for all clients of a round.

    Attributes:
        backward, forward: Scores common to all clients: float64 [blocks, heads].
        preferred: Backward scores that schedules are made for, where others come first in this
            round than what matters most: what a round is worth goes by ``backward``.
    """

    round: Round
    backward: np.ndarray
    forward: np.ndarray
    preferred: np.ndarray
    _found: defaultdict[int, _Best] = field(default_factory=lambda: defaultdict(_Best))

    def best(self) -> list[Assignment]:
        """Return the best round of each client, in order."""
        alike: dict[Hashable, Participant] = {}  # who stands for whom
        for client in self.round.clients:
            alike.setdefault(_problem(client), client)
        groups: defaultdict[Bound, list[Participant]] = defaultdict(list)
        for client in alike.values():
            groups[self._bound(client)].append(client)
        for bound, clients in groups.items():
            self._search(clients, bound)
        found = {problem: self._finished(client) for problem, client in alike.items()}
        return [replace(found[_problem(c)], client=c.client) for c in self.round.clients]

    def _bound(self, client: Participant) -> Bound:
        """Return what would keep a client from training everything as configured."""
        whole = self._whole(client, ExecutionPolicy())
        over, late = whole.vector() > client.capacity, not client.on_time(whole)
        pairs = self._all_bits if late else self._bits(client, whole, over)
        bit_widths = tuple(dict.fromkeys(self._bit_widths(*pair) for pair in pairs))
        # What a coded change began with is held, so that more can be too much for memory.
        quantized = self._whole(
            client, ExecutionPolicy(bits_up=bit_widths[0][0], bits_down=bit_widths[0][1])
        )
        return Bound(
            short=bool(over[FLOPS]) or late,
            narrow=quantized.memory > client.capacity[MEMORY],
            bit_widths=bit_widths,
        )

    def _whole(self, client: Participant, policy: ExecutionPolicy) -> Cost:
        """Return what training everything takes."""
        costs = self.round.federation.costs_of(self.round.state, policy)
        probes = self.round.probes(client)
        return round_cost(costs, self.round.everything(), client.examples, probes, client.cached)

    def _bit_widths(self, up: int, down: int) -> BitWidths:
        """Bits as a way has them."""
        costs = self.round.federation.costs_of(self.round.state)
        return None if up == costs.bits_up else up, None if down == costs.bits_down else down

    def _bits(self, client: Participant, whole: Cost, over: np.ndarray) -> list[tuple[int, int]]:
        """Bits up and down to try where bytes bind, the best first, and as configured."""
        configured = max(self._bytes_up), max(self._bits_down)
        if not (over[UP] or over[DOWN]) or len(self._bytes_up) == 1:
            return [configured]
        down = min(self._bits_down) if over[DOWN] else configured[1]
        able = [bits for bits in self._bytes_up if bits < PLAIN_BITS or down == PLAIN_BITS]
        room = int(client.capacity[UP]) - (whole.bytes_up - self._bytes_up[configured[0]])
        up = next((bits for bits in able if self._bytes_up[bits] <= room), min(able))
        found = [(up, down), configured]
        if up < PLAIN_BITS:  # what a change began with is held in as many bits as it came in
            found.insert(1, (up, min(self._bits_down)))
        return found

    @cached_property
    def _all_bits(self) -> list[tuple[int, int]]:
        """All bits up and down that go together, the fewest first."""
        pairs = product(sorted(self._bytes_up), sorted(self._bits_down))
        return [(up, down) for up, down in pairs if up < PLAIN_BITS or down == PLAIN_BITS]

    @cached_property
    def _bytes_up(self) -> dict[int, int]:
        """Bytes up of everything, by the bits in which changes can travel, descending."""
        costs = self.round.federation.costs_of(self.round.state)
        quantized = {
            bits: costs.under(ExecutionPolicy(bits_up=bits))
            for bits in UPLOAD_BITS
            if bits <= costs.bits_up
        }
        return {
            bits: model.bytes_up(self.round.everything())
            for bits, model in quantized.items()
            if bits == costs.bits_up or model.communication.spared_up.any()
        }

    @cached_property
    def _bits_down(self) -> list[int]:
        """Bits in which weights can travel, where changes can in fewer than 32."""
        costs = self.round.federation.costs_of(self.round.state)
        return [bits for bits in DOWNLOAD_BITS if bits <= costs.bits_down]

    def _search(self, clients: list[Participant], bound: Bound) -> None:
        """Try what may help these clients, who are bound alike."""
        costs = self.round.federation.costs_of(self.round.state)
        count = costs.options.batch_size if bound.narrow else None
        policy, *quantized = (
            ExecutionPolicy(micro_batches=count, bits_up=up, bits_down=down, in_turn=True)
            for up, down in bound.bit_widths
        )
        for share in COARSE if bound.short else COARSE[:1]:
            self._attempt(clients, policy, PASSING, np.full(len(clients), share))
        self._refine(clients, policy, PASSING, FINE if bound.short else ())
        config = self.round.federation.config
        cutting = config.forward_weight, config.frozen_weight
        others = [(policy, cutting)]
        if bound.narrow and not costs.options.checkpointing:
            again = replace(policy, checkpointing=True)
            others = [(again, PASSING), (again, cutting), *others]
        others += [(other, PASSING) for other in quantized]
        for other, weights in others:
            self._refine(clients, other, weights, (1.0, *FINE[:2]) if bound.short else (1.0,))

    def _refine(
        self,
        clients: list[Participant],
        policy: ExecutionPolicy,
        weights: tuple[float, float],
        factors: Iterable[float],
    ) -> None:
        """Try a way on the best shares so far times some factors."""
        for factor in factors:
            shares = np.array([self._found[c.client].share for c in clients])
            self._attempt(clients, policy, weights, np.minimum(1.0, shares * factor))

    def _attempt(
        self,
        clients: list[Participant],
        policy: ExecutionPolicy,
        weights: tuple[float, float],
        shares: np.ndarray,
    ) -> None:
        """Plan each client's schedule for a way and a share of its examples; keep what is best."""
        federation, state = self.round.federation, self.round.state
        some = [
            replace(c, examples=max(1, round(share * c.examples)))
            for c, share in zip(clients, shares.tolist(), strict=True)
        ]
        planner = federation.planner_under(state, policy, *weights)
        probes = [self.round.probes(c) for c in some]
        planned = planner.plan(some, self.preferred, self.forward, self.round.number, probes)
        utility = self._utility.of(
            np.stack([a.schedule.operations for a in planned]),
            np.stack([planner.rank_share(a.schedule) for a in planned]),
            np.array([s.examples / c.examples for s, c in zip(some, clients, strict=True)]),
            [(planner.costs.bits_up, planner.costs.bits_down)] * len(some),
        )
        for value, share, own, a in zip(
            utility.tolist(), shares.tolist(), some, planned, strict=True
        ):
            if value > self._found[own.client].utility and not a.schedule.sits_out:
                a = replace(a, policy=policy, examples=own.examples)
                self._found[own.client] = _Best(value, share, a)

    @cached_property
    def _utility(self) -> Utility:
        return Utility(self.backward, self.forward)

    def _finished(self, client: Participant) -> Assignment:
        """Return a client's best, with more examples and fewer micro-batches as budgets allow."""
        best = self._found[client.client].assignment
        if best is None:
            return self.round.sit_out(client)
        best = self._smaller_batches(client, self._more_examples(client, best))
        best = self._fewer_micro_batches(client, best)
        saved = client.examples / (best.examples or client.examples)
        policy = replace(best.policy, rate=self._rate(best), weight=saved, step=self._step(saved))
        return replace(best, policy=policy)

    def _step(self, saved: float) -> float:
        """Who trains on fewer examples, by this factor, is followed further, where steps count."""
        steps = self.round.federation.components.takes_steps
        return min(MOST_STEP, saved**STEP) if steps else 1.0

    def _rate(self, a: Assignment) -> float:
        """Who trains less of the model takes larger steps, or it learns less from each."""
        ranks = np.ones((1, *self.round.shape))
        learned = float(self._utility.learned(a.schedule.operations[None], ranks)[0])
        return min(MOST_RATE, learned**-RATE)

    def _more_examples(self, client: Participant, a: Assignment) -> Assignment:
        """On as many more examples as compute affords, which is less than half as many again."""
        fits = a.examples or 0
        # FLOPs are all but linear: what is left is spent at once, or it is time that binds.
        share = min(2.0, int(client.capacity[FLOPS]) / max(1, a.cost.flops))
        over = min(client.examples, fits + fits // 2) + 1
        first = min(over - 1, int(fits * share))
        return (
            most(fits, over, lambda n: self._affordable(client, replace(a, examples=n)), first) or a
        )

    def _smaller_batches(self, client: Participant, a: Assignment) -> Assignment:
        """On fewer examples in smaller batches, so that steps fall less than examples do."""
        config = self.round.federation.config
        share = (a.examples or client.examples) / client.examples
        size = max(config.slots, round(config.batch_size * share**BATCH))
        # In several slots another batch shares examples out differently, at another cost.
        policies = (replace(a.policy, batch=larger) for larger in range(size, config.batch_size))
        tried = (self._affordable(client, replace(a, policy=policy)) for policy in policies)
        return next(filter(None, tried), a)

    def _fewer_micro_batches(self, client: Participant, a: Assignment) -> Assignment:
        """In the fewest passes in which memory still suffices."""
        if a.policy.micro_batches is None:
            return a
        policies = (
            replace(a.policy, micro_batches=count)
            for count in self.round.micro_batch_counts(a.policy)
        )
        tried = (self._affordable(client, replace(a, policy=policy)) for policy in policies)
        return next(filter(None, tried), a)

    def _affordable(self, client: Participant, a: Assignment) -> Assignment | None:
        """Return an assignment at its cost, if that is within every budget."""
        found = self.round.assign(client, a.schedule, a.examples, a.policy, a.probes)
        return replace(a, cost=found.cost) if client.affords(found.cost) else None
