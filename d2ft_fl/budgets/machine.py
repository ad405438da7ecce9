"""What this machine affords: its speed at a transformer's products, and its memory.

Timed are the two kinds of float32 products that a transformer block spends its time in, with small
batches as a client has them: a feed-forward product, and attention's two batched ones (their
FLOPs, 6 to 1, are about those of a ViT-Small block). Each is repeated for a tenth of a second or
so, of which the median counts. ``speed`` is the FLOPs of both over the time of both.

The memory budget is half of what this process could have: what is free, and what it uses already,
so that a plan's own tensors do not shrink the budget they are checked against. It is rounded down
to 1, 1.25, 1.5 or 1.75 times a power of two: a client says the same before and during a round.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import psutil
import torch

from d2ft_fl.budgets.budget import Amount, Budget, ClientDescription
from d2ft_fl.config.run_config import OPTIONS
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.torch_device import free_memory, set_threads, usable_device

MEMORY_SHARE = 0.5  # of what is free: the rest is for the interpreter, the system and others
ROWS, WIDTH, HIDDEN = 256, 384, 1536  # examples x tokens, and the widths of ViT-Small
HEADS, TOKENS, HEAD_DIM = 12, 128, 64  # examples x heads
SECONDS = 0.1


@dataclass(frozen=True)
class Speeds:
    """FLOP/s of this machine: of feed-forward products, of attention's, and of both together."""

    products: float
    attention: float
    speed: float


@dataclass(frozen=True)
class Profile:
    """A measurement of this machine.

    Attributes:
        device: Where it was measured: cpu or cuda.
        threads: Threads of torch.
        speeds: FLOP/s.
        free: Bytes that this process could have.
    """

    device: str
    threads: int
    speeds: Speeds
    free: int

    @property
    def budget(self) -> Budget:
        """The budget of a client on this machine."""
        return Budget(
            memory=Amount(coarse(int(MEMORY_SHARE * self.free))),
            speed=self.speeds.speed,
            device="measured",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the measurements, and the budget that follows from them."""
        return {**asdict(self), "budget": self.budget.to_json()}

    def to_toml(self) -> str:
        """Return a device class for a file of budgets."""
        assert self.budget.memory is not None
        return (
            "[classes.measured]\n"
            f'memory = "{self.budget.memory.value / 2**20:g} MiB"\n'
            f'speed = "{self.speeds.speed / 1e9:.3g} GFLOP/s"\n'
        )


@dataclass(frozen=True)
class Measured:
    """A source of budgets: one for all clients of a machine, with memory as it is now."""

    device: str
    threads: int
    varies: bool = True

    def __call__(self, client: ClientDescription, round_number: int) -> Budget:
        """Return this machine's budget now. Its speed is measured once a process."""
        return profile(self.device, self.threads).budget


def profile(device: str = "cpu", threads: int = 1) -> Profile:
    """Measure this machine.

    Raises:
        ConfigError: When there is no such device here, or no such number of threads.
    """
    if threads < 1:
        raise ConfigError(f"threads = {threads} must be 1 or more")
    OPTIONS["device"].check(device)
    where = usable_device(device)
    speeds = measure(device, threads)
    return Profile(device, threads, speeds, free_memory(where) + _held(where))


def coarse(size: int) -> int:
    """Round down to 1, 1.25, 1.5 or 1.75 times a power of two."""
    shift = max(0, size.bit_length() - 3)
    return size >> shift << shift


@lru_cache
@torch.inference_mode()
def measure(device: str, threads: int) -> Speeds:
    """Time the products; takes a few tenths of a second, once a process."""
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        where = torch.device(device)
        x = torch.rand(ROWS, WIDTH, device=where)
        weight = torch.rand(WIDTH, HIDDEN, device=where)
        q, k, v = torch.rand(3, HEADS, TOKENS, HEAD_DIM, device=where)
        products = 2 * ROWS * WIDTH * HIDDEN
        attention = 2 * 2 * HEADS * TOKENS * TOKENS * HEAD_DIM
        first = _median_seconds(lambda: x @ weight, where)
        second = _median_seconds(lambda: q @ k.transpose(1, 2) @ v, where)
    finally:
        set_threads(before)
    return Speeds(products / first, attention / second, (products + attention) / (first + second))


def _median_seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of one step, once the first steps have warmed up caches."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < SECONDS:
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def _held(device: torch.device) -> int:
    """Return the bytes that this process uses on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
