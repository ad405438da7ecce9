"""Each client's execution policy: on how many examples, in how many micro-batches and bits.

For a given execution policy, the knapsack finds each client's schedule. A policy is tried where a
budget binds that the policy relieves. The result of highest :mod:`utility
<d2ft_fl.planning.utility>` is taken. By the budget that binds, the policies have:

* FLOPs or a deadline: fewer examples, in turn and in smaller batches. All of a client's examples
  count in the mean, whatever it trains on. The server takes a larger step along a change that was
  trained on few examples;
* memory: micro-batches of single examples during the search, and afterwards the fewest
  micro-batches that fit, for they cost nothing but time; activations computed again;
* bytes up: changes in the most bits in which everything could travel;
* bytes down: weights in fewer bits, which requires changes in fewer bits;
* a deadline: every combination of bits up and down.

The knapsack is asked for schedules in which gradients flow through every subnet, and for schedules
by ``forward-weight`` and ``frozen-weight``, which by default have D2FT's three operations. Fewer
tokens are not tried: fewer examples were better (docs/accuracy.md).
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
from d2ft_fl.planning.planner import Planner
from d2ft_fl.planning.utility import Utility
from d2ft_fl.rounds.context import Round, most

FLOPS, MEMORY, UP, DOWN = map(RESOURCES.index, ("flops", "memory", "bytes_up", "bytes_down"))
COARSE = (1.0, 0.5, 0.25, 0.125)  # shares of the examples that are tried first
FINE = (2**-0.5, 2**0.5, 2**-0.25, 2**0.25)  # factors of the best share so far, tried in turn
RATE, MOST_RATE = 0.5, 3.0  # learning rates grow with the learned share to the power of -RATE
BATCH = 0.5  # batches shrink with the share of the examples to the power of BATCH
STEP, MOST_STEP = 0.25, 1.5  # the server's steps, with that of the examples to the power of -STEP
# Weights of running a subnet and of FROZEN, beside training it: so high that a subnet is skipped,
# or a gradient cut, only where budgets leave no choice.
PASSING = (8.0, 8.0)

BitWidths = tuple[int | None, int | None]  # bits up and down; None for as many as configured
AS_THEY_ARE: BitWidths = (None, None)


@dataclass(frozen=True)
class Bound:
    """Which budgets bind a client.

    Attributes:
        short: Whether compute or the deadline binds.
        narrow: Whether memory binds.
        bit_widths: Bits in which numbers may travel up and down, in the order in which they are
            tried.
    """

    short: bool
    narrow: bool
    bit_widths: tuple[BitWidths, ...]


def _problem(c: Participant) -> Hashable:
    """Return what a client's best round depends on, apart from the scores."""
    cached = None if c.cached is None else c.cached.tobytes()
    return c.examples, c.local, c.budget, c.capacity.tobytes(), cached


def _on_shares(clients: list[Participant], shares: np.ndarray) -> list[Participant]:
    """Return clients with shares of their examples, at least one each."""
    return [
        replace(c, examples=max(1, round(share * c.examples)))
        for c, share in zip(clients, shares.tolist(), strict=True)
    ]


@dataclass
class _Best:
    """The best assignment so far of one client.

    Attributes:
        utility: Its utility.
        share: The share of the client's examples that it trains on.
        assignment: The assignment; None before any was better than sitting out.
    """

    utility: float = 0.0
    share: float = 1.0
    assignment: Assignment | None = None


