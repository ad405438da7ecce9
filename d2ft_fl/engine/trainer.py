"""Local training: one client's round on its part of the model."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.engine.meter import Meter, tensor_bytes
from d2ft_fl.engine.partial_model import Entry, PartialModel
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.schedule import Operation, Schedule, micro_batches, slot_sizes
from d2ft_fl.tasks.task import Batch, Outputs, Task

Batches = Iterator[Batch]

# What a tuning decides here: the learning rate of a kind of parameter, and whether it is one
# of LoRA's factors (see `clients/`).
LearningRate = Callable[[Kind, bool, TrainingOptions], float]


def build_optimizer(
    entries: list[Entry], options: TrainingOptions, rate: LearningRate
) -> torch.optim.Optimizer:
    """Return torch's optimiser over compact slices: moments and step counts are per slice."""
    by_rate: dict[float, list[Tensor]] = {}
    for entry in entries:
        by_rate.setdefault(rate(entry.kind, entry.factor, options), []).append(entry.value)
    groups = [{"params": values, "lr": lr} for lr, values in by_rate.items()]
    decay = options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, momentum=options.momentum, weight_decay=decay, fused=True)


def train(
    model: PartialModel,
    batches: Batches,
    task: Task,
    options: TrainingOptions,
    rate: LearningRate,
    meter: Meter,
    beside: Sequence[Tensor] = (),
    every_slot: bool = False,
) -> float:
    """Follow the model's schedule over the batches; its tensors end as the client's update.

    A batch is divided over slots, and run in ``micro_batches`` parts whose gradients add up
    weighted by examples; one optimiser step a batch. A slice that no slot of a batch ran FULL is
    not stepped.

    Args:
        model: Reset to the schedule.
        batches: Of one client, in order.
        task: See :class:`Stepper`.
        options: How to train.
        rate: See :data:`LearningRate`.
        meter: Counts what is used.
        beside: See :class:`Stepper`.
        every_slot: See :class:`Stepper`.

    Returns:
        The training loss of what ran, divided by its weight: of images, the mean over examples.
    """
    model.train(True)
    stepper = Stepper(model, task, options, rate, meter, beside, every_slot)
    total_loss: Tensor | float = 0.0
    total_weight = 0
    try:
        for batch in batches:
            loss, weight = stepper.step(batch)
            total_loss += loss  # stays on its device: nothing waits for it
            total_weight += weight
    finally:
        model.train(False)
    return float(total_loss) / max(1, total_weight)


