"""Peak memory of rounds: what is resident all the time, plus the worst micro-batch.

Resident are weights, gradients, optimiser state, compensation, what FedProx and quantization
compare with, and a batch's images. :mod:`d2ft_fl.costs.memory` has micro-batches.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.costs.compensation import Extras
from d2ft_fl.costs.memory import MicroBatchMemory
from d2ft_fl.costs.parameter_counts import Parts
from d2ft_fl.costs.resources import MEMORY_MARGIN
from d2ft_fl.subnets.schedule import Operation, residents, trainees
from d2ft_fl.wire.sizes import ELEMENT

MOST_KNOWN = 4096  # schedules whose memory is kept
MOMENTS = {"adamw": 2, "sgd": 1}  # tensors of optimiser state per trained tensor


@dataclass(frozen=True, eq=False)
class RoundMemory:
    """Memory of clients' rounds, in bytes.

    Attributes:
        options: How clients train.
        slots: Slots of schedules.
        parts: Parameter counts of the model.
        extras: What compensation adds.
        activations: Bytes of the activations of an example.
        kept: Bytes of a trained subnet's weights as sent, kept to quantize its change: int64
            [blocks, heads].
    """

    options: TrainingOptions
    slots: int
    parts: Parts
    extras: Extras
    activations: ActivationBytes
    kept: np.ndarray

    def peak(
        self,
        operations: np.ndarray,
        examples: np.ndarray,
        ranks: np.ndarray,
        parts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the peak bytes of rounds, margin included: int64 [clients].

        The first batch finds no optimiser state yet; it counts in every later one.

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
            parts: Micro-batches of a batch: int64 [clients]; None for as configured.
        """
        if parts is None:
            parts = np.full(len(examples), self.options.micro_batches)
        first = np.minimum(examples, self.options.batch_size)
        rest = first if self.options.epochs > 1 else np.minimum(examples - first, first)
        at_first = self.batches(operations, first, ranks, parts)
        later = at_first
        if (rest != first).any():
            later = self.batches(operations, rest, ranks, parts)
        if self.slots > 1 and parts.max() > 1:
            # A smaller batch is cut elsewhere: a micro-batch may have more of one slot than any of
            # a whole batch.
            last = np.where(examples > first, examples % self.options.batch_size, 0)
            if last.any():
                later = np.maximum(later, self.batches(operations, last, ranks, parts))
        before = self.resident(operations, ranks, moments=False)
        after = self.resident(operations, ranks)
        peak = np.maximum(before + at_first, after + later)
        return peak + peak // MEMORY_MARGIN

    def batch_extremes(self, examples: int) -> tuple[int, int]:
        """Return the examples of the first batch of a round, and of the largest later one.

        The second number is 0 where there is no later batch.
        """
        first = min(examples, self.options.batch_size)
        return first, first if self.options.epochs > 1 else min(examples - first, first)

    def copies(self, moments: bool) -> int:
        """Count the tensors beside each that trains: gradient, optimiser state, FedProx's start.

        Args:
            moments: Whether there is optimiser state, as after the first step.
        """
        state = MOMENTS[self.options.optimizer] if moments else 0
        return 1 + state + (self.options.proximal > 0)

    def resident(
        self, operations: np.ndarray, ranks: np.ndarray, moments: bool = True
    ) -> np.ndarray:
        """Return the bytes of weights, gradients and optimiser state: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
            moments: Whether there is optimiser state, as after the first step.
        """
        resident, trained = residents(operations), trainees(operations)
        copies = self.copies(moments)
        parts = self.parts
        elements = parts.base.outer + copies * parts.trained.outer + parts.base.elements(resident)
        elements = elements + copies * parts.whole.elements(trained)
        if parts.arch.rank:
            elements += parts.factors.elements(ranks) + copies * parts.ranked.elements(ranks)
        kept = (trained * self.kept).sum(axis=(1, 2))
        return ELEMENT * elements + kept + self.extras.resident(operations)

    def batches(
        self, operations: np.ndarray, batch: np.ndarray, ranks: np.ndarray, parts: np.ndarray
    ) -> np.ndarray:
        """Return the bytes of a batch of images and of its worst micro-batch: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            batch: Examples of the batch: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
            parts: Micro-batches of a batch: int64 [clients].
        """
        running = sizes_of_slots(batch, self.slots) * active_slots(operations)  # [clients, slots]
        total = running.sum(axis=1)
        images = batch + np.where(total < batch, total, 0)  # put together in a batch apart
        largest = -(-total // parts)  # in one slot, of its micro-batches
        if self.slots == 1 and not self.activations.casts:
            peaks = self.in_one_slot(operations, largest, ranks)
        else:
            whole = self.slots == 1
            sizes = largest[:, None, None] if whole else cut_in_micro_batches(running, parts)
            of_each = [
                np.where(one.any(axis=1), self.micro_batches(operations, one, ranks).peak(), 0)
                for one in np.moveaxis(sizes, 1, 0)
            ]
            peaks = np.max(of_each, axis=0)
        return ELEMENT * self.parts.arch.input_elements * images + peaks

    def in_one_slot(
        self, operations: np.ndarray, sizes: np.ndarray, ranks: np.ndarray
    ) -> np.ndarray:
        """Return the peak bytes of micro-batches of one slot, where no weights are cast.

        n examples take n times what one takes, but for the gradient of the classifier. What one
        takes is kept: the search for policies asks for the same schedules in many sizes.

        Args:
            operations: int8 [clients, 1, blocks, heads].
            sizes: Examples of each micro-batch: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].

        Returns:
            int64 [clients], 0 where there is no example.
        """
        of_ranks = [r.tobytes() for r in ranks] if self.parts.arch.rank else [b""] * len(ranks)
        keys = list(zip([o.tobytes() for o in operations], of_ranks, strict=True))
        if len(self._known) + len(keys) > MOST_KNOWN:
            self._known.clear()
        new = {key: index for index, key in enumerate(keys) if key not in self._known}
        if new:
            rows = list(new.values())
            one = np.ones((len(rows), 1), dtype=np.int64)
            memory = replace(self.micro_batches(operations[rows], one, ranks[rows]), gradient=0)
            classifier = memory.saved.sum(axis=1) + memory.classifier
            values = zip(memory.peak().tolist(), classifier.tolist(), strict=True)
            self._known.update(zip(new, values, strict=True))
        all_along, in_classifier = np.array([self._known[key] for key in keys]).T * sizes
        gradient = self.activations.gradient * (sizes > 0)
        return np.maximum(all_along, in_classifier + gradient)

    @cached_property
    def _known(self) -> dict[tuple[bytes, bytes], tuple[int, int]]:
        """Bytes of an example, at the peak and in the classifier, by operations and ranks."""
        return {}

    def micro_batches(
        self, operations: np.ndarray, sizes: np.ndarray, ranks: np.ndarray
    ) -> MicroBatchMemory:
        """Return the memory of micro-batches.

        Args:
            operations: int8 [micro-batches, slots, blocks, heads].
            sizes: Examples of each slot: int64 [micro-batches, slots].
            ranks: Of subnets that train, else 0: int64 [micro-batches, blocks, heads].
        """
        checkpointing = self.options.checkpointing
        return MicroBatchMemory.of(self.activations, checkpointing, operations, sizes, ranks)


def cut_in_micro_batches(running: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return examples of each slot in each micro-batch, as :func:`.micro_batches` cuts batches.

    Args:
        running: Examples of each slot that are run: int64 [clients, slots].
        counts: In how many micro-batches, at most: int64 [clients].

    Returns:
        int64 [clients, micro-batches, slots], nothing in those that a client does not have.
    """
    total, counts = running.sum(axis=1)[:, None], counts[:, None]
    index = np.arange(counts.max())
    sizes = (total // counts + (index < total % counts)) * (index < counts)
    ends, cuts = _bounds(running), _bounds(sizes)
    within = np.clip(ends[:, None], cuts[:, :-1, None], cuts[:, 1:, None])
    return np.diff(within, axis=2)


def _bounds(sizes: np.ndarray) -> np.ndarray:
    """Return where parts begin, and the last one ends: int64 [..., parts + 1] from [..., parts]."""
    return np.concatenate([np.zeros_like(sizes[..., :1]), np.cumsum(sizes, axis=-1)], axis=-1)


def active_slots(operations: np.ndarray) -> np.ndarray:
    """Return in which slots anything runs: bool [clients, slots].

    Args:
        operations: int8 [clients, slots, blocks, heads].
    """
    return (operations != Operation.SHORTCUT).any(axis=(2, 3))


def sizes_of_slots(batch: np.ndarray, slots: int) -> np.ndarray:
    """Return :func:`~d2ft_fl.subnets.schedule.slot_sizes` of many batches: int64 [clients, slots].

    Args:
        batch: Examples of each batch: int64 [clients].
        slots: Into how many slots each is cut.
    """
    return batch[:, None] // slots + (np.arange(slots) < batch[:, None] % slots)
