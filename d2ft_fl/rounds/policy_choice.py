"""The choice of a client's policy in seconds, among candidates that were planned.

A candidate is a schedule under an execution policy, on a share of the client's examples. It is
finished first: on as many examples as budgets afford, in batches that suit those, in as few passes
as memory affords. Of all that keep every budget the fastest is taken whose utility is within
``TOLERANCE`` of the best one's.

Fewer examples come in smaller batches, so that they make more steps: ideally of the configured size
times the root of the share. Smaller batches are slower, and what larger ones cost in utility is
little at first, so that the largest is taken that the tolerance leaves.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2ft_fl.costs.machine_speed import standard
from d2ft_fl.costs.resources import RESOURCES, Cost
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.utility import Utility, ideal_batch, of_batch
from d2ft_fl.rounds.context import Round, most

FLOPS, MEMORY = map(RESOURCES.index, ("flops", "memory"))
TOLERANCE = 0.005  # of utility, for which a faster policy is taken
HOPEFUL = 0.005  # by how much more a candidate may gain than others when it is finished


@dataclass(frozen=True)
class Candidate:
    """A schedule that was planned for a client, under an execution policy.

    Attributes:
        utility: Its utility: of the configured batch size, until it is finished.
        share: The share of the client's examples that it trains on.
        assignment: What the client would do.
        ranks: How far training at its rank counts, of each subnet: float64 [blocks, heads].
    """

    utility: float
    share: float
    assignment: Assignment
    ranks: np.ndarray


def fastest(utilities: Sequence[float], seconds: Sequence[float]) -> int:
    """Return the fastest of what is worth about the most; of equally fast ones the best.

    Args:
        utilities: Of each.
        seconds: That each takes.
    """
    least = max(utilities) - TOLERANCE
    able = [index for index, utility in enumerate(utilities) if utility >= least]
    return min(able, key=lambda index: (seconds[index], -utilities[index]))


def seconds_of(client: Participant, cost: Cost) -> float:
    """Return the predicted seconds of a client's round; without a speed of its own, on its curve.

    Args:
        client: The client.
        cost: Of the round.
    """
    computing = 0.0 if client.budget.speed else cost.work / (client.budget.curve or standard()).peak
    return client.budget.seconds(cost) + computing


def _but_for_passes(candidate: Candidate) -> Hashable:
    """Return what makes candidates end up alike, in as few passes as memory affords."""
    a = candidate.assignment
    schedule, ranks = a.schedule, a.schedule.ranks
    return (
        schedule.operations.tobytes(),
        None if ranks is None else ranks.tobytes(),
        a.examples,
        a.probes,
        replace(a.policy, micro_batches=None),
    )


@dataclass(frozen=True)
class PolicyChoice:
    """Finishes candidates, and chooses among them.

    Attributes:
        round: The round, with its clients.
        utility: What measures the utility of schedules.
    """

    round: Round
    utility: Utility

    def of(self, client: Participant, candidates: Sequence[Candidate]) -> Assignment:
        """Return the fastest assignment of those that are worth about the most.

        Args:
            client: Whose candidates they are.
            candidates: Each keeps every budget; at least one.
        """
        hope = max(c.utility for c in candidates) - TOLERANCE - HOPEFUL
        alike: dict[Hashable, Candidate] = {}
        for c in candidates:
            if c.utility >= hope:
                alike.setdefault(_but_for_passes(c), c)
        grown = [self._more_examples(client, c) for c in alike.values()]
        worth = [self._utility(client, c) for c in grown]
        least = max(worth) - TOLERANCE
        finished: list[Candidate] = []
        for candidate, utility in zip(grown, worth, strict=True):
            if utility >= least:
                finished.append(self._finished(client, candidate, least / utility))
        seconds = [seconds_of(client, c.assignment.cost) for c in finished]
        return finished[fastest([c.utility for c in finished], seconds)].assignment

    def _finished(self, client: Participant, candidate: Candidate, least: float) -> Candidate:
        """Return a candidate in batches that suit it, and in the fewest passes.

        Args:
            client: The client.
            candidate: On its examples.
            least: See :meth:`_in_batches`.
        """
        a = self._in_batches(client, candidate.assignment, least)
        a = self.in_fewest_passes(client, a)
        a = replace(a, cost=self.round.cost_of(client, a))
        ended = replace(candidate, assignment=a)
        utility, config = self._utility(client, ended), self.round.federation.config
        if config.policy_batch:
            share = (a.examples or client.examples) / client.examples
            utility *= of_batch(a.policy.batch or config.batch_size, config.batch_size, share)
        return replace(ended, utility=utility)

    def _utility(self, client: Participant, candidate: Candidate) -> float:
        """Return a candidate's utility on the examples that it has now, batches left out."""
        a = candidate.assignment
        costs = self.round.federation.costs_of(self.round.state, a.policy)
        share = (a.examples or client.examples) / client.examples
        bits = [(costs.bits_up, costs.bits_down)]
        operations = a.schedule.operations[None]
        return float(self.utility.of(operations, candidate.ranks[None], np.array([share]), bits)[0])

    def _more_examples(self, client: Participant, candidate: Candidate) -> Candidate:
        """Return a candidate on more examples, as budgets afford: up to half as many more."""
        a = candidate.assignment
        fits = a.examples or 0
        # FLOPs are nearly linear in examples, so that a number by FLOPs is likely and tried first.
        share = min(2.0, int(client.capacity[FLOPS]) / max(1, a.cost.flops))
        over = min(client.examples, fits + fits // 2) + 1
        first = min(over - 1, int(fits * share))
        more = most(fits, over, lambda n: self._affordable(client, replace(a, examples=n)), first)
        return replace(candidate, assignment=more or a)

    def _in_batches(self, client: Participant, a: Assignment, least: float) -> Assignment:
        """Return an assignment in the largest batches that are worth enough.

        Args:
            client: The client.
            a: The assignment.
            least: What batches may at most make of its utility, as a factor.
        """
        config = self.round.federation.config
        size = config.batch_size
        share = (a.examples or client.examples) / client.examples
        if not config.policy_batch:
            return a
        smallest = max(config.slots, round(ideal_batch(size, share)))
        larger = [b for b in range(smallest, size + 1) if of_batch(b, size, share) >= least]
        # With several slots another batch size spreads examples differently, at another cost.
        for batch in sorted(larger, reverse=True) or [smallest]:
            if batch == size:
                return a
            policy = replace(a.policy, batch=batch)
            if (tried := self._affordable(client, replace(a, policy=policy))) is not None:
                return tried
        return a

    def in_fewest_passes(self, client: Participant, a: Assignment) -> Assignment:
        """Return the assignment in the fewest micro-batches that memory affords."""
        if a.policy.micro_batches is None:
            return a
        counts = self.round.micro_batch_counts(a.policy)
        fewer = [count for count in counts if count < a.policy.micro_batches]
        for count in fewer[self._first_that_fits(client, a, fewer) :]:
            policy = replace(a.policy, micro_batches=count)
            if (tried := self._affordable(client, replace(a, policy=policy))) is not None:
                return tried
        return a

    def _first_that_fits(self, client: Participant, a: Assignment, counts: list[int]) -> int:
        """Return the index of the first number of micro-batches in which memory suffices."""
        if not counts:
            return 0
        costs = self.round.costs_for(client, a.policy)
        if a.probes:
            costs = costs.uncompensated
        each = len(counts)
        ranks = a.schedule.ranks
        ranks = None if ranks is None else np.repeat(ranks[None], each, axis=0)
        operations = np.repeat(a.schedule.operations[None], each, axis=0)
        examples = np.full(each, client.examples if a.examples is None else a.examples)
        memory = costs.memories(operations, examples, ranks, np.array(counts))
        fits = memory <= client.capacity[MEMORY]
        return int(fits.argmax()) if fits.any() else len(counts)

    def _affordable(self, client: Participant, a: Assignment) -> Assignment | None:
        """Return an assignment with its cost; None where that exceeds a budget.

        How long it computes is said where there is a deadline alone.
        """
        cost = self.round.cost_of(client, a, timed=client.budget.deadline is not None)
        return replace(a, cost=cost) if client.affords(cost) else None
