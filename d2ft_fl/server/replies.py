"""The other half of a round: replies in, the next state and what became of every client out."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.lora_sums import LoraSums
from d2ft_fl.aggregation.mean_compensation import MeanSums
from d2ft_fl.aggregation.private_sums import PrivateRound, PrivateSums
from d2ft_fl.aggregation.robust import ROBUST, RobustSums, clipped
from d2ft_fl.aggregation.server_optimizer import Moments
from d2ft_fl.aggregation.sums import Sums, Update, validate
from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ReplyError
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.records.client_record import ClientRecord
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.plan import Plan, cached_after, last_trained
from d2ft_fl.server.dispatch import ClientFailure
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.parameter_cache import digests
from d2ft_fl.wire.quantization import with_quantized_changes

MOST_SAID = 300  # letters of a reason
MORE_BYTES = 1 << 16  # than planned: for what a client says when it has failed


@dataclass(frozen=True)
class _Reply:
    """One client's answer, read."""

    update: Update
    means: dict[str, Tensor]
    measured: dict[str, np.ndarray]
    used: Cost
    wall: float
    training: float
    loss: float


def _short(reason: str) -> str:
    """One line, of a length that can be looked at; it may be a stranger's."""
    line = next(iter(reason.strip().splitlines()), "no reason is known")
    return line if len(line) <= MOST_SAID else line[: MOST_SAID - 3] + "..."


