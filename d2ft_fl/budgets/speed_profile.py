"""Measuring how fast this machine trains.

Products and attention are timed one by one, over a grid of shapes. What they cost within a step,
and what all else does, is fitted to real steps of a few small models under a few schedules: least
squares of relative errors, no constant below 0.
"""

import fcntl
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl.budgets.kept_speeds import folder, keep, kept, software
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.costs.seconds import FEATURES
from d2ft_fl.engine.matmul import times
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.trainer import Stepper
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.task import Batch
from d2ft_fl.util.files import unlock
from d2ft_fl.util.torch_device import set_threads, usable_device
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.quantization import quantize_rows

ROWS = (16.0, 64.0, 256.0, 1024.0, 4096.0)
WIDTHS = (32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
TOKENS = (16.0, 64.0, 256.0, 1024.0)
HEAD_WIDTHS = (16.0, 64.0)
ATTENDED = 1024  # examples x heads x tokens that attention is timed with
SECONDS = 0.01  # that a product is repeated for
STEPS = 5  # of which the median counts
EXAMPLES = 64  # that batches are taken from
CODED = 1024, 256  # rows and columns that are quantized
MODELS = ((96, 6, 5, 16), (192, 3, 3, 24), (384, 6, 2, 24))  # dim, heads, blocks, pixels
BATCHES = ((1, 1), (3, 1), (12, 1), (8, 4))  # examples, micro-batches
# Shares of FULL, FROZEN and FORWARD_ONLY, the rest is SHORTCUT; and blocks that run, of the last.
SCHEDULES = (
    (1.0, 0.0, 0.0, 9),
    (0.5, 0.5, 0.0, 9),
    (0.5, 0.0, 0.5, 9),
    (0.5, 0.0, 0.0, 1),
    (0.3, 0.3, 0.4, 1),
)
TRUST = 0.3  # in the tables, beside one step: how hard factors of what they say are held at 1


def profiled(device: str, precision: str, threads: int) -> MachineSpeed:
    """Return what was measured on this machine, measured now where it was not before.

    Args:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of torch.
    """
    if (speed := kept(device, precision, threads)) is not None:
        return speed
    try:
        folder().mkdir(parents=True, exist_ok=True)
        lock = (folder() / "lock").open("w")
    except OSError:
        return measure(device, precision, threads)
    with lock:  # two at once would slow each other down
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (speed := kept(device, precision, threads)) is None:
            speed = measure(device, precision, threads)
            keep(speed)
        unlock(lock.fileno())
    return speed


def measure(device: str, precision: str, threads: int) -> MachineSpeed:
    """Time products, attention and steps; takes some seconds.

    Args:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of torch.
    """
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        tables = _Tables(usable_device(device), precision)
        speed = MachineSpeed(
            device,
            precision,
            threads,
            f"{software()}, {date.today().isoformat()}",
            ROWS,
            WIDTHS,
            tables.products(),
            TOKENS,
            HEAD_WIDTHS,
            tables.attention(),
        )
        return _fitted(speed)
    finally:
        set_threads(before)


class _Tables:
    """Times products and attention over a grid of shapes."""

    def __init__(self, device: torch.device, precision: str):
        self.device = device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device).to(self.dtype)

    @torch.inference_mode()
    def products(self) -> tuple[tuple[float, ...], ...]:
        """Return FLOP/s of products ahead, of gradients of inputs and of weights."""
        found: list[list[float]] = [[], [], []]
        for rows, width in product(map(int, ROWS), map(int, WIDTHS)):
            x, g = self._rand(rows, width), self._rand(rows, width)
            weight, bias = self._rand(width, width), self._rand(width)
            into = self._rand(width, width)
            ways: tuple[tuple[Callable[[], object], ...], ...] = (
                (partial(times, x, weight.t(), bias),),
                (partial(times, g, weight),),
                (partial(times, g.t(), x), partial(torch.mm, g.t(), x, out=into)),
            )
            for rates, same in zip(found, ways, strict=True):
                seconds = min(seconds_of(way, self.device) for way in same)
                rates.append(2 * rows * width * width / seconds)
        return tuple(map(tuple, found))

    def attention(self) -> tuple[tuple[float, ...], ...]:
        """Return FLOP/s of attention ahead and back."""
        ahead, back = [], []
        for tokens, width in product(map(int, TOKENS), map(int, HEAD_WIDTHS)):
            heads = max(1, ATTENDED // tokens)
            q, k, v = (self._rand(1, heads, tokens, width).requires_grad_() for _ in range(3))
            unit = 2 * heads * tokens**2 * width
            forward = seconds_of(partial(F.scaled_dot_product_attention, q, k, v), self.device)
            out = F.scaled_dot_product_attention(q, k, v)
            g = torch.ones_like(out)
            backward = seconds_of(
                partial(torch.autograd.grad, out, (q, k, v), g, retain_graph=True), self.device
            )
            ahead.append(2 * unit / forward)
            back.append(5 * unit / backward)
        return tuple(ahead), tuple(back)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Return the median time of one step, once the first has warmed up caches."""
    spent: list[float] = []
    started = time.perf_counter()
    while len(spent) < 3 or time.perf_counter() - started < SECONDS:
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent[1:])


def _fitted(speed: MachineSpeed) -> MachineSpeed:
    """Return a machine's speed with the constants that real steps ask for."""
    from scipy.optimize import nnls  # takes a while to import

    rows, seconds, starts = zip(*_steps(speed), strict=True)
    features, spent = np.array(rows), np.array(seconds)
    begun = FEATURES.index("start")
    start = float(np.median(np.array(starts) / features[:, begun]))
    features[:, begun] = 0  # steps that were timed are not the first
    held = np.zeros((3, len(FEATURES)))
    held[[0, 1, 2], [0, 1, 2]] = TRUST * np.sqrt(len(spent))
    left = np.concatenate([features / spent[:, None], held])
    right = np.concatenate([np.ones(len(spent)), TRUST * np.sqrt(len(spent)) * np.ones(3)])
    scale = np.maximum(np.abs(left).max(axis=0), 1e-300)
    constants = nnls(left / scale, right)[0] / scale
    fitted = dict(zip(FEATURES, constants.tolist(), strict=True))
    fitted |= {"start": max(0.0, start), "coded": _coded_seconds()}
    return replace(speed, **fitted, message=_message_seconds())


def _steps(speed: MachineSpeed) -> Iterator[tuple[np.ndarray, float, float]]:
    """Yield what steps of small models consist of, how long one took, and the first one more."""
    task, device = ImageClassification(), torch.device(speed.device)
    for dim, heads, blocks, side in MODELS:
        arguments = (("embed_dim", dim), ("num_heads", heads), ("depth", blocks))
        adapter = build_adapter(ModelSpec(GLYPH_NAME, arguments, "none", side, 10, 0))
        arch = adapter.describe()
        weights = {name: p.detach() for name, p in adapter.model.named_parameters()}
        for batch, parts in BATCHES:
            config = RunConfig(batch_size=batch, micro_batches=parts, precision=speed.precision)
            options = TrainingOptions.of(config)
            costs = CostModel(arch, options, 1, speed.device, machine=speed)
            model = PartialModel(adapter, arch, Numerics.of(options), device)
            pool = torch.rand(EXAMPLES, *adapter.input_shape, device=device)
            labels = torch.zeros(EXAMPLES, dtype=torch.long, device=device)
            index = torch.arange(batch, device=device)
            for *shares, depth in SCHEDULES:
                schedule = _mixture(shares, blocks, heads, depth)
                model.reset(schedule, pack_for(arch, weights, schedule))
                model.train(True)
                begun = time.perf_counter()
                meter = _NoMeter(device=device)
                stepper = Stepper(model, task, options, lambda *_: 1e-6, meter, every_slot=True)
                ends = [begun]
                for _ in range(1 + STEPS):
                    stepper.step(Batch(pool[index], labels[index]))
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    ends.append(time.perf_counter())
                first, *spent = np.diff(ends).tolist()
                operations = schedule.operations[None]
                ranks = np.zeros(operations.shape[::2][:1] + operations.shape[2:], dtype=np.int64)
                features = costs.round_seconds.features(operations, np.array([batch]), ranks)
                yield features[0], statistics.median(spent), first - statistics.median(spent)


class _NoMeter(Meter):
    """A meter that counts nothing: the first step of a kind would take several times longer."""

    def run(self, step: Callable[[], Tensor], *_: object, **__: object) -> Tensor:
        return step()


def _mixture(shares: Sequence[float], blocks: int, heads: int, depth: int) -> Schedule:
    """Return a schedule with shares of FULL, FROZEN and FORWARD_ONLY heads in the last blocks."""
    ends = np.round(np.cumsum(shares) * heads).astype(int)
    row = np.zeros(heads, dtype=np.int8)
    starts = [0, *ends[:-1]]
    for operation, start, stop in zip(
        (Operation.FULL, Operation.FROZEN, Operation.FORWARD_ONLY), starts, ends, strict=True
    ):
        row[start:stop] = operation
    running = np.arange(blocks)[:, None] >= blocks - depth
    return Schedule((row * running)[None].astype(np.int8))


def _coded_seconds() -> float:
    """Return the seconds of a number whose change is quantized."""
    after, before = torch.rand(2, *CODED)
    generator = np.random.SFC64(0)
    quantizing = partial(quantize_rows, after, 8, generator, before)
    return seconds_of(quantizing, torch.device("cpu")) / after.numel()


def _message_seconds() -> float:
    """Return the seconds of writing and reading a message of as many tensors as a small model."""
    tensors = {str(index): torch.zeros(16) for index in range(100)}
    return seconds_of(lambda: wire.decode(wire.encode(tensors, {"a": 1})), torch.device("cpu"))
