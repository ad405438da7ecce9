"""What became of one client in one round."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from d2ft_fl.budgets.budget import UNLIMITED
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.resources import RESOURCES, Cost


@dataclass(frozen=True)
class ClientRecord:
    """What became of one client in one round.

    Attributes:
        client: Number of the client.
        device: Name of its device class; empty for none.
        examples: How many examples it was to train on.
        operations: By name of an operation, its share over slots and subnets.
        policy: How it ran its schedule.
        predicted: What the cost model predicts for its assignment.
        allowed: What its budget allows of each resource, in the order of ``RESOURCES``.
        used: What was measured; None of a client that sat out or failed.
        seconds: Simulated time.
        deadline: Simulated time that its budget allows; None for any.
        wall_seconds: Time that it took here.
        predicted_seconds: Time of training that is predicted for this machine; None where
            ``d2ft profile`` has not measured it.
        training_seconds: Time of ``wall_seconds`` in which it trained.
        train_loss: Mean training loss; None of a client that did not train.
        scored: Examples with which it measured scores.
        viewed: Examples among which it selected those to train on.
        gap: Bound on how far its plan is from the best one; None where none is known.
        rank: Mean rank of LoRA over the subnets it trains; None where it trains none.
        failure: Why there is no update of it; None where nothing failed.
    """

    client: int
    device: str
    examples: int
    operations: dict[str, float]
    policy: ExecutionPolicy
    predicted: Cost
    allowed: np.ndarray
    used: Cost | None
    seconds: float
    deadline: float | None
    wall_seconds: float
    predicted_seconds: float | None
    training_seconds: float
    train_loss: float | None
    scored: int
    viewed: int
    gap: float | None
    rank: float | None
    failure: str | None

    @property
    def sat_out(self) -> bool:
        """Whether the client had nothing to do."""
        return self.used is None and self.failure is None

    def line(self, round_number: int) -> dict[str, Any]:
        """Return the client's line of ``clients.jsonl``."""
        allowed = {
            name: int(most) if most < UNLIMITED else None
            for name, most in zip(RESOURCES, self.allowed, strict=True)
        }
        return {
            "round": round_number,
            "client": self.client,
            "device": self.device,
            "examples": self.examples,
            "operations": self.operations,
            "policy": asdict(self.policy),
            "used": self.used.amounts() if self.used else None,
            "predicted": asdict(self.predicted),
            "allowed": allowed,
            "seconds": self.seconds,
            "deadline": self.deadline,
            "wall_seconds": self.wall_seconds,
            "predicted_seconds": self.predicted_seconds,
            "training_seconds": self.training_seconds,
            "train_loss": self.train_loss,
            "scored": self.scored,
            "viewed": self.viewed,
            "gap": self.gap,
            "rank": self.rank,
            "sat_out": self.sat_out,
            "fault": self.failure,
        }
