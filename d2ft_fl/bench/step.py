"""Speed and memory of scheduled training, beside training all of the unmodified timm model.

All sides are whole training steps (forward, backward, optimiser) on the same batch, which take
turns in one process: the timm model, the project's own training of everything, and the schedule.
Every ratio is of medians measured side by side. The embedding is frozen everywhere. The other side
of LoRA is peft's own: its model of all four products at rank 8.
"""

import copy
import ctypes
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from d2ft_fl.bench.step_schedules import grid, mixture
from d2ft_fl.config.run_config import OPTIONS, RunConfig
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.engine import matmul
from d2ft_fl.engine.meter import Meter, tensor_bytes
from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.trainer import LearningRate, Stepper, optimizer_state
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora
from d2ft_fl.lora.peft_files import target_pattern
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.report.format import quantity
from d2ft_fl.rounds.tuning import Tuning, load_tuning
from d2ft_fl.subnets.architecture import Architecture, Kind
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule, micro_batches, slot_sizes
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.task import Batch
from d2ft_fl.util.torch_device import free_memory, set_threads, usable_device

PAIRS = 15
LORA = Lora.of(RunConfig())


@dataclass(frozen=True)
class StepBench:
    """What to measure, and how.

    Attributes:
        model: Name of a timm model.
        image_size: Pixels a side; 0 keeps the model's own.
        batch_size: Examples of a step.
        threads: Threads of torch, on a CPU.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16``, of both sides.
        slots: Slots of a batch.
        pairs: Steps of each side, for each schedule.
        checkpointing: Whether the scheduled side computes activations again.
        micro_batches: Micro-batches of a batch, on the scheduled side.
        tuning: ``full`` or ``lora``.
        products: Which library multiplies on the scheduled side: ``auto``, ``mkl``, ``onednn``.
    """

    model: str
    image_size: int
    batch_size: int
    threads: int
    device: str
    precision: str
    slots: int
    pairs: int = PAIRS
    checkpointing: bool = False
    micro_batches: int = 1
    tuning: str = "full"
    products: str = "auto"

    def check(self) -> None:
        """Check that this can be measured.

        Raises:
            ConfigError: When a number or the device cannot be.
        """
        for name in ("batch_size", "threads", "slots", "pairs", "micro_batches"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} {getattr(self, name)} must be 1 or more")
        if self.slots > self.batch_size:
            raise ConfigError(
                f"--slots {self.slots} is more than --batch-size {self.batch_size}; "
                "a slot needs an example"
            )
        OPTIONS["device"].check(self.device)
        usable_device(self.device)

    def load_tuning(self) -> Tuning:
        """Return the tuning of the scheduled side, as it is with options at their defaults."""
        return load_tuning(RunConfig(tuning=self.tuning), option="--tuning")

    def options(self) -> TrainingOptions:
        """Return how the scheduled side trains; the reference trains alike, in whole batches."""
        return TrainingOptions.of(
            RunConfig(
                batch_size=self.batch_size,
                precision=self.precision,
                checkpointing=self.checkpointing,
                micro_batches=self.micro_batches,
            )
        )


@dataclass(frozen=True)
class Row:
    """One schedule beside the reference, which trains all of the timm model and is 1 everywhere.

    Attributes:
        schedule: Name of the schedule.
        slots: Slots of the schedule.
        batch_size: Examples of a step.
        flop_ratio: Counted FLOPs of a step.
        time_ratio: Median time of a step.
        own_flop_ratio: Counted FLOPs of a step, over those of the project's own all FULL.
        own_time_ratio: Median time of a step, over that of the project's own all FULL.
        activation_ratio: Bytes saved for the backward pass.
        predicted_activation_ratio: Bytes saved for the backward pass, by the cost model.
        peak_memory_ratio: Peak bytes of a step, with everything that is resident.
        predicted_peak_memory_ratio: Peak bytes by the cost model, with its margin.
        reset_ratio: Time to reset the model to the schedule, over that of a reference step.
        seconds: Median seconds of a step.
        flops_as_predicted: Whether the cost model predicted the counted FLOPs.
    """

    schedule: str
    slots: int
    batch_size: int
    flop_ratio: float
    time_ratio: float
    own_flop_ratio: float
    own_time_ratio: float
    activation_ratio: float
    predicted_activation_ratio: float
    peak_memory_ratio: float
    predicted_peak_memory_ratio: float
    reset_ratio: float
    seconds: float
    flops_as_predicted: bool

    def to_json(self) -> dict[str, object]:
        """Return the row as a mapping."""
        return asdict(self)


