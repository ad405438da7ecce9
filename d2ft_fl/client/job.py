"""A message as the client reads it: what to do, and how slices get here and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.engine.mean_tally import received
from d2ft_fl.engine.partial_model import Offsets
from d2ft_fl.rounds.federation import Federation
from d2ft_fl.rounds.messages import Message
from d2ft_fl.subnets.architecture import Architecture, Kind
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire import parameter_cache
from d2ft_fl.wire.parameter_cache import ParameterCache
from d2ft_fl.wire.quantization import (
    Arriving,
    dequantize,
    is_quantized,
    quantize,
    quantize_changes,
)


@dataclass(frozen=True, eq=False)
class Job:
    """What one message asks of a client.

    Attributes:
        message: What the client is told to do.
        stage: The federation as it is in the round of the message.
        compensated: Whether compensation of shortcuts came with the message.
    """

    message: Message
    stage: Federation
    compensated: bool

    @classmethod
    def read(
        cls, blob: bytes, federation: Federation
    ) -> "tuple[Job, dict[str, Tensor], dict[int, Offsets]]":
        """Read a message.

        Returns:
            What to do, the tensors that came, by name, and the compensation among them: block ->
            offsets, one a slot; empty where there is none.
        """
        message, tensors = Message.decode(blob)
        offsets = received(message.schedule, tensors)
        return cls(message, federation.at(message.round), bool(offsets)), tensors, offsets

    @property
    def arch(self) -> Architecture:
        """The architecture that trains in this round."""
        return self.stage.arch

    @property
    def costs(self) -> CostModel:
        """The cost model of this round, under the execution policy of the message."""
        message = self.message
        return self.stage.costs_when(self.compensated, message.calibrates, message.policy)

    @property
    def quantizes_changes(self) -> bool:
        """Whether changes travel back in fewer bits than values have."""
        return self.costs.bits_up < PLAIN_BITS

    def bytes_down(
        self,
        blob: bytes,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None,
    ) -> int:
        """Count the bytes that came down, as if slices of a global model at hand had travelled.

        Args:
            blob: The message.
            tensors: What came with it, by name.
            weights: The global model, where it is at hand.
        """
        if weights is None:
            return len(blob)
        return self.message.whole_size(self.arch, weights, tensors, self.costs.bits_down)

    def complete(self, tensors: dict[str, Tensor], cache: ParameterCache) -> dict[str, Tensor]:
        """Add the slices that did not come with the message, and undo quantization.

        Args:
            tensors: What came with the message, by name.
            cache: Fixed parameters that came in earlier rounds.

        Returns:
            Packed slices and compensation, by name.
        """
        message, arch, bits = self.message, self.arch, self.costs.bits_down
        if message.cached is not None:
            digests = parameter_cache.read(message.carried, message.digests)
            tensors = cache.complete(arch, message.carried, tensors, message.cached, digests)
        return dequantize(arch, tensors, bits)

    def as_sent_down(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Quantize, as they came down, the slices whose changes travel quantized.

        Args:
            values: Packed slices of what trains, by name.
        """
        bits_up, by_name = self.costs.bits_up, self.arch.by_name
        slices = {n: t for n, t in values.items() if is_quantized(by_name[n], bits_up)}
        return quantize(self.arch, slices, self.costs.bits_down)

    def taken_from(self, whole: Arriving) -> dict[str, Tensor]:
        """Return :meth:`as_sent_down` of a global model's slices, without quantizing them again."""
        schedule, bits_up = self.message.schedule, self.costs.bits_up
        return {
            p.name: whole.as_sent_down.take(p, heads)
            for p in self.arch.of_kind(Kind.SLICED)
            if is_quantized(p, bits_up) and p.trains
            if (heads := schedule.heads(schedule.trained, p.block))
        }

    def quantized_changes(
        self, before: Mapping[str, Tensor], trained: Mapping[str, Tensor], seed: Sequence[int]
    ) -> dict[str, Tensor]:
        """Quantize what training changed.

        Args:
            before: Packed slices by name, of :meth:`as_sent_down`.
            trained: Packed slices by name, after training.
            seed: Of stochastic rounding.
        """
        generator = np.random.SFC64([*seed, 2])
        bits = self.costs.bits_up, self.costs.bits_down
        return quantize_changes(self.arch, before, trained, bits[0], generator, bits[1])


def narrowed(
    arch: Architecture, tensors: Mapping[str, Tensor], schedule: Schedule
) -> dict[str, Tensor]:
    """Return the slices that a schedule needs, out of packed tensors of every head."""
    slices = {}
    for name, tensor in tensors.items():
        p = arch.by_name[name]
        if p.kind is not Kind.SLICED:
            slices[name] = tensor
            continue
        heads = schedule.heads(schedule.resident, p.block)
        rows = [r for h in heads for r in range(p.starts[h], p.starts[h + 1])]
        slices[name] = tensor[torch.tensor(rows, dtype=torch.long)]
    return slices