@dataclass
class Search:
    """The search of execution policies for all clients of a round.

    Attributes:
        round: The round, with its clients.
        backward: Scores of training each subnet, which utility is measured by: float64 [blocks,
            heads].
        forward: Scores of running each subnet: float64 [blocks, heads].
        preferred: Scores of training that schedules are planned for: float64 [blocks, heads]. They
            differ from ``backward`` where the round prefers other subnets.
    """

    round: Round
    backward: np.ndarray
    forward: np.ndarray
    preferred: np.ndarray
    _best: defaultdict[int, _Best] = field(default_factory=lambda: defaultdict(_Best))

    def best(self) -> list[Assignment]:
        """Return the best round of each client, in order."""
        representatives: dict[Hashable, Participant] = {}  # one client of each problem
        for client in self.round.clients:
            representatives.setdefault(_problem(client), client)
        groups: defaultdict[Bound, list[Participant]] = defaultdict(list)
        for client in representatives.values():
            groups[self._bound(client)].append(client)
        for bound, clients in groups.items():
            self._search(clients, bound)
        finished = {problem: self._finished(client) for problem, client in representatives.items()}
        return [replace(finished[_problem(c)], client=c.client) for c in self.round.clients]

    def _bound(self, client: Participant) -> Bound:
        """Return which budgets keep a client from training everything as configured."""
        whole = self._whole(client, ExecutionPolicy())
        over, late = whole.vector() > client.capacity, not client.on_time(whole)
        pairs = self._all_bits if late else self._bits(client, whole, over)
        bit_widths = tuple(dict.fromkeys(self._bit_widths(*pair) for pair in pairs))
        # Quantized changes need the weights that they began with, which takes memory.
        quantized = self._whole(
            client, ExecutionPolicy(bits_up=bit_widths[0][0], bits_down=bit_widths[0][1])
        )
        return Bound(
            short=bool(over[FLOPS]) or late,
            narrow=quantized.memory > client.capacity[MEMORY],
            bit_widths=bit_widths,
        )

    def _whole(self, client: Participant, policy: ExecutionPolicy) -> Cost:
        """Return the cost of training everything under an execution policy."""
        costs = self.round.federation.costs_of(self.round.state, policy)
        probes = self.round.probes(client)
        return round_cost(costs, self.round.everything(), client.examples, probes, client.cached)

    def _bit_widths(self, up: int, down: int) -> BitWidths:
        """Return bits as an execution policy has them: None where they are as configured."""
        costs = self.round.federation.costs_of(self.round.state)
        return None if up == costs.bits_up else up, None if down == costs.bits_down else down

    def _bits(self, client: Participant, whole: Cost, over: np.ndarray) -> list[tuple[int, int]]:
        """Return bits up and down to try: the best first where bytes bind, then as configured."""
        configured = max(self._bytes_up), max(self._bits_down)
        if not (over[UP] or over[DOWN]) or len(self._bytes_up) == 1:
            return [configured]
        down = min(self._bits_down) if over[DOWN] else configured[1]
        able = [bits for bits in self._bytes_up if bits < PLAIN_BITS or down == PLAIN_BITS]
        room = int(client.capacity[UP]) - (whole.bytes_up - self._bytes_up[configured[0]])
        up = next((bits for bits in able if self._bytes_up[bits] <= room), min(able))
        pairs = [(up, down), configured]
        if up < PLAIN_BITS:  # the weights that a change began with take as many bits as came down
            pairs.insert(1, (up, min(self._bits_down)))
        return pairs

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
        """Try what may help clients whose budgets bind alike."""
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
        """Try an execution policy on the best shares so far times some factors."""
        for factor in factors:
            shares = np.array([self._best[c.client].share for c in clients])
            self._attempt(clients, policy, weights, np.minimum(1.0, shares * factor))

    def _attempt(
        self,
        clients: list[Participant],
        policy: ExecutionPolicy,
        weights: tuple[float, float],
        shares: np.ndarray,
    ) -> None:
        """Plan each client's schedule for a policy and a share of its examples; keep the best."""
        federation, state = self.round.federation, self.round.state
        planner = federation.planner_under(state, policy, *weights)
        reduced = _on_shares(clients, shares)
        probes = [self.round.probes(c) for c in reduced]
        planned = planner.plan(reduced, self.preferred, self.forward, self.round.number, probes)
        trained_shares = [r.examples / c.examples for r, c in zip(reduced, clients, strict=True)]
        utilities = self._utilities(planner, planned, np.array(trained_shares))
        for utility, share, client, assignment in zip(
            utilities.tolist(), shares.tolist(), reduced, planned, strict=True
        ):
            if utility > self._best[client.client].utility and not assignment.schedule.sits_out:
                assignment = replace(assignment, policy=policy, examples=client.examples)
                self._best[client.client] = _Best(utility, share, assignment)

    def _utilities(
        self, planner: Planner, planned: list[Assignment], shares: np.ndarray
    ) -> np.ndarray:
        """Return the utility of what was planned on shares of clients' examples: [clients]."""
        return self._utility.of(
            np.stack([a.schedule.operations for a in planned]),
            np.stack([planner.rank_share(a.schedule) for a in planned]),
            shares,
            [(planner.costs.bits_up, planner.costs.bits_down)] * len(planned),
        )

    @cached_property
    def _utility(self) -> Utility:
        """What measures the utility of schedules."""
        return Utility(self.backward, self.forward)

    def _finished(self, client: Participant) -> Assignment:
        """Return a client's best, with more examples and fewer micro-batches as budgets allow."""
        best = self._best[client.client].assignment
        if best is None:
            return self.round.sit_out(client)
        best = self._smaller_batches(client, self._more_examples(client, best))
        best = self._fewer_micro_batches(client, best)
        reduction = client.examples / (best.examples or client.examples)
        policy = replace(
            best.policy, rate=self._rate(best), weight=reduction, step=self._step(reduction)
        )
        return replace(best, policy=policy)

    def _step(self, reduction: float) -> float:
        """Return the server's step along a change of ``reduction`` times fewer examples.

        It is 1 where the aggregator takes no steps.
        """
        steps = self.round.federation.components.takes_steps
        return min(MOST_STEP, reduction**STEP) if steps else 1.0

    def _rate(self, a: Assignment) -> float:
        """Return the learning rate's factor: the less of the model trains, the larger it is."""
        ranks = np.ones((1, *self.round.shape))
        learned = float(self._utility.learned(a.schedule.operations[None], ranks)[0])
        return min(MOST_RATE, learned**-RATE)

    def _more_examples(self, client: Participant, a: Assignment) -> Assignment:
        """Return the assignment on more examples, as budgets afford: up to half as many more."""
        fits = a.examples or 0
        # FLOPs are nearly linear in examples, so that a number by FLOPs is likely and tried first.
        share = min(2.0, int(client.capacity[FLOPS]) / max(1, a.cost.flops))
        over = min(client.examples, fits + fits // 2) + 1
        first = min(over - 1, int(fits * share))
        return (
            most(fits, over, lambda n: self._affordable(client, replace(a, examples=n)), first) or a
        )

    def _smaller_batches(self, client: Participant, a: Assignment) -> Assignment:
        """Return the assignment in smaller batches, so that fewer examples make many steps."""
        config = self.round.federation.config
        share = (a.examples or client.examples) / client.examples
        size = max(config.slots, round(config.batch_size * share**BATCH))
        # With several slots another batch size spreads examples differently, at another cost.
        policies = (replace(a.policy, batch=larger) for larger in range(size, config.batch_size))
        tried = (self._affordable(client, replace(a, policy=policy)) for policy in policies)
        return next(filter(None, tried), a)

    def _fewer_micro_batches(self, client: Participant, a: Assignment) -> Assignment:
        """Return the assignment in the fewest micro-batches that memory affords."""
        if a.policy.micro_batches is None:
            return a
        policies = (
            replace(a.policy, micro_batches=count)
            for count in self.round.micro_batch_counts(a.policy)
        )
        tried = (self._affordable(client, replace(a, policy=policy)) for policy in policies)
        return next(filter(None, tried), a)

    def _affordable(self, client: Participant, a: Assignment) -> Assignment | None:
        """Return an assignment with its cost; None where that exceeds a budget."""
        cost = self.round.assign(client, a.schedule, a.examples, a.policy, a.probes).cost
        return replace(a, cost=cost) if client.affords(cost) else None