def bench_step(bench: StepBench, done: Callable[[str], None] = lambda name: None) -> list[Row]:
    """Measure every schedule of the grid.

    Args:
        bench: What to measure.
        done: Told the name of each schedule when it has been measured.
    """
    bench.check()
    matmul.use(bench.products)
    try:
        return _bench_step(bench, done)
    finally:
        matmul.use("auto")


def _bench_step(bench: StepBench, done: Callable[[str], None]) -> list[Row]:
    set_threads(bench.threads)
    _keep_memory()
    spec = ModelSpec(bench.model, (), "none", bench.image_size, 10, 0)
    adapter = build_adapter(spec)
    model, arch = adapter.model.to(bench.device), adapter.describe()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(bench.batch_size, *adapter.input_shape, generator=generator)
    labels = torch.arange(bench.batch_size) % 10
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuning = bench.load_tuning()
    arch = tuning.architecture(arch, 1)
    _check_memory(bench, CostModel(arch, bench.options(), 1, bench.device))
    weights = dict(tuning.prepare(weights, arch, 1, weights)[0])
    reference = _Reference(
        adapter, arch, weights, bench, images.to(bench.device), labels.to(bench.device)
    )
    everything = mixture(arch, 1, {Operation.FULL: 1.0})
    own = _Scheduled(everything, reference, tuning.learning_rate)
    rows = []
    for name, schedule in grid(arch, bench.slots).items():
        rows.append(_measure(name, schedule, reference, own))
        done(name)
    return rows


def _check_memory(bench: StepBench, costs: CostModel) -> None:
    """Check that three trainings side by side fit, of which one at a time has activations.

    The reference trains in whole batches, whatever the scheduled side does.

    Raises:
        ConfigError: When they do not.
    """
    # What is freed comes back in other sizes: a step leaves about as much behind as it takes.
    needed = 2 * costs.full_cost(bench.batch_size).memory + 3 * costs.full_cost(1).memory
    if needed > (free := free_memory(usable_device(bench.device))):
        raise ConfigError(
            f"--batch-size {bench.batch_size} takes about {quantity(needed, 'B')} of memory, of "
            f"which {quantity(free, 'B')} are free: use fewer examples, or a smaller model or image"
        )


def _keep_memory() -> None:
    """Have the C library keep freed memory, where it is glibc.

    A training loop finds the memory of its last step again. Two that take turns would hand it back
    and forth to the system, and one would pay for what the other has freed.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(trim_threshold, 1 << 30)
        library.mallopt(mmap_threshold, 1 << 25)  # the most it takes


class _Reference:
    """The reference: training all of the unmodified timm model; under LoRA, peft's model of it."""

    def __init__(
        self,
        adapter: ModelAdapter,
        arch: Architecture,
        weights: dict[str, Tensor],
        bench: StepBench,
        images: Tensor,
        labels: Tensor,
    ):
        self.adapter, self.arch, self.weights, self.bench = adapter, arch, weights, bench
        model = adapter.model
        self.images, self.labels = images, labels
        model.requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(arch.by_name[name].kind is not Kind.EMBEDDING)
        self.model: torch.nn.Module = _adapted(model, arch) if arch.rank else model
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
        self.step()
        held = [*self.model.parameters(), *optimizer_state(self.optimizer)]
        self.activations = saved_bytes(self.forward, held)
        self.optimizer.zero_grad()
        meter = Meter(verify=True, device=images.device)
        known = [*held, images, labels]
        meter.run(self.step, "step", tensor_bytes([*held, images]), lambda: known)
        self.flops, self.peak_bytes = meter.flops, meter.peak_bytes

    def forward(self) -> Tensor:
        """Return the loss of the batch."""
        mixed = self.bench.precision == "bf16"
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=mixed):
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def step(self) -> None:
        """Run one training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().backward()
        self.optimizer.step()


def _adapted(model: torch.nn.Module, arch: Architecture) -> torch.nn.Module:
    """Return a copy of the model as peft trains it."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    config = LoraConfig(
        r=LORA.rank,
        lora_alpha=int(LORA.alpha),
        target_modules=target_pattern(arch, LORA.targets_in(arch)),
        modules_to_save=[arch.classifier],
    )
    return get_peft_model(copy.deepcopy(model), config)


