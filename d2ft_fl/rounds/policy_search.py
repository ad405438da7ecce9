"""Each client's execution policy: on how many examples, in how many micro-batches and bits.

For a given execution policy, the knapsack finds each client's schedule. A policy is tried where a
budget binds that the policy relieves. Of what was found, the fastest is taken of those whose
:mod:`utility <d2ft_fl.planning.utility>` is about the highest (:mod:`~d2ft_fl.rounds.policy_choice`
has the rule). By the budget that binds, the policies have:

* FLOPs or a deadline: fewer examples, in turn and in smaller batches. All of a client's examples
  count in the mean, whatever it trains on. The server takes a larger step along a change that was
  trained on few examples;
* memory: passes of 1 example, and of ever more, each with the schedule that fits beside it, and
  afterwards the fewest passes that fit, for they cost nothing but time; activations computed again;
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
from d2ft_fl.planning.utility import Utility
from d2ft_fl.rounds.context import Round
from d2ft_fl.rounds.policy_choice import HOPEFUL, TOLERANCE, Candidate, PolicyChoice

FLOPS, MEMORY, UP, DOWN = map(RESOURCES.index, ("flops", "memory", "bytes_up", "bytes_down"))
COARSE = (1.0, 0.5, 0.25, 0.125)  # shares of the examples that are tried first
FINE = (2**-0.5, 2**0.5, 2**-0.25, 2**0.25)  # factors of the best share so far, tried in turn
RATE, MOST_RATE = 0.5, 3.0  # learning rates grow with the learned share to the power of -RATE
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


@dataclass(frozen=True)
class Way:
    """One way to plan clients' rounds.

    Attributes:
        policy: How they execute their schedules.
        weights: Of running a subnet and of FROZEN, beside training it.
    """

    policy: ExecutionPolicy
    weights: tuple[float, float]


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
    _found: defaultdict[int, dict[Way, Candidate]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    _tried: set[tuple[int, Way, int]] = field(default_factory=set)  # client, way, examples

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
            self._attempt(clients, Way(policy, PASSING), np.full(len(clients), share))
        self._refine(clients, Way(policy, PASSING), FINE if bound.short else ())
        config = self.round.federation.config
        cutting = config.forward_weight, config.frozen_weight
        others = [Way(policy, cutting)]
        if bound.narrow and not costs.options.checkpointing:
            again = replace(policy, checkpointing=True)
            others = [Way(again, PASSING), Way(again, cutting), *others]
        others += [Way(other, PASSING) for other in quantized]
        for other in others:
            self._refine(clients, other, (1.0, *FINE[:2]) if bound.short else (1.0,))
        if count is not None:
            for way in (Way(policy, PASSING), *others):
                self._larger_passes(clients, way)

    def _larger_passes(self, clients: list[Participant], way: Way) -> None:
        """Plan for larger passes too, as long as that is worth about as much.

        A schedule that was planned for small passes is also the best for larger ones in which it
        still fits. So the next size that is tried is the power of two above those.
        """
        batch = self.round.federation.components.training.batch_size
        todo = [(client, way) for client in clients]
        while todo:
            larger: defaultdict[Way, list[tuple[Participant, float]]] = defaultdict(list)
            for client, now in todo:
                found = self._found[client.client].get(now)
                if found is None or not self._hopeful(client, found):
                    continue
                fewest = self._choice.in_fewest_passes(client, found.assignment)
                passes = fewest.policy.micro_batches
                if passes and passes > 1:
                    size = min(batch, 1 << (-(-batch // passes)).bit_length())
                    count = min(-(-batch // size), passes - 1)
                    policy = replace(way.policy, micro_batches=count)
                    larger[replace(way, policy=policy)].append((client, found.share))
            todo = []
            for now, some in larger.items():
                who, shares = zip(*some, strict=True)
                self._attempt(list(who), now, np.array(shares))
                todo += [(client, now) for client in who]

    def _hopeful(self, client: Participant, found: Candidate) -> bool:
        """Whether a candidate is worth about as much as the best so far."""
        return found.utility >= self._best(client).utility - TOLERANCE

    def _best(self, client: Participant) -> Candidate:
        """Return what is worth the most so far."""
        return max(self._found[client.client].values(), key=lambda found: found.utility)

    def _refine(self, clients: list[Participant], way: Way, factors: Iterable[float]) -> None:
        """Try one way on the best shares so far times some factors."""
        for factor in factors:
            shares = np.array(
                [self._best(c).share if self._found[c.client] else 1.0 for c in clients]
            )
            self._attempt(clients, way, np.minimum(1.0, shares * factor))

    def _attempt(self, clients: list[Participant], way: Way, shares: np.ndarray) -> None:
        """Plan each client's schedule in one way on a share of its examples; keep the best."""
        federation, state = self.round.federation, self.round.state
        planner = federation.planner_under(state, way.policy, *way.weights)
        bits = planner.costs.bits_up, planner.costs.bits_down
        hopeful = [
            (client, share, reduced)
            for client, share, reduced in zip(
                clients, shares.tolist(), _on_shares(clients, shares), strict=True
            )
            if (client.client, way, reduced.examples) not in self._tried
            and self._may_win(client, reduced.examples, bits)
        ]
        if not hopeful:
            return
        self._tried |= {(client.client, way, reduced.examples) for client, _, reduced in hopeful}
        chosen, of_examples, reduced = map(list, zip(*hopeful, strict=True))
        probes = [self.round.probes(c) for c in reduced]
        scores = self.preferred, self.forward
        planned = planner.plan(reduced, *scores, self.round.number, probes, timed=False)
        trained_shares = [r.examples / c.examples for r, c in zip(reduced, chosen, strict=True)]
        ranks = [planner.rank_share(a.schedule) for a in planned]
        utilities = self._utility.of(
            np.stack([a.schedule.operations for a in planned]),
            np.stack(ranks),
            np.array(trained_shares),
            [bits] * len(planned),
        )
        for utility, share, client, assignment, rank in zip(
            utilities.tolist(), of_examples, reduced, planned, ranks, strict=True
        ):
            found = self._found[client.client]
            better = way not in found or utility > found[way].utility
            if utility > 0 and better and not assignment.schedule.sits_out:
                assignment = replace(assignment, policy=way.policy, examples=client.examples)
                found[way] = Candidate(utility, share, assignment, rank)

    def _may_win(self, client: Participant, examples: int, bits: tuple[int, int]) -> bool:
        """Whether a candidate could be chosen, however much it trained."""
        if not self._found[client.client]:
            return True
        most = Utility.most(examples / client.examples, bits)
        return most >= self._best(client).utility - TOLERANCE - HOPEFUL

    @cached_property
    def _utility(self) -> Utility:
        """What measures the utility of schedules."""
        return Utility(self.backward, self.forward)

    @cached_property
    def _choice(self) -> PolicyChoice:
        """What finishes candidates, and chooses among them."""
        return PolicyChoice(self.round, self._utility)

    def _finished(self, client: Participant) -> Assignment:
        """Return a client's assignment: the fastest of those that are worth about the most."""
        if not self._found[client.client]:
            return self.round.sit_out(client)
        found = list(self._found[client.client].values())
        chosen = self._choice.of(client, found)
        reduction = client.examples / (chosen.examples or client.examples)
        policy = replace(
            chosen.policy, rate=self._rate(chosen), weight=reduction, step=self._step(reduction)
        )
        return replace(chosen, policy=policy)

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
