"""What compensated shortcuts add to a client's bytes and memory."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire.compensation import mean_spec, skip_spec
from d2ft_fl.wire.sizes import ELEMENT, TENSOR_HEADER


@dataclass(frozen=True)
class Extras:
    """Bytes that compensation adds to clients' rounds; they do not add up over subnets.

    Attributes:
        arch: The architecture.
        compensated: Whether shortcuts are compensated.
        calibrating: Whether means are measured.
    """

    arch: Architecture
    compensated: bool
    calibrating: bool

    def down(self, operations: np.ndarray) -> np.ndarray:
        """Return the bytes that travel to clients besides: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
        """
        return self._each(operations, self.compensated, lambda s: _wire(skip_spec(self.arch, s)))

    def up(self, operations: np.ndarray) -> np.ndarray:
        """Return the bytes that travel back besides: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
        """
        return self._each(operations, self.calibrating, lambda s: _wire(mean_spec(self.arch, s)))

    def resident(self, operations: np.ndarray) -> np.ndarray:
        """Return the bytes of memory that are used besides: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
        """
        skips = self._each(operations, self.compensated, lambda s: _data(skip_spec(self.arch, s)))
        means = self._each(operations, self.calibrating, lambda s: _data(mean_spec(self.arch, s)))
        return skips + means

    def _each(
        self, operations: np.ndarray, applies: bool, size_of: Callable[[Schedule], int]
    ) -> np.ndarray:
        if not applies:
            return np.zeros(len(operations), dtype=np.int64)
        return np.array([size_of(Schedule(one)) for one in operations], dtype=np.int64)


def _data(spec: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes of tensors without their headers."""
    return sum(ELEMENT * int(np.prod(shape)) for shape in spec.values())


def _wire(spec: dict[str, tuple[int, ...]]) -> int:
    return _data(spec) + TENSOR_HEADER * len(spec)
