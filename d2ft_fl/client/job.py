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
from d2ft_fl.errors import Refusal
from d2ft_fl.rounds.federation import Federation
from d2ft_fl.rounds.messages import Message
from d2ft_fl.subnets.architecture import Architecture, Kind
from d2ft_fl.subnets.packing import down_spec
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire.compensation import skip_name, skip_spec
from d2ft_fl.wire.parameter_cache import ParameterCache
from d2ft_fl.wire.quantization import (
    Arriving,
    dequantize,
    is_quantized,
    quantize,
    quantize_changes,
)

MOST_SHOWN = 60  # letters of a name that is refused


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
        cls, blob: bytes, federation: Federation, shared: bool
    ) -> "tuple[Job, dict[str, Tensor], dict[int, Offsets]]":
        """Read a message.

        Args:
            blob: The message.
            federation: The federation, of any round.
            shared: Whether the global model is at hand.

        Returns:
            What to do, the tensors that came, by name, and the compensation among them: block ->
            offsets, one a slot; empty where there is none.

        Raises:
            D2FTError: With the first thing about the message that cannot be.
        """
        message, tensors = Message.decode(blob, federation)
        stage = federation.at(message.round)
        compensated = any(skip_name(block) in tensors for block in range(stage.arch.blocks))
        job = cls(message, stage, compensated)
        job.check_tensors(tensors, shared)
        return job, tensors, received(message.schedule, tensors)

    def check_tensors(self, tensors: Mapping[str, Tensor], shared: bool) -> None:
        """Refuse a message that has other tensors than it says, or numbers that are not finite.

        Args:
            tensors: What came, by name.
            shared: Whether slices of a global model are at hand, so that none came.
        """
        message, arch = self.message, self.arch
        wanted = [] if shared else message.slices(arch, self.costs.bits_down)
        spec = {name: (shape, dtype) for name, shape, dtype in wanted}
        if self.compensated:
            if message.probes or not self.stage.config.compensation:
                raise Refusal("the message compensates what the run's options do not")
            shapes = skip_spec(self.stage.model_arch, message.schedule)
            spec |= {name: (shape, torch.float32) for name, shape in shapes.items()}
        if odd := sorted(spec.keys() ^ tensors.keys()):
            state = "lacks" if odd[0] in spec else "has, and was not to have,"
            raise Refusal(f"the message {state} tensor {odd[0][:MOST_SHOWN]!r}")
        for name, (shape, dtype) in spec.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise Refusal(
                    f"the message has {name!r} as {tensor.dtype} {list(tensor.shape)}, not as "
                    f"{dtype} {list(shape)}"
                )

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
        return self.message.whole_size(self.arch, tensors, self.costs.bits_down)

    def complete(self, tensors: dict[str, Tensor], cache: ParameterCache) -> dict[str, Tensor]:
        """Add the slices that did not come with the message, and undo quantization.

        Args:
            tensors: What came with the message, by name.
            cache: Fixed parameters that came in earlier rounds.

        Returns:
            Packed slices, by name.

        Raises:
            Refusal: When slices are gone, or are not what they should be.
        """
        message, arch = self.message, self.arch
        if message.cached is not None:
            tensors = cache.complete(
                arch, message.carried, tensors, message.cached, message.digests
            )
        tensors = dequantize(arch, tensors, self.costs.bits_down)
        slices = {name: t for name, t in tensors.items() if name in arch.by_name}
        if {name: tuple(t.shape) for name, t in slices.items()} != down_spec(arch, message.carried):
            raise Refusal("the weights that are kept here are not those of this run")
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise Refusal("the message has weights that are not finite")
        return slices

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
