"""Measuring what training really used, without asking the cost model.

FLOPs are counted as torch's own ``FlopCounterMode`` has them; memory by following every storage
that a step (forward and backward) creates from birth to death, or on CUDA by the allocator.
Counting slows a step down several times, so a pattern (operations, examples) is measured the first
time this process runs it and remembered; with ``verify`` every single step is counted.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Counts FLOPs while it is active, by the formulas of torch's ``FlopCounterMode``.

    That mode also counts by module, which takes longer than the operations of a small model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every operation a call: nothing is compiled here that would look inside."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._counted(func, args, kwargs or {})

    def _counted(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _WITHOUT:
            return func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is NotImplemented:
                _WITHOUT.add(func)
                out = func(*args, **kwargs)
            return out
        out = func(*args, **kwargs)
        self.flops += _evaluate(formula, args, kwargs, out)
        return out


_WITHOUT: set[Any] = set()  # operations without a formula that no others are behind
MOST_EVALUATED = 1 << 16
_evaluated: dict[Any, int] = {}  # formula, shapes and what else it was given -> FLOPs


def _evaluate(formula: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return a formula's FLOPs, remembered by shapes: working them out takes torch its time."""
    given = [*args, *kwargs.values()]
    shapes = (tuple(a.shape) if isinstance(a, Tensor) else a for a in given)
    key = formula, *kwargs, *shapes
    try:
        if key not in _evaluated:
            if len(_evaluated) >= MOST_EVALUATED:
                _evaluated.clear()
            _evaluated[key] = formula(*args, **kwargs, out_val=out)
        return _evaluated[key]
    except TypeError:  # lists, which have no hash
        return formula(*args, **kwargs, out_val=out)


class LiveBytes(Flops):
    """Counts FLOPs and follows storages that are created meanwhile; ``peak`` is the most alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}  # address of a storage -> what watches its life

    def _follow(self, storage: Any) -> None:
        """Count a storage until it dies, unless it is followed already."""
        key = storage._cdata
        if key in self._seen or not (size := storage.nbytes()):
            return

        def free(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of some tensors, which were there before it is active."""
        self._seen.update((t.untyped_storage()._cdata, None) for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._counted(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._follow(out.untyped_storage())
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._follow(leaf.untyped_storage())
        return out


class _AllocatorPeak:
    """The most that torch's CUDA allocator hands out meanwhile, counted as ``LiveBytes`` does."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    def __enter__(self) -> Self:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) - self._before


@dataclass(frozen=True)
class Reading:
    """What one step used: FLOPs, and peak bytes on top of what was there before."""

    flops: int
    peak_bytes: int


@dataclass
class Meter:
    """Counts what runs. One a process; readings are kept between rounds.

    Attributes:
        verify: Count every step instead of remembering patterns.
        device: Where it runs: storages are followed on a CPU, on CUDA the allocator is asked.
        flops: FLOPs since :meth:`start`.
        peak_bytes: Largest peak of a step since :meth:`start`, base included.
    """

    verify: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    limit: int = 4096
    flops: int = 0
    peak_bytes: int = 0
    _known: dict[Hashable, Reading] = field(default_factory=dict)
    _sizes: dict[Hashable, int] = field(default_factory=dict)

    def start(self) -> None:
        """Begin a round."""
        self.flops = self.peak_bytes = 0

    def run(
        self,
        step: Callable[[], Any],
        key: Hashable,
        base: int,
        known: Callable[[], Iterable[Tensor]],
    ) -> Any:
        """Run ``step`` and add what it used.

        Args:
            step: Forward and backward of one micro-batch.
            key: What decides its cost.
            base: Bytes held before it: weights, gradients, optimiser state, images.
            known: The tensors behind ``base``.
        """
        reading = None if self.verify else self._known.get(key)
        if reading is None:
            if self.device.type == "cpu":
                live = LiveBytes()
                live.ignore(known())
                with live:
                    result = step()
                reading = Reading(live.flops, live.peak)
            else:
                with _AllocatorPeak(self.device) as allocated, Flops() as counter:
                    result = step()
                reading = Reading(counter.flops, allocated.peak)
            if len(self._known) >= self.limit:
                self._known.clear()
            self._known[key] = reading
        else:
            result = step()
        self.flops += reading.flops
        self.peak_bytes = max(self.peak_bytes, base + reading.peak_bytes)
        return result

    def bytes_of(self, tensors: Callable[[], Iterable[Tensor]], key: Hashable) -> int:
        """Return bytes of tensors, of which ``key`` decides how large they are."""
        if self.verify or key not in self._sizes:
            if len(self._sizes) >= self.limit:
                self._sizes.clear()
            self._sizes[key] = tensor_bytes(tensors())
        return self._sizes[key]

    def count(self, step: Callable[[], Any]) -> Any:
        """Run something outside of steps, and add its FLOPs."""
        with Flops() as counter:
            result = step()
        self.flops += counter.flops
        return result

    def note(self, held: int) -> None:
        """Account for a moment outside of steps at which this many bytes are held."""
        self.peak_bytes = max(self.peak_bytes, held)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return bytes of the distinct storages behind some tensors."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
