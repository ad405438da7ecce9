"""How fast this machine is, as measured once and kept in the user's cache; loads no torch.

There is a file for each device, precision and number of threads. What other software measured does
not count. Nothing here changes a simulation: device classes have curves of their own.
"""

import json
import os
import platform
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.errors import ConfigError
from d2ft_fl.util import cache
from d2ft_fl.util.strict_json import write_json


def folder() -> Path:
    """Return the folder of what was measured; ``D2FT_SPEEDS`` in the environment names another."""
    named = os.environ.get("D2FT_SPEEDS")
    return Path(named) if named else cache.folder("speed")


def path_of(device: str, precision: str, threads: int) -> Path:
    """Return where a measurement is kept."""
    return folder() / f"{device}-{precision}-{threads}.json"


def kept(device: str, precision: str, threads: int) -> MachineSpeed | None:
    """Return what was measured on this machine; None where nothing was, or by other software.

    Args:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of torch.
    """
    path = path_of(device, precision, threads)
    try:
        speed = MachineSpeed.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, ConfigError):
        return None
    return speed if speed.source.startswith(f"{software()}, ") else None


def keep(speed: MachineSpeed) -> None:
    """Keep a measurement, where the cache can be written."""
    path = path_of(speed.device, speed.precision, speed.threads)
    keep_text(path, write_json(speed.to_json()))


def keep_text(path: Path, text: str) -> None:
    """Write a file of the cache, whole or not at all; where it cannot be written, nothing."""
    with suppress(OSError), cache.filling(path) as part:
        part.write_text(text, encoding="utf-8")


def write_curve(speed: MachineSpeed, path: Path) -> None:
    """Write a measurement into a file that a device class can name as its curve.

    Raises:
        ConfigError: When it cannot be written.
    """
    try:
        path.write_text(write_json(speed.to_json()), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {str(path)!r}: {error.strerror or error}") from None


@lru_cache(maxsize=1)
def software() -> str:
    """Return the processor and the release of torch, which figures depend on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        pass
    return f"{name}, torch {version('torch')}"
