"""The devices and threads that torch computes with."""

import psutil
import torch

from d2ft_fl.errors import ConfigError


def set_threads(threads: int) -> None:
    """Pin torch's thread count: float results depend on it."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def usable_device(name: str) -> torch.device:
    """Return a device by its name, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: When this machine has no such device that torch can use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no usable GPU here; use 'cpu'")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be had on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)


def warm_up(device: torch.device) -> None:
    """Have libraries take the workspace they keep, so that no client is charged for it."""
    if device.type == "cuda":
        a = torch.ones(8, 8, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            torch.mm(a.to(dtype), a.to(dtype))
        torch.cuda.synchronize(device)
