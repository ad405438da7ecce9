"""The second half of a round: replies become the next state and a record of every client."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
from torch import Tensor

from d2ft_fl.aggregation.aggregator import Aggregator
from d2ft_fl.aggregation.factory import make_aggregator
from d2ft_fl.aggregation.hostile import LABEL_FLIP, Attack
from d2ft_fl.aggregation.mean_compensation import MeanSums
from d2ft_fl.aggregation.private_sums import PrivateRound
from d2ft_fl.aggregation.server_optimizer import Moments
from d2ft_fl.aggregation.update import validate
from d2ft_fl.errors import Divergence, ReplyError
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.records.client_record import ClientRecord
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.plan import Plan, cached_after
from d2ft_fl.server.dispatch import ClientFailure
from d2ft_fl.server.outcomes import Outcomes
from d2ft_fl.server.reply_reader import Reply, ReplyReader, counted_examples, slot_examples
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.wire.parameter_cache import digests


class RoundReplies:
    """Aggregates the replies of one round, one at a time, in any order.

    Args:
        federation: The federation of the round.
        state: The global state that the round begins with.
        plan: The plan of the round.
        silent: Client -> why it did not report before the round; these clients are in no plan.
        private: How the round is private; None where nothing is promised.

    Attributes:
        outcomes: What became of each client so far.
        measured: Client -> the scores that it measured, and on how many examples.
        aggregator: What takes the updates.
        attack: What hostile clients make of theirs; None where nobody is.
        asked: How many clients were asked for a report or a reply, and not left out before.
    """

    def __init__(
        self,
        federation: Federation,
        state: State,
        plan: Plan,
        silent: Mapping[int, ClientFailure] = MappingProxyType({}),
        private: PrivateRound | None = None,
    ):
        self.federation, self.state, self.plan = federation, state, plan
        predicted = federation.seconds_here(state, plan.working)
        self.outcomes = Outcomes(plan, federation.arch.rank, predicted)
        self.measured: dict[int, tuple[dict[str, np.ndarray], int]] = {}
        shown = (sum(slot_examples(federation, state, a)) for a in plan.assignments)
        self.mean_sums = MeanSums(federation.arch, sum(shown))
        self.reader = ReplyReader(federation, state, plan.round, self.mean_sums)
        self.aggregator = self._make_aggregator(private)
        self.attack = self._make_attack()
        self._attackers: dict[int, bytes] = {}  # their replies, until all are there
        for client, failure in silent.items():
            self.outcomes.stray(client, failure.reason)
        self.asked = len(plan.working) + len(silent)

    def _make_aggregator(self, private: PrivateRound | None) -> Aggregator:
        federation, state = self.federation, self.state
        counted = (sum(counted_examples(federation, state, a)) for a in self.plan.assignments)
        return make_aggregator(
            federation.config,
            federation.arch,
            state.weights,
            sum(counted),
            len(self.plan.working),
            federation.tuning.aggregator,
            private,
        )

    def _make_attack(self) -> Attack | None:
        """Return what hostile clients of this round send, where the server makes it."""
        c, number = self.federation.config, self.plan.round
        if not c.hostile_share or c.hostile_attack == LABEL_FLIP:
            return None
        weights = self.state.weights
        return Attack(
            self.federation.arch, weights, c.hostile_attack, c.hostile_scale, (c.seed, number)
        )

    def add(self, client: int, blob: bytes | memoryview) -> None:
        """Validate one reply and aggregate it; a reply that fails is left out and named.

        Args:
            client: The client that it is from.
            blob: The reply, as bytes or as memory that is good until this returns.
        """
        assignment = self.outcomes.pending.get(client)
        if assignment is None or client in self._attackers:
            self.outcomes.stray_answer(client)
        elif self.attack and self.federation.config.hostile(client):
            self._attackers[client] = bytes(blob)
        else:
            with self._faults_of(client):
                reply = self.reader.read(assignment, blob)
                self.aggregator.add(reply.update)
                if self.attack:
                    self.attack.see(client, reply.update)
                self._note(assignment, reply)

    def complete(self) -> None:
        """Aggregate what waited for all replies to be there: what hostile clients send."""
        if self.attack is None:
            return
        attackers: dict[int, Reply] = {}
        for client, blob in sorted(self._attackers.items()):
            with self._faults_of(client):
                reply = self.reader.read(self.outcomes.pending[client], blob)
                validate(self.federation.arch, self.state.weights, reply.update)
                self.attack.join(reply.update)
                attackers[client] = reply
        for client, reply in attackers.items():
            with self._faults_of(client):
                self.aggregator.add(self.attack.send(client, reply.update))
                self._note(self.outcomes.pending[client], reply)

    @contextmanager
    def _faults_of(self, client: int) -> Iterator[None]:
        """Leave a client out, and say why, whose reply turns out to be wrong."""
        try:
            yield
        except Divergence as error:  # or an attack
            rates = self.federation.config.learning_rates
            self.fail(client, f"{error}, as where training diverges: {rates}")
        except ReplyError as error:
            self.fail(client, str(error))
        except Exception as error:  # a reply that breaks its reading fails alone
            self.fail(client, f"its answer cannot be read: {type(error).__name__}: {error}")

    def _note(self, assignment: Assignment, reply: Reply) -> None:
        """Keep what an aggregated reply measured and used."""
        if reply.means:
            examples = slot_examples(self.federation, self.state, assignment)
            self.mean_sums.add(assignment.schedule, examples, reply.means)
        if reply.scores:
            self.measured[assignment.client] = (reply.scores, assignment.probes.scored)
        self.outcomes.succeed(assignment.client, reply.usage)

    def fail(self, client: int, reason: str) -> None:
        """Leave a client out of this round.

        Args:
            client: The client.
            reason: Why, in any length.
        """
        self.outcomes.fail(client, reason)

    def finish(self) -> tuple[State, list[ClientRecord]]:
        """Return the next state, and what became of every client, in order."""
        records = self.outcomes.finish()
        weights, moments = self._step(self.aggregator.apply())
        changed = self._changed(weights)
        arch, plan, state = self.federation.arch, self.plan, self.state
        names = state.digests
        if changed.any():
            names = digests(arch, weights, names, changed)
        trained = self.aggregator.subnets_trained
        return State(
            round=plan.round,
            weights=weights,
            scores=state.scores.updated(self.measured, self.federation.config.score_momentum),
            means=self.mean_sums.apply(state.means),
            last_trained=np.where(trained, plan.round, state.last_trained),
            cached=cached_after(arch, state, plan, self.outcomes.trained, changed),
            digests=names,
            figures={**state.figures, **self.aggregator.figures},
            moments=moments,
        ), records

    def _step(self, mean: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Moments]]:
        """Return weights and moments after the server's step, by name."""
        optimizer = self.federation.components.server_optimizer
        if optimizer is None:
            return mean, self.state.moments
        arch, old = self.federation.arch, self.state.weights
        return optimizer.step(arch, old, mean, self.aggregator.trained, self.state.moments)

    def _changed(self, weights: dict[str, Tensor]) -> np.ndarray:
        """Return the subnets whose fixed parameters changed in the round: bool [blocks, heads].

        ``lora-aggregation = "stack"`` adds to weights that no client trains.
        """
        arch = self.federation.arch
        changed = np.zeros((arch.blocks, arch.heads), dtype=bool)
        fixed = (p for p in arch.of_kind(Kind.SLICED) if p.fixed)
        if any(weights[p.name] is not self.state.weights[p.name] for p in fixed):
            for a in self.plan.working:
                changed |= a.schedule.trained
        return changed
