"""A made-up task whose primary metric is minimised and is no share."""

import torch

from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.tasks.task import BaseTask


class Distance(BaseTask):
    """The root of the mean squared distance of the largest logit's place to the label's."""

    name = "distance-made-up"
    metrics = ("distance", "within")
    primary = "distance"
    maximise = False
    percent = frozenset({"within"})

    def loss(self, outputs, batch):
        rows = torch.arange(len(batch), device=batch.targets.device)
        return -outputs.logits.log_softmax(dim=1)[rows, batch.targets].sum()

    def sums(self, outputs, batch):
        far = (outputs.logits.argmax(dim=1) - batch.targets).double()
        return {
            "squares": far.square().sum(),
            "within": (far.abs() <= 1).sum(),
            "examples": torch.tensor(len(batch), device=far.device),
        }

    def figures(self, sums):
        examples = float(sums["examples"])
        return {
            "distance": (float(sums["squares"]) / examples) ** 0.5,
            "within": float(sums["within"]) / examples,
        }


DISTANCE = MetricSpec.of(Distance())