class _Scheduled:
    """A schedule in training, and what its steps and resets were counted to take.

    Args:
        schedule: What runs.
        reference: Whose model, weights and batch they are.
        rate: Learning rates, as the tuning decides them.
    """

    def __init__(self, schedule: Schedule, reference: _Reference, rate: LearningRate):
        bench, arch, images = reference.bench, reference.arch, reference.images
        self.schedule, self.rate, self.options = schedule, rate, bench.options()
        self.batch, self.device = Batch(images, reference.labels), images.device
        self.model = PartialModel(reference.adapter, arch, Numerics.of(self.options), images.device)
        self.packed = pack_for(arch, reference.weights, schedule)
        reset = Meter(device=images.device)
        reset.count(self.reset)  # once a round, factors are merged
        self.model.train(True)
        counted = Meter(verify=True, device=images.device)
        self.stepper = Stepper(
            self.model, ImageClassification(), self.options, rate, counted, every_slot=True
        )
        for _ in range(2):  # the second finds the optimiser's state
            counted.start()
            self.step()
        self.reset_flops, self.flops, self.peak_bytes = (
            reset.flops,
            counted.flops,
            counted.peak_bytes,
        )
        self.stepper.meter = _NoMeter(device=images.device)

    def reset(self) -> None:
        """Take the weights anew."""
        self.model.reset(self.schedule, self.packed)

    def step(self) -> None:
        """Run one training step."""
        self.stepper.step(self.batch)

    def saved(self, sizes: list[int]) -> int:
        """Return bytes saved for the backward pass by a micro-batch of some examples a slot."""
        images, labels = (t[: sum(sizes)] for t in (self.batch.inputs, self.batch.targets))
        return saved_bytes(
            lambda: F.cross_entropy(self.model(images, sizes).float(), labels),
            [t for _, t in self.model.held()],
        )


def _measure(name: str, schedule: Schedule, reference: _Reference, own: _Scheduled) -> Row:
    bench, images = reference.bench, reference.images
    costs = CostModel(reference.arch, bench.options(), schedule.slots, images.device.type)
    ours = _Scheduled(schedule, reference, own.rate)
    (sizes,) = micro_batches(slot_sizes(len(images), schedule.slots), schedule.active.tolist(), 1)
    activations, predicted = ours.saved(sizes), costs.saved_bytes(schedule, sizes)
    sides: tuple[Callable[[], None], ...] = (reference.step, own.step, ours.step)
    for step in sides:
        step()
    times = [[_timed(step, images.device) for step in sides] for _ in range(bench.pairs)]
    theirs, whole, seconds = (statistics.median(side) for side in zip(*times, strict=True))
    resets = statistics.median(_timed(ours.reset, images.device) for _ in range(3))
    return Row(
        schedule=name,
        slots=schedule.slots,
        batch_size=len(images),
        flop_ratio=ours.flops / reference.flops,
        time_ratio=seconds / theirs,
        own_flop_ratio=ours.flops / own.flops,
        own_time_ratio=seconds / whole,
        activation_ratio=activations / reference.activations,
        predicted_activation_ratio=predicted / reference.activations,
        peak_memory_ratio=ours.peak_bytes / reference.peak_bytes,
        predicted_peak_memory_ratio=costs.memory(schedule, 2 * len(images)) / reference.peak_bytes,
        reset_ratio=resets / theirs,
        seconds=seconds,
        flops_as_predicted=ours.flops + ours.reset_flops == costs.flops(schedule, len(images)),
    )


class _NoMeter(Meter):
    """A meter that measures nothing, so that nothing but training is timed."""

    def run(self, step: Callable[[], Tensor], *_: object, **__: object) -> Tensor:
        return step()


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Return bytes of distinct storages that autograd saves in ``forward``, without ``held``."""
    resident = {t.untyped_storage().data_ptr() for t in held}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # else a node that keeps its result would keep itself, for good

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storages.values())