@dataclass
class Stepper:
    """One optimiser step after another on a model's schedule.

    Attributes:
        task: What is learnt.
        beside: What else is held meanwhile.
        every_slot: Whether each batch will have examples in every slot: then all trained heads of
            a tensor step together, which is faster.
    """

    model: PartialModel
    task: Task
    options: TrainingOptions
    rate: LearningRate
    meter: Meter
    beside: Sequence[Tensor] = ()
    every_slot: bool = False
    _overwrite: bool | None = None
    _shown: list[int] | None = None  # slots of whose heads the optimiser is shown gradients
    _zeroed: list[Tensor] = field(default_factory=list)

    @cached_property
    def entries(self) -> list[Entry]:
        """What is stepped."""
        return self.model.entries(self.every_slot)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's optimiser over the entries."""
        return build_optimizer(self.entries, self.options, self.rate)

    @cached_property
    def _beside_bytes(self) -> int:
        return tensor_bytes(self.beside)

    @cached_property
    def _began(self) -> list[Tensor]:
        """Where the entries began, for the proximal term."""
        return [e.value.clone() for e in self.entries] if self.options.proximal else []

    @cached_property
    def _fixed(self) -> list[Tensor]:
        """What is held all along: weights, gradients, and where the proximal term pulls to."""
        held = (t for _, t in self.model.held())
        return [*held, *self.model.gradients(), *self._began, *self.beside]

    def step(self, batch: Batch) -> tuple[Tensor | float, int]:
        """Run one batch and step; returns its summed loss, and the weight of what ran."""
        schedule = self.model.schedule
        sizes = slot_sizes(len(batch), schedule.slots)
        parts = micro_batches(sizes, schedule.active.tolist(), self.options.micro_batches)
        if not parts:
            return 0.0, 0
        running = _running(batch, sizes, schedule)
        weight = self.task.weight(running)
        filled = bool(np.array(sizes)[schedule.active].all())
        base = self._held_bytes() + tensor_bytes([batch.inputs, running.inputs])
        self._prepare(overwrite=len(parts) == 1 and filled)
        loss: Tensor | float = 0.0
        start = 0
        for part in parts:
            stop = start + sum(part)
            loss += self.meter.run(
                partial(
                    run_micro_batch,
                    self.model,
                    running.rows(start, stop),
                    self.task,
                    part,
                    weight,
                ),
                key=_pattern(self.model, part),
                base=base,
                known=lambda: [
                    *self._fixed,
                    *optimizer_state(self.optimizer),
                    batch.inputs,
                    running.inputs,
                    running.targets,
                ],
            )
            start = stop
        self._choose_stepped(sizes)
        self._pull_back()
        self.optimizer.step()
        self.meter.note(self._held_bytes())
        return loss, weight

    def _prepare(self, overwrite: bool) -> None:
        """Zero the gradients that micro-batches add to; the others are replaced."""
        if overwrite != self._overwrite:
            self._overwrite = overwrite
            self._zeroed = self.model.settle(overwrite)
        torch._foreach_zero_(self._zeroed)

    def _choose_stepped(self, sizes: list[int]) -> None:
        """Show the optimiser the gradients of exactly the slices that this batch ran FULL."""
        runs = [slot for slot, size in enumerate(sizes) if size]
        if runs == self._shown:  # it keeps those of the last batch
            return
        self._shown = runs
        full = (self.model.schedule.operations[runs] == Operation.FULL).any(axis=0)
        for e in self.entries:
            heads = list(e.heads) or slice(None)
            stepped = e.block < 0 or full[e.block, heads].any()
            e.value.grad = e.grad if stepped else None

    def _pull_back(self) -> None:
        """Add the proximal term's gradient, mu (w - where it began), to what is stepped."""
        for e, began in zip(self.entries, self._began, strict=False):
            if e.value.grad is not None:
                e.value.grad.add_(e.value.detach() - began, alpha=self.options.proximal)

    def _held_bytes(self) -> int:
        """Return bytes of weights, gradients and optimiser state."""
        options = self.options.optimizer, self.options.proximal > 0
        key = len(self.optimizer.state), self._beside_bytes, options, _pattern(self.model, [])
        return self.meter.bytes_of(lambda: [*self._fixed, *optimizer_state(self.optimizer)], key)


def _running(batch: Batch, sizes: list[int], schedule: Schedule) -> Batch:
    """Return the examples of the slots that run anything."""
    if schedule.active.all():
        return batch

    def active_rows(tensor: Tensor) -> Tensor:
        return torch.cat(list(compress(tensor.split(sizes), schedule.active)))

    return Batch(active_rows(batch.inputs), active_rows(batch.targets))


def _pattern(model: PartialModel, sizes: list[int]) -> Hashable:
    """Return what decides the cost of a micro-batch: operations, what is held, and its size."""
    schedule = model.schedule
    return (
        id(model),
        id(model.arch),  # which other rounds may tune otherwise
        model.tokens,
        model.numerics,
        model.training,
        schedule.operations.tobytes(),
        b"" if schedule.ranks is None else schedule.ranks.tobytes(),
        tuple(sizes),
        tuple(model.compensated()),
    )


def run_micro_batch(
    model: PartialModel,
    batch: Batch,
    task: Task,
    sizes: list[int],
    weight: int,
) -> Tensor:
    """Run one micro-batch forward and backward; returns its summed loss.

    Args:
        model: Accumulates the gradient.
        batch: The micro-batch.
        task: What is learnt.
        sizes: Examples in each active slot.
        weight: Of the whole batch, which its summed loss is divided by.
    """
    loss = task.loss(_outputs(model, batch, sizes), batch)  # which then are gone
    (loss / weight).backward()
    return loss.detach()


def _outputs(model: PartialModel, batch: Batch, sizes: list[int]) -> Outputs:
    logits = model(batch.inputs, sizes)
    return Outputs(logits.float() if model.numerics.mixed else logits)


def optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield every tensor that an optimiser holds."""
    for state in optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, Tensor))