class RoundReplies:
    """Folds the replies of one round in, one at a time, in any order."""

    def __init__(
        self,
        federation: Federation,
        state: State,
        plan: Plan,
        silent: Mapping[int, ClientFailure] = MappingProxyType({}),
        private: PrivateRound | None = None,
    ):
        self.federation, self.state, self.plan = federation, state, plan
        self.private = private
        self.sums = self._make_sums(sum(sum(self._counted(a)) for a in plan.assignments))
        examples = sum(sum(self._slot_examples(a)) for a in plan.assignments)
        self.mean_sums = MeanSums(federation.arch, examples)
        self.pending = {a.client: a for a in plan.working}
        self.participants = {c.client: c for c in plan.clients}
        self.measured: dict[int, tuple[dict[str, np.ndarray], int]] = {}
        self.records: dict[int, ClientRecord] = {}
        self.strays: list[str] = []  # faults of those who are not waited for
        for client, failure in silent.items():
            self.stray(client, failure.reason)
        self.asked = len(plan.working) + len(silent)  # who said nothing is in no plan

    def _make_sums(self, examples: int) -> Sums | LoraSums | RobustSums | PrivateSums:
        config, arch, weights = self.federation.config, self.federation.arch, self.state.weights
        if self.private:
            return PrivateSums(arch, weights, examples, self.private)
        if config.aggregation in ROBUST:
            hostile = config.suspects(len(self.plan.working))
            return RobustSums(arch, weights, config.aggregation, hostile, config.neighbor_mixing)
        if arch.rank:
            mode = config.lora_aggregation
            return LoraSums(arch, weights, examples, mode, config.lora_error)
        return Sums(arch, weights, examples)

    def _slot_examples(self, a: Assignment) -> list[int]:
        """How many examples a client trains on in each slot."""
        return self.federation.costs_of(self.state, a.policy).slot_totals(a.examples or 0)

    def _counted(self, a: Assignment) -> list[int]:
        """The same times what each counts."""
        return [max(int(n > 0), round(n * a.policy.weight)) for n in self._slot_examples(a)]

    @cached_property
    def _laid_out(self) -> GlobalModel:
        """The model as clients' slices of it lie, which coded changes are added to."""
        return GlobalModel.of(self.federation.arch, self.state.weights)

    @property
    def answered(self) -> int:
        """How many clients' replies were added."""
        return sum(record.used is not None for record in self.records.values())

    @property
    def failures(self) -> list[str]:
        """What went wrong so far, by client."""
        failed = [self.records[client] for client in sorted(self.records)]
        return [f"client {r.client}: {r.failure}" for r in failed if r.failure] + self.strays

    def stray(self, client: int, reason: str) -> None:
        """Note a fault of somebody who is not waited for, or not any more."""
        self.strays.append(f"client {client}: {_short(reason)}")

    def add(self, client: int, blob: bytes | memoryview) -> None:
        """Validate one reply and add it; a reply that fails is left out and named.

        Args:
            blob: As bytes, or memory that is good until this returns.
        """
        if client not in self.pending:
            known = client in self.participants
            self.stray(client, "answers again" if known else "an answer nobody waits for")
            return
        try:
            reply = self._read(client, blob)
            self.sums.add(reply.update)
        except ReplyError as error:
            self.fail(client, str(error))
            return
        except Exception as error:  # whatever a reply can do to those who read it costs itself
            self.fail(client, f"its answer cannot be read: {type(error).__name__}: {error}")
            return
        assignment = self.pending.pop(client)
        if reply.means:
            self.mean_sums.add(assignment.schedule, self._slot_examples(assignment), reply.means)
        if reply.measured:
            self.measured[client] = (reply.measured, assignment.probes.scored)
        self._record(assignment, reply.used, reply.wall, reply.training, reply.loss)

    def _read(self, client: int, blob: bytes | memoryview) -> "_Reply":
        """A reply once it is known to be whole, and an answer to what its client was assigned.

        Raises:
            ReplyError: With what is wrong.
        """
        bytes_up = len(blob)
        most = self.pending[client].cost.bytes_up + MORE_BYTES
        if bytes_up > most:
            raise ReplyError(f"{bytes_up} bytes, where {most} are the most that can be")
        tensors, meta = wire.decode(blob)
        if meta.get("error"):
            raise ReplyError(str(meta["error"]))
        try:
            round, sender = int(meta["round"]), int(meta["client"])
            slot_examples = [int(n) for n in meta["slot_examples"]]
            flops, memory, down = (int(meta["used"][k]) for k in ("flops", "memory", "bytes_down"))
            wall, training = (float(meta["used"][k]) for k in ("seconds", "training"))
            loss = float(meta["loss"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ReplyError(f"the report is incomplete or malformed: {error}") from None
        if (
            not all(0 <= n < 2**62 for n in (flops, memory, down))
            or not np.isfinite([wall, training, loss]).all()
        ):
            raise ReplyError("the report holds numbers that cannot be")
        if (round, sender) != (self.plan.round, client):
            raise ReplyError(f"an answer to round {round} for client {sender}")
        assignment = self.pending[client]
        expected = self._slot_examples(assignment)
        if slot_examples != expected:
            raise ReplyError(f"trained on {sum(slot_examples)} examples, not {sum(expected)}")
        measured = self._measured(tensors, assignment.probes.kinds)
        schedule, means = assignment.schedule, {}
        if self.federation.calibrates(self.plan.round):
            means = {n: tensors.pop(n) for n in list(tensors) if n.startswith("d2ft.mean.")}
            self.mean_sums.check(schedule, means)
        bits = assignment.policy.bits_up or self.federation.config.upload_bits
        if bits < PLAIN_BITS:
            tensors = with_quantized_changes(
                self.federation.arch, self._laid_out, schedule, tensors, bits
            )
        step = assignment.policy.step if self.federation.config.takes_steps else 1.0
        update = Update(schedule, self._counted(assignment), tensors, step)
        if (norm := self.federation.config.clip_norm) and not self.private:  # which clips itself
            validate(self.federation.arch, self.state.weights, update)
            update = clipped(self.federation.arch, self.state.weights, update, norm)
        used = Cost(flops, memory, bytes_up, down)
        return _Reply(update, means, measured, used, wall, training, loss)

    def _measured(self, tensors: dict[str, Tensor], kinds: Sequence[str]) -> dict[str, np.ndarray]:
        """Take a client's scores out of its reply: kind -> float64 [blocks, heads]."""
        return {kind: self._check_scores(kind, tensors.pop(TENSOR + kind, None)) for kind in kinds}

    def _check_scores(self, kind: str, scores: Tensor | None) -> np.ndarray:
        arch = self.federation.arch
        if scores is None:
            raise ReplyError(f"the {kind} scores are missing")
        if scores.dtype != torch.float32:
            raise ReplyError(f"the {kind} scores are {scores.dtype}, not {torch.float32}")
        values = None
        if tuple(scores.shape) == (arch.blocks, arch.heads):
            values = scores.double().numpy()
        if values is None or not np.isfinite(values).all():
            raise ReplyError(f"the {kind} scores are not a finite [blocks, heads]")
        if (values < 0).any():
            raise ReplyError(f"the {kind} scores are negative")
        return values

    def fail(self, client: int, reason: str) -> None:
        """Leave a client out of this round, with the reason."""
        if assignment := self.pending.pop(client, None):
            self._record(assignment, None, failure=_short(reason))
        else:
            self.stray(client, reason)

    def finish(self) -> tuple[State, list[ClientRecord]]:
        """The next state, and what became of every client, in order."""
        for client in list(self.pending):
            self.fail(client, "no answer")
        for assignment in self.plan.assignments:
            if assignment.client not in self.records:
                self._record(assignment, None)
        answered = {r.client for r in self.records.values() if r.used is not None}
        weights, moments = self._step(self.sums.apply())
        changed = self._changed(weights)
        cached = cached_after(self.federation.arch, self.state, self.plan, answered, changed)
        names = self.state.digests
        if changed.any():
            names = digests(self.federation.arch, weights, names, changed)
        state = State(
            self.plan.round,
            weights,
            self.state.scores.updated(self.measured, self.federation.config.score_momentum),
            self.mean_sums.apply(self.state.means),
            self._last_trained(answered),
            cached,
            names,
            {**self.state.figures, **self._figures()},
            moments,
        )
        return state, [self.records[c.client] for c in self.plan.clients]

    def _step(self, mean: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Moments]]:
        """Weights and moments after the server's step from the means."""
        optimizer = self.federation.components.server_optimizer
        if optimizer is None:
            return mean, self.state.moments
        arch, old = self.federation.arch, self.state.weights
        return optimizer.step(arch, old, mean, self.sums.trained, self.state.moments)

    def _last_trained(self, answered: Container[int]) -> np.ndarray:
        if self.private:  # as far as anybody may know
            planned = self.private.trainers.heads > 0
            return np.where(planned, self.plan.round, self.state.last_trained)
        if isinstance(self.sums, RobustSums):  # not what too few trained to tell
            moved = self.sums.subnets_trained
            return np.where(moved, self.plan.round, self.state.last_trained)
        return last_trained(self.state, self.plan, answered)

    def _figures(self) -> dict[str, float | None]:
        if self.private:
            return {"epsilon": self.private.privacy.epsilon(self.plan.round)}
        if isinstance(self.sums, RobustSums):
            return {"too_few_trainers": self.sums.left}
        return {"aggregation_error": self.sums.error} if isinstance(self.sums, LoraSums) else {}

    def _changed(self, weights: dict[str, Tensor]) -> np.ndarray:
        """Subnets whose fixed parameters did change, folded into: bool [blocks, heads]."""
        arch = self.federation.arch
        changed = np.zeros((arch.blocks, arch.heads), dtype=bool)
        fixed = (p for p in arch.of_kind(Kind.SLICED) if p.fixed)
        if any(weights[p.name] is not self.state.weights[p.name] for p in fixed):
            for a in self.plan.working:
                changed |= a.schedule.trained
        return changed

    def _record(
        self,
        assignment: Assignment,
        used: Cost | None,
        wall_seconds: float = 0.0,
        training_seconds: float = 0.0,
        train_loss: float | None = None,
        failure: str | None = None,
    ) -> None:
        participant = self.participants[assignment.client]
        operations = assignment.schedule.operations
        self.records[assignment.client] = ClientRecord(
            client=assignment.client,
            device=participant.budget.device,
            examples=assignment.examples or 0,
            operations={
                operation.name.lower(): float((operations == operation).mean())
                for operation in Operation
            },
            policy=assignment.policy,
            predicted=assignment.cost,
            allowed=participant.capacity,
            used=used,
            seconds=participant.budget.seconds(used) if used else 0.0,
            deadline=participant.budget.deadline,
            wall_seconds=wall_seconds,
            training_seconds=training_seconds,
            train_loss=train_loss,
            scored=assignment.probes.scored,
            viewed=assignment.probes.viewed,
            gap=assignment.gap,
            rank=assignment.schedule.mean_rank(self.federation.arch.rank),
            failure=failure,
        )
