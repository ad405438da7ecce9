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
    """What compensation adds to a client's round, in bytes: it does not add up over subnets.

    Attributes:
        compensated: Whether shortcuts are compensated. calibrating: Whether means are measured.
    """

    arch: Architecture
    compensated: bool
    calibrating: bool

    def down(self, operations: np.ndarray) -> np.ndarray:
        """On the wire to clients: int64 [clients], of int8 [clients, slots, blocks, heads]."""
        return self._each(operations, self.compensated, lambda s: _wire(skip_spec(self.arch, s)))

    def up(self, operations: np.ndarray) -> np.ndarray:
        """On the wire back."""
        return self._each(operations, self.calibrating, lambda s: _wire(mean_spec(self.arch, s)))

    def held(self, operations: np.ndarray) -> np.ndarray:
        """Held while training."""
        skips = self._each(operations, self.compensated, lambda s: _data(skip_spec(self.arch, s)))
        means = self._each(operations, self.calibrating, lambda s: _data(mean_spec(self.arch, s)))
        return skips + means

    def _each(
        self, operations: np.ndarray, there: bool, what: Callable[[Schedule], int]
    ) -> np.ndarray:
        if not there:
            return np.zeros(len(operations), dtype=np.int64)
        return np.array([what(Schedule(one)) for one in operations], dtype=np.int64)


def _data(spec: dict[str, tuple[int, ...]]) -> int:
    """Bytes of the tensors alone."""
    return sum(ELEMENT * int(np.prod(shape)) for shape in spec.values())


def _wire(spec: dict[str, tuple[int, ...]]) -> int:
    return _data(spec) + TENSOR_HEADER * len(spec)
