"""Drawing random numbers a second time, as checkpointing needs for dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator_state(device: torch.device) -> Tensor:
    """Return the state of the generator that dropout on a device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def drawn_again(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Draw again what was drawn from ``state`` on, and leave the generator as it is.

    Args:
        device: Whose generator.
        state: Of :func:`generator_state`; None where nothing is drawn.
    """
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
