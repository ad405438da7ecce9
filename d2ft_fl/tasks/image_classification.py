"""Image classification: cross-entropy, accuracy, and an optional correction for rare labels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl.tasks.task import BaseTask, Batch, Outputs


@dataclass(frozen=True, eq=False)
class ImageClassification(BaseTask):
    """One label for each image.

    Attributes:
        logit_adjustment: tau, how much of the log of its label's share of the client's examples is
            added to each logit in the training loss (Menon et al., ICLR 2021, arXiv 2007.07314,
            equation 10; for federations FedLC, Zhang et al., ICML 2022, arXiv 2209.00189). At 1 the
            model need not learn which labels a client happens to have. 0 for none.
        prior: What is added to logits in the training loss, float32 [classes]; None for nothing.
            :meth:`for_client` computes it.
    """

    logit_adjustment: float = 0.0
    prior: Tensor | None = None

    name: ClassVar[str] = "image-classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    primary: ClassVar[str] = "accuracy"
    percent: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    def for_client(
        self, targets: np.ndarray, classes: int, device: torch.device
    ) -> "ImageClassification":
        """Return the task with the prior of a client's labels: tau log p(label).

        Each label counts once more than the client has it, so that none is impossible.
        """
        if not self.logit_adjustment:
            return self
        counts = np.bincount(targets, minlength=classes) + 1.0
        prior = torch.from_numpy(self.logit_adjustment * np.log(counts / counts.sum()))
        return replace(self, prior=prior.float().to(device))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of logits plus prior. Adds the prior in place."""
        logits = outputs.logits  # [batch, classes]
        if self.prior is not None:
            logits = logits.add_(self.prior)
        return F.cross_entropy(logits, batch.targets, reduction="sum")

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Count correct labels and examples, and sum the cross-entropy without the prior."""
        logits, labels = outputs.logits, batch.targets
        return {
            "correct": (logits.argmax(dim=1) == labels).sum(),
            "loss": F.cross_entropy(logits, labels, reduction="sum"),
            "examples": torch.tensor(len(batch), device=labels.device),
        }

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Divide by the number of examples: the share of correct labels, and the mean loss."""
        examples = float(sums["examples"])
        return {
            "accuracy": float(sums["correct"]) / examples,
            "loss": float(sums["loss"]) / examples,
        }
