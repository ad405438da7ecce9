"""What this machine affords: how fast it trains, and its memory.

How fast it trains is measured once and kept (:mod:`d2ft_fl.budgets.speed_profile`).

The memory budget is half of what this process could have: what is free, and what it uses already,
so that a plan's own tensors do not shrink the budget they are checked against. It is rounded down
to 1, 1.25, 1.5 or 1.75 times a power of two: a client says the same before and during a round. On a
CPU it is the process's, of which PyTorch takes a part before any model.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from d2ft_fl.budgets.budget import MEMORY_OF, PROCESS, Amount, Budget, ClientDescription
from d2ft_fl.budgets.kept_speeds import keep
from d2ft_fl.budgets.process_memory import resident
from d2ft_fl.budgets.speed_profile import measure, profiled
from d2ft_fl.config.run_config import OPTIONS
from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.torch_device import free_memory, usable_device

MEMORY_SHARE = 0.5  # of what is free: the rest is for the interpreter, the system and others


@dataclass(frozen=True)
class Profile:
    """A measurement of this machine.

    Attributes:
        speed: How fast it trains.
        free: Bytes that this process could have.
        base: Bytes that a worker process takes before any model, where that was measured.
    """

    speed: MachineSpeed
    free: int
    base: int | None = None

    @property
    def budget(self) -> Budget:
        """The budget of a client on this machine."""
        budget = Budget(
            memory=Amount(coarse(int(MEMORY_SHARE * self.free))),
            speed=self.speed.peak,
            device="measured",
            curve=self.speed,
        )
        if self.speed.device == "cuda":
            return budget
        return replace(budget, memory_of=PROCESS, memory_base=self.base)

    def to_json(self) -> dict[str, Any]:
        """Return the measurements, and the budget that follows from them."""
        return {
            "speed": self.speed.to_json(),
            "free": self.free,
            "worker_memory": self.base,
            "budget": self.budget.to_json(),
        }

    def to_toml(self, curve: str = "") -> str:
        """Return a device class for a file of budgets.

        Args:
            curve: The file of the machine's curve; empty for that of the package.
        """
        budget = self.budget
        assert budget.memory is not None
        base = f'memory-base = "{-(-self.base // 2**20)} MiB"\n' if self.base else ""
        of = f'{MEMORY_OF} = "{PROCESS}"\n{base}' if budget.of_process else ""
        return (
            "[classes.measured]\n"
            f'memory = "{budget.memory.value / 2**20:g} MiB"\n{of}'
            f'speed = "{self.speed.peak / 1e9:.4g} GFLOP/s"\n'
        ) + (f'curve = "{curve}"\n' if curve else "")


@dataclass(frozen=True)
class Measured:
    """A source of budgets: one for all clients of a machine, with memory as it is now."""

    device: str
    threads: int
    precision: str = "fp32"
    varies: bool = True

    def __call__(self, client: ClientDescription, round_number: int) -> Budget:
        """Return this machine's budget now. Its speed is measured once."""
        speed = profiled(self.device, self.precision, self.threads)
        return Profile(speed, _could_have(self.device)).budget


def profile(device: str = "cpu", threads: int = 1, precision: str = "fp32") -> Profile:
    """Measure this machine, and keep its speed in the user's cache.

    Raises:
        ConfigError: When there is no such device here, or no such number of threads.
    """
    if threads < 1:
        raise ConfigError(f"threads = {threads} must be 1 or more")
    OPTIONS["device"].check(device)
    OPTIONS["precision"].check(precision)
    usable_device(device)
    speed = measure(device, precision, threads)
    keep(speed)
    return Profile(speed, _could_have(device))


def coarse(size: int) -> int:
    """Round down to 1, 1.25, 1.5 or 1.75 times a power of two."""
    shift = max(0, size.bit_length() - 3)
    return size >> shift << shift


def _could_have(device: str) -> int:
    """Return the bytes that this process could have on a device."""
    where = usable_device(device)
    return free_memory(where) + _held(where)


def _held(device: torch.device) -> int:
    """Return the bytes that this process uses on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident()
