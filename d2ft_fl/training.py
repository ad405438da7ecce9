"""Local training: one client's round on its part of the model."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl.meter import Meter
from d2ft_fl.partial import PartialModel
from d2ft_fl.subnets import Kind, Operation, Schedule, slot_sizes

Batches = Iterator[tuple[Tensor, Tensor]]  # images [batch, ...], labels [batch]


@dataclass(frozen=True)
class LocalOptions:
    """How a client trains what it was assigned."""

    batch_size: int = 16
    epochs: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-4
    head_lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0


# A client mode's one decision: the learning rate of a kind of parameter (see `clients/`).
LearningRate = Callable[[Kind, LocalOptions], float]


@dataclass(frozen=True)
class TrainedSlice:
    """One optimiser entry: a view of a trained tensor, and which subnet it belongs to.

    ``head`` is -1 for shared parameters, ``block`` is -1 for the final part.
    """

    block: int
    head: int
    kind: Kind
    value: Tensor
    grad: Tensor


def trained_slices(model: PartialModel) -> list[TrainedSlice]:
    """Views of everything that trains, one a subnet and parameter, with persistent gradients."""
    slices = []
    for name, tensor in model.trainable().items():
        tensor.grad = torch.zeros_like(tensor)
        p = model.arch.by_name[name]
        if p.kind is not Kind.SLICED:
            slices.append(TrainedSlice(p.block, -1, p.kind, tensor, tensor.grad))
            continue
        for head, rows in model.rows(name).items():
            value = tensor.detach()[rows.start : rows.stop].requires_grad_()
            grad = tensor.grad[rows.start : rows.stop]
            slices.append(TrainedSlice(p.block, head, p.kind, value, grad))
    return slices


def build_optimizer(
    slices: list[TrainedSlice], options: LocalOptions, rate: LearningRate
) -> torch.optim.Optimizer:
    """torch's optimiser over compact slices: moments and step counts are per slice."""
    by_rate: dict[float, list[Tensor]] = {}
    for s in slices:
        by_rate.setdefault(rate(s.kind, options), []).append(s.value)
    groups = [{"params": values, "lr": lr} for lr, values in by_rate.items()]
    decay = options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, momentum=options.momentum, weight_decay=decay, fused=True)


def train(
    model: PartialModel, batches: Batches, options: LocalOptions, rate: LearningRate, meter: Meter
) -> float:
    """Follow the model's schedule over the batches; its tensors end as the client's update.

    A batch is cut into ``slots`` micro-batches whose gradients add up weighted by examples; one
    optimiser step a batch. A slice that no slot of a batch ran FULL is not stepped.

    Returns:
        The mean training loss over the examples that ran.
    """
    schedule = model.schedule
    slices = trained_slices(model)
    optimizer = build_optimizer(slices, options, rate)
    gradients = [t.grad for t in model.trainable().values() if t.grad is not None]
    held = [t for _, t in model.held()]
    total_loss: Tensor | float = 0.0
    total_examples = 0
    for images, labels in batches:
        sizes = slot_sizes(len(images), schedule.slots)
        runs = [slot for slot, size in enumerate(sizes) if size and schedule.active[slot]]
        if not runs:
            continue
        examples = sum(sizes[slot] for slot in runs)
        pieces = list(zip(images.split(sizes), labels.split(sizes), strict=True))
        for slot in runs:
            total_loss += meter.run(
                partial(_micro_batch, model, *pieces[slot], slot, examples),
                key=_pattern(model, schedule, slot, sizes[slot]),
                base=[*held, *gradients, *_moments(optimizer), images],
            )
        _choose_stepped(slices, schedule, runs)
        optimizer.step()
        torch._foreach_zero_(gradients)
        meter.note([*held, *gradients, *_moments(optimizer)])
        total_examples += examples
    return float(total_loss) / max(1, total_examples)


def _pattern(model: PartialModel, schedule: Schedule, slot: int, examples: int) -> Hashable:
    """What decides a micro-batch's cost: its operations, what trains, and its size."""
    return (
        id(model),
        schedule.operations[slot].tobytes(),
        schedule.trained.tobytes(),
        schedule.resident.tobytes(),
        examples,
    )


def _micro_batch(
    model: PartialModel, images: Tensor, labels: Tensor, slot: int, examples: int
) -> Tensor:
    """Forward and backward of one micro-batch of a batch of ``examples``; its summed loss."""
    loss = F.cross_entropy(model(images, slot), labels, reduction="sum")
    (loss / examples).backward()
    return loss.detach()


def _choose_stepped(slices: list[TrainedSlice], schedule: Schedule, runs: list[int]) -> None:
    """Show the optimiser the gradients of exactly the slices that this batch ran FULL."""
    full = (schedule.operations[runs] == Operation.FULL).any(axis=0)  # [blocks, heads]
    for s in slices:
        if s.block < 0:
            stepped = True
        elif s.head < 0:
            stepped = bool(full[s.block].any())
        else:
            stepped = bool(full[s.block, s.head])
        s.value.grad = s.grad if stepped else None


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, Tensor))


def fisher(model: PartialModel, images: Tensor, labels: Tensor, meter: Meter) -> np.ndarray:
    """Empirical Fisher information of each subnet: float64 [blocks, heads].

    The mean over examples of the summed squares of the gradient of the log likelihood,
    ``1/n sum_i sum_{w in subnet} (d log p(y_i | x_i) / d w)^2``, one example at a time. A
    parameter's gradient is consumed as soon as it exists, so that no more than one is held.
    The model must hold everything FULL in one slot.
    """
    total = torch.zeros(model.arch.blocks, model.arch.heads, dtype=torch.float64)
    final_and_shared = [*model.final().values(), *model.shared().values()]

    def drop(tensor: Tensor) -> None:
        tensor.grad = None

    def consume(block: int, runs: dict[int, range]) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            assert tensor.grad is not None
            squares = tensor.grad.flatten(1).square_() if tensor.dim() > 1 else tensor.grad.square()
            per_row = squares.sum(dim=1) if squares.dim() > 1 else squares
            for head, rows in runs.items():
                total[block, head] += per_row[rows.start : rows.stop].sum().item()
            tensor.grad = None

        return hook

    handles = [t.register_post_accumulate_grad_hook(drop) for t in final_and_shared]
    for name, tensor in model.sliced().items():
        hook = consume(model.arch.by_name[name].block, model.rows(name))
        handles.append(tensor.register_post_accumulate_grad_hook(hook))
    held = [t for _, t in model.held()]
    try:
        for index in range(len(images)):
            one = slice(index, index + 1)
            meter.run(
                partial(_micro_batch, model, images[one], labels[one], 0, 1),
                key=(id(model), "fisher"),
                base=[*held, images],
            )
    finally:  # the classifier outlives this pass
        for handle in handles:
            handle.remove()
    return (total / max(1, len(images))).numpy()
