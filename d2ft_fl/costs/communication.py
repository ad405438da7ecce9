"""Communication: bytes that a schedule makes travel, those of tensors, and of headers at most."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.costs.compensation import Extras
from d2ft_fl.costs.parameter_counts import Parts, Which, parts_of
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter, has_fixed
from d2ft_fl.subnets.schedule import residents, trainees
from d2ft_fl.wire.quantization import is_quantized, row_bytes
from d2ft_fl.wire.sizes import ELEMENT, MESSAGE_HEADER, RANK_BYTES, TENSOR_HEADER


@dataclass(frozen=True)
class Communication:
    """Bytes that clients send and receive.

    Attributes:
        parts: How much of the model changes, never changes and trains.
        extras: What compensation adds.
        slots: Slots of schedules.
        bits_up: Of a number on its way up; see :mod:`d2ft_fl.wire.quantization`.
        bits_down: Of a number on its way down.
    """

    parts: Parts
    extras: Extras
    slots: int
    bits_up: int
    bits_down: int

    @property
    def arch(self) -> Architecture:
        """The model's architecture."""
        return self.parts.arch

    def down(
        self,
        operations: np.ndarray,
        cached: np.ndarray | None,
        ranks: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the bytes that travel to clients: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            cached: Subnets whose fixed parameters clients have: bool [clients, blocks, heads]; None
                for none.
            ranks: Those of schedules, where they have some.
        """
        loose, fixed, resident = self.parts.loose, self.parts.fixed, residents(operations)
        total = loose.wire_bytes(resident) + loose.outer_bytes + self.message_bytes
        total += self.rank_bytes * (ranks is not None)
        total += self.extras.down(operations)
        total -= (resident * self.spared_down).sum(axis=(1, 2))
        if cached is None:
            return total + fixed.wire_bytes(resident) + fixed.outer_bytes
        new = resident & ~cached
        blocks = resident.any(axis=2) & ~cached.any(axis=2)  # of which nothing is there yet
        total += (new * ELEMENT * fixed.sliced).sum(axis=(1, 2))
        total += (new.any(axis=2) * TENSOR_HEADER * fixed.tensors).sum(axis=1)
        total += (blocks * ELEMENT * fixed.shared).sum(axis=1)
        return total + ~cached.any(axis=(1, 2)) * fixed.outer_bytes

    def up(self, operations: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the bytes that come back: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
        """
        parts, trained = self.parts, trainees(operations)
        elements = parts.whole.elements(trained) + parts.ranked.elements(ranks)
        headers = (trained.any(axis=2) * TENSOR_HEADER * parts.trained.tensors).sum(axis=1)
        spared = (trained * self.spared_up).sum(axis=(1, 2))
        outer = parts.trained.outer_bytes + MESSAGE_HEADER
        return outer + ELEMENT * elements + headers + self.extras.up(operations) - spared

    @property
    def message_bytes(self) -> int:
        """Bytes of a message to a client beside its tensors."""
        grid = self.arch.blocks * self.arch.heads
        names = 20 * (grid + self.arch.blocks + 1)  # digests of fixed groups
        return MESSAGE_HEADER + 2 * self.slots * grid + names * has_fixed(self.arch)

    @property
    def rank_bytes(self) -> int:
        """Bytes of the ranks in a message that has some."""
        return 2 * RANK_BYTES * self.arch.blocks * self.arch.heads

    @cached_property
    def spared_up(self) -> np.ndarray:
        """Bytes up that quantization spares a subnet that trains: int64 [blocks, heads]."""
        bits = self.bits_up
        return self._quantized(bits, lambda p: p.trains, lambda p: _spared(p, bits))

    @cached_property
    def spared_down(self) -> np.ndarray:
        """Bytes down that quantization spares a subnet: int64 [blocks, heads]."""
        bits = self.bits_down
        return self._quantized(bits, lambda p: True, lambda p: _spared(p, bits))

    @cached_property
    def kept(self) -> np.ndarray:
        """Bytes of a trained subnet's weights as sent: int64 [blocks, heads].

        A client keeps them while it trains, in as many bits as they came in, to quantize the
        change; 0 where changes are not quantized.
        """
        return self._quantized(
            self.bits_up, lambda p: p.trains, lambda p: row_bytes(p, self.bits_down)
        )

    def _quantized(self, bits: int, which: Which, each: Callable[[Parameter], int]) -> np.ndarray:
        """Sum bytes over the rows of each subnet that are quantized: int64 [blocks, heads].

        Args:
            bits: Of a number.
            which: Which parameters count.
            each: Bytes of one row of a parameter.
        """
        total = np.zeros((self.arch.blocks, self.arch.heads), dtype=np.int64)
        for p in self.arch.of_kind(Kind.SLICED):
            if which(p) and is_quantized(p, bits):
                total[p.block] += [each(p) * len(rows) for rows in p.rows]
        return total


def _spared(p: Parameter, bits: int) -> int:
    """Return the bytes by which a row is shorter in so many bits."""
    return row_bytes(p, PLAIN_BITS) - row_bytes(p, bits)


@lru_cache
def communication_of(extras: Extras, slots: int, bits_up: int, bits_down: int) -> Communication:
    """Return the communication of a model, which many execution policies have in common."""
    return Communication(parts_of(extras.arch), extras, slots, bits_up, bits_down)
