"""Probes: the whole model runs before a client trains its part, for scores or for entropy.

Both probes run the model's own weights, LoRA's factors added to them, without dropout. See
:mod:`d2ft_fl.costs.probe_costs` for what they cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.engine.importance_measures import MEASURES, Measure
from d2ft_fl.engine.meter import Meter, tensor_bytes
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.saved_activations import Observer
from d2ft_fl.engine.trainer import Batches, run_micro_batch
from d2ft_fl.lora.config import merged_packed
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.tasks.task import Batch, Task


@dataclass
class ProbeRunner:
    """A client's model with all of its weights.

    Attributes:
        model: What runs it. arch: Without factors. tuned: With factors, if there are any.
        tensors: Every head's slices, packed, and all else, of ``tuned``.
    """

    model: PartialModel
    arch: Architecture
    tuned: Architecture
    tensors: Mapping[str, Tensor]
    options: TrainingOptions
    meter: Meter

    def _reset(self, operation: Operation) -> None:
        self.model.tune(self.arch)
        self.model.numerics = Numerics.of(self.options.plain())
        schedule = Schedule.filled(operation, 1, self.arch.blocks, self.arch.heads)
        # Made anew for each probe: the model copies the weights, and these go before it runs.
        weights = self.meter.count(partial(merged_packed, self.tuned, self.tensors))
        self.model.reset(schedule, weights, gradients=False)

    def scores(self, batch: Batch, task: Task, kinds: Sequence[str]) -> dict[str, np.ndarray]:
        """Measure scores; see :func:`probe_scores`."""
        self._reset(Operation.FULL)
        return probe_scores(self.model, batch, task, kinds, self.meter)

    def entropy(self, batches: Batches, temperature: float) -> np.ndarray:
        """Measure entropy; see :func:`probe_entropy`."""
        self._reset(Operation.FORWARD_ONLY)
        return probe_entropy(self.model, batches, temperature, self.meter)


def probe_entropy(
    model: PartialModel, batches: Batches, temperature: float, meter: Meter
) -> np.ndarray:
    """Return how unsure a model is of each example: float64 [examples].

    The entropy of softmax(logits / temperature), in nats; a temperature below 1 hardens it
    (FedFT-EDS, Shi et al., arXiv 2501.00170). The model must run everything FORWARD_ONLY.
    """
    held = [t for _, t in model.held()]
    base = tensor_bytes(held)
    entropies: list[Tensor] = []
    for batch in batches:
        key = id(model), "entropy", len(batch)
        step = partial(_entropy, model, batch.inputs, temperature)
        entropies.append(meter.run(step, key, base + batch.inputs.nbytes, lambda: held))
    return torch.cat(entropies).cpu().numpy() if entropies else np.zeros(0)


@torch.no_grad()
def _entropy(model: PartialModel, images: Tensor, temperature: float) -> Tensor:
    # One name only: of tensors [batch, classes] no more than two are held at a time.
    p = model(images, [len(images)]).double().div_(temperature).softmax(dim=1)
    return torch.special.entr(p).sum(dim=1)


def probe_scores(
    model: PartialModel, batch: Batch, task: Task, kinds: Sequence[str], meter: Meter
) -> dict[str, np.ndarray]:
    """Measure scores of some kinds: kind -> float64 [blocks, heads].

    Means over examples, run one at a time, of what :mod:`d2ft_fl.planning.importance` defines
    (``fisher`` before its root). A gradient is summed up for all kinds as soon as it exists, so
    that no more than one is held. The model must hold everything FULL in one slot.
    """
    arch = model.arch
    shape = len(kinds), arch.blocks, arch.heads
    sums = torch.zeros(shape, dtype=torch.float64, device=model.device)  # of the example at hand
    total = torch.zeros_like(sums)
    for index, block in model.blocks.items():
        observer = _observer(block.store, [MEASURES[kind] for kind in kinds], sums[:, index])
        for branch in block.branches:
            branch.observer = observer
    whole = list(model.whole().values())
    held = [t for _, t in model.held()]
    base = tensor_bytes(held) + batch.inputs.nbytes
    try:
        for index in range(len(batch)):
            one = batch.rows(index, index + 1)
            meter.run(
                partial(run_micro_batch, model, one, task, [1], task.weight(one)),
                key=(id(model), "scores", *kinds),
                base=base,
                known=lambda: [*held, batch.inputs, batch.targets],
            )
            total += sums.abs()
            sums.zero_()
            for tensor in whole:
                tensor.grad = None
    finally:
        for branch in model.branches():
            branch.observer = None
    means = (total.cpu() / max(1, len(batch))).numpy()
    return {
        kind: mean / arch.subnet_sizes if MEASURES[kind].per_parameter else mean
        for kind, mean in zip(kinds, means, strict=True)
    }


def _observer(store: PackedHeads, measures: Sequence[Measure], sums: Tensor) -> Observer:
    """Return what adds each measure of a block's gradients into ``sums`` [measures, heads]."""

    def observe(role: str, first: int, gradient: Tensor) -> None:
        weights = store.weights[role][first : first + len(gradient)]
        for measure, into in zip(measures, sums, strict=True):
            rows = _row_sums(measure, weights, gradient)
            for head, of_head in store.rows[role].items():
                if of_head.start >= first and of_head.stop <= first + len(rows):
                    into[head] += rows[of_head.start - first : of_head.stop - first].sum()

    return observe


def _row_sums(measure: Measure, weights: Tensor, gradient: Tensor) -> Tensor:
    """Return what a measure adds up, summed over all but the first axis: [rows]."""
    elements = measure.element(weights, gradient)
    return elements if elements.dim() == 1 else elements.flatten(1).sum(dim=1)
