"""Reading replies: an answer is used only after everything about it is checked.

A reply may come from a client that failed, that plans otherwise than the server, or that lies. What
is read here has the form that the assignment asks for. Its values are judged by the
:class:`~d2ft_fl.aggregation.aggregator.Aggregator`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.mean_compensation import MeanSums
from d2ft_fl.aggregation.update import Update
from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ReplyError
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.compensation import MEAN_PREFIX
from d2ft_fl.wire.quantization import with_quantized_changes

MORE_BYTES = 1 << 16  # beyond the plan, for the reason that a failed client gives
MOST_COUNT = 2**62  # FLOPs, bytes and examples of a report are below it
MOST_LOSS = 1e15
REPORT = frozenset({"round", "client", "slot_examples", "loss", "used"})
USED = frozenset({"flops", "memory", "bytes_down", "seconds", "training"})
_SECONDS = re.compile(r"[0-9]{8}\.[0-9]{3}")  # as clients write them, up to three years


def slot_examples(federation: Federation, state: State, assignment: Assignment) -> list[int]:
    """Return on how many examples a client trains in each slot.

    Args:
        federation: The federation of the round.
        state: The global state that the round began with.
        assignment: What the client was told to do.
    """
    costs = federation.costs_of(state, assignment.policy)
    return costs.slot_totals(assignment.examples or 0)


def counted_examples(federation: Federation, state: State, assignment: Assignment) -> list[int]:
    """Return what a client's examples of each slot count: at least 1 where there are any.

    Args:
        federation: The federation of the round.
        state: The global state that the round began with.
        assignment: What the client was told to do.
    """
    return [
        max(int(count > 0), round(count * assignment.policy.weight))
        for count in slot_examples(federation, state, assignment)
    ]


@dataclass(frozen=True)
class Usage:
    """What a client reports of its round.

    Attributes:
        round_number: The round that it answers.
        client: The client that it says to be.
        cost: What it used; bytes up are those of the reply, as the server counted them.
        wall_seconds: How long the client worked on the assignment.
        training_seconds: How much of that it trained.
        train_loss: The mean loss over its examples.
        slot_examples: On how many examples it trained, slot by slot.
    """

    round_number: int
    client: int
    cost: Cost
    wall_seconds: float
    training_seconds: float
    train_loss: float
    slot_examples: list[int]


@dataclass(frozen=True)
class Reply:
    """One client's answer after reading.

    Attributes:
        update: What it trained.
        means: What subnets add on average, by name; empty where nobody measures it in this round.
        scores: Kind -> the scores that it measured: float64 [blocks, heads].
        usage: What it reports.
    """

    update: Update
    means: dict[str, Tensor]
    scores: dict[str, np.ndarray]
    usage: Usage


@dataclass(frozen=True, eq=False)
class ReplyReader:
    """Reads the replies of one round.

    Attributes:
        federation: The federation of the round.
        state: The global state that the round began with.
        round_number: The round, counted from 1.
        mean_sums: What checks the means that compensation measures.
    """

    federation: Federation
    state: State
    round_number: int
    mean_sums: MeanSums

    def read(self, assignment: Assignment, blob: bytes | memoryview) -> Reply:
        """Read the answer to an assignment.

        Args:
            assignment: What the client was told to do.
            blob: The answer, in memory that is good until the reply was aggregated.

        Raises:
            ReplyError: With the first thing that is wrong, or the reason that the client gives.
        """
        tensors, meta = self._decoded(assignment, blob)
        usage = self._usage(meta, len(blob))
        self._check_answers(assignment, usage)
        scores = self._taken_scores(tensors, assignment.probes.kinds)
        means = self._taken_means(assignment, tensors)
        update = self._update(assignment, tensors)
        return Reply(update, means, scores, usage)

    def _decoded(
        self, assignment: Assignment, blob: bytes | memoryview
    ) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Return tensors and report of an answer, once its length is one that was planned."""
        most = assignment.cost.bytes_up + MORE_BYTES
        if len(blob) > most:
            raise ReplyError(f"{len(blob)} bytes, where {most} are the most that can be")
        tensors, meta = wire.decode(blob)
        if "error" in meta:
            raise ReplyError(str(meta["error"]))
        return tensors, meta

    @staticmethod
    def _usage(meta: Mapping[str, Any], bytes_up: int) -> Usage:
        """Return the usage that a report states, once all its numbers are possible."""
        used = meta.get("used")
        if not isinstance(used, dict) or meta.keys() != REPORT or used.keys() != USED:
            raise ReplyError("the report is incomplete or malformed: it has other entries")
        whole = [meta["round"], meta["client"], used["flops"], used["memory"], used["bytes_down"]]
        wall, training, shown = used["seconds"], used["training"], meta["slot_examples"]
        if not isinstance(shown, list) or not all(type(n) is int for n in [*whole, *shown]):
            raise ReplyError("the report is incomplete or malformed: counts must be whole numbers")
        if not all(isinstance(text, str) and _SECONDS.fullmatch(text) for text in (wall, training)):
            raise ReplyError("the report is incomplete or malformed: seconds are 00000000.000")
        if not all(0 <= count < MOST_COUNT for count in whole):
            raise ReplyError("the report holds numbers that cannot be")
        loss = meta["loss"]
        if type(loss) not in (int, float) or not abs(loss) <= MOST_LOSS:
            raise ReplyError(f"the report's loss {loss!r} is no number up to {MOST_LOSS:g}")
        number, client, flops, memory, bytes_down = whole
        cost = Cost(flops, memory, bytes_up, bytes_down)
        return Usage(number, client, cost, float(wall), float(training), float(loss), shown)

    def _check_answers(self, assignment: Assignment, usage: Usage) -> None:
        """Refuse an answer to another round or client, or one after other examples."""
        if (usage.round_number, usage.client) != (self.round_number, assignment.client):
            raise ReplyError(f"an answer to round {usage.round_number} for client {usage.client}")
        expected = slot_examples(self.federation, self.state, assignment)
        if usage.slot_examples != expected:
            raise ReplyError(f"trained on {sum(usage.slot_examples)} examples, not {sum(expected)}")

    def _taken_scores(
        self, tensors: dict[str, Tensor], kinds: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Take a client's scores out of its tensors: kind -> float64 [blocks, heads]."""
        return {kind: self._scores(kind, tensors.pop(TENSOR + kind, None)) for kind in kinds}

    def _scores(self, kind: str, scores: Tensor | None) -> np.ndarray:
        """Return scores of a kind as float64 [blocks, heads], once they are valid."""
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

    def _taken_means(self, assignment: Assignment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the means that compensation measures out of a client's tensors, checked."""
        if not self.federation.calibrates(self.round_number):
            return {}
        names = [name for name in tensors if name.startswith(MEAN_PREFIX)]
        means = {name: tensors.pop(name) for name in names}
        self.mean_sums.check(assignment.schedule, means)
        return means

    def _update(self, assignment: Assignment, tensors: dict[str, Tensor]) -> Update:
        """Return what a client trained, as it travelled."""
        schedule = assignment.schedule
        bits = assignment.policy.bits_up or self.federation.config.upload_bits
        in_full = partial(self._in_full, schedule, bits) if bits < PLAIN_BITS else None
        takes_steps = self.federation.components.takes_steps
        step = assignment.policy.step if takes_steps else 1.0
        counted = counted_examples(self.federation, self.state, assignment)
        return Update(schedule, counted, tensors, step, bits, in_full)

    def _in_full(
        self, schedule: Schedule, bits: int, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return in full numbers what a client sent, of which some changes are quantized."""
        arch = self.federation.arch
        return with_quantized_changes(arch, self._packed_model, schedule, tensors, bits)

    @cached_property
    def _packed_model(self) -> GlobalModel:
        """The global model, laid out as the slices that quantized changes are added to."""
        return GlobalModel.of(self.federation.arch, self.state.weights)
