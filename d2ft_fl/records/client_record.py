"""What became of one client in one round."""

from dataclasses import dataclass

import numpy as np

from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.resources import Cost


@dataclass(frozen=True)
class ClientRecord:
    """What became of one client in one round."""

    client: int
    device: str
    examples: int
    operations: dict[str, float]  # shares over slots and subnets
    policy: ExecutionPolicy
    predicted: Cost
    allowed: np.ndarray
    used: Cost | None  # None: sat out or failed
    seconds: float  # simulated
    deadline: float | None  # of these
    wall_seconds: float
    training_seconds: float  # of these
    train_loss: float | None
    scored: int
    viewed: int
    gap: float | None
    rank: float | None  # of LoRA, mean over what it trains; None where that is nothing
    failure: str | None

    @property
    def sat_out(self) -> bool:
        """Whether it had nothing to do."""
        return self.used is None and self.failure is None
