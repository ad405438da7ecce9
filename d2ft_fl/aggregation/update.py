"""One client's contribution to a round, and whether it is what was assigned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import up_spec
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire.quantization import is_quantized, row_bytes


@dataclass(frozen=True)
class Update:
    """One client's contribution to a round.

    Attributes:
        schedule: What it was assigned.
        slot_examples: Examples that it ran in each slot, times the weight of an example.
        sent: Trained slices, packed, and whole shared and final parameters (``up_spec``), as they
            travelled: of slices that are quantized at ``bits``, their changes.
        step: What its change is multiplied by in :class:`.Sums`, up to :data:`.MOST_STEP`;
            other aggregators ignore it.
        bits: In which a number of quantized changes travelled.
        in_full: Makes full numbers of ``sent``; None where nothing of it is quantized.
    """

    schedule: Schedule
    slot_examples: list[int]
    sent: dict[str, Tensor]
    step: float = 1.0
    bits: int = PLAIN_BITS
    in_full: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What was sent, in full numbers."""
        return self.sent if self.in_full is None else self.in_full(self.sent)

    def holding(self, tensors: dict[str, Tensor], **changes: Any) -> "Update":
        """Return the update with other full numbers, and other attributes where given."""
        return replace(self, sent=tensors, bits=PLAIN_BITS, in_full=None, **changes)

    def weights(self, p: Parameter) -> dict[int, int]:
        """Return how many examples trained a parameter.

        Args:
            p: The parameter.

        Returns:
            Head -> examples for a sliced parameter; ``{-1: examples}`` for a whole one.
        """
        if p.kind is Kind.SLICED:
            return self._of_heads[p.block]
        if p.kind is Kind.SHARED:
            return self._of_blocks[p.block]
        return {-1: int(np.array(self.slot_examples)[self.schedule.active].sum())}

    @cached_property
    def _of_heads(self) -> list[dict[int, int]]:
        schedule = self.schedule
        examples = schedule.examples_trained(self.slot_examples)
        return [
            {h: int(row[h]) for h in schedule.heads(schedule.trained, block)}
            for block, row in enumerate(examples)
        ]

    @cached_property
    def _of_blocks(self) -> list[dict[int, int]]:
        examples = self.schedule.block_examples_trained(self.slot_examples)
        return [{-1: int(count)} for count in examples]


def validate(arch: Architecture, weights: Mapping[str, Tensor], update: Update) -> None:
    """Check a reply against its assignment: keys, shapes and types.

    Args:
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        update: What a client sent, with the schedule that it was assigned.

    Raises:
        ReplyError: With the first thing that is wrong.
    """
    spec, sent = up_spec(arch, update.schedule), update.sent
    if missing := sorted(spec.keys() - sent.keys()):
        raise ReplyError(f"{missing[0]!r} is missing")
    if extra := sorted(sent.keys() - spec.keys()):
        raise ReplyError(f"{extra[0]!r} was not assigned")
    for name, shape in spec.items():
        tensor, dtype = sent[name], weights[name].dtype
        if is_quantized(p := arch.by_name[name], update.bits):
            shape, dtype = (shape[0], row_bytes(p, update.bits)), torch.uint8
        if tensor.shape != shape:
            raise ReplyError(f"{name!r} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != dtype:
            raise ReplyError(f"{name!r} is {tensor.dtype}, not {dtype}")
