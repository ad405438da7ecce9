"""Quantization: slices travel in few bits a number.

A row d becomes whole numbers q of b bits, and one scale s for them:

    s = max |d| / (2^(b-1) - 1)        q = floor(d / s + u)

**Up**, d is what a client changed of a row, and u is drawn from [0, 1), so that s q is d on
average: stochastic rounding (QSGD, Alistarh et al., NeurIPS 2017, arXiv 1610.02132, whose norm is
that of the whole gradient). The server adds s q to what the row is. u has 16 bits, with which the
mean is d to s / 2^17; with 8 bits a number to s / 2^16, for float32 rounds what is added to 127.

**Down**, d is the row, and u = 1/2: all clients begin with the same weights, next to the server's,
which stay as exact as they are. So what comes back must be a change: down needs few bits up.

Quantized are the weights of subnets' products; biases, what a block shares, LoRA's factors, what
never changes and the classifier travel as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.config.choices import DOWNLOAD_BITS, PLAIN_BITS, UPLOAD_BITS
from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire.sizes import ELEMENT

SCALE_BYTES = 4
# Numbers that are quantized at a time. What fewer need stays in a core's cache; but then calls of
# torch take longer than what they do.
BLOCK = 1 << 18
TINY = 2.0**-126  # the least scale that has a reciprocal


def check_bits(up: int, down: int) -> None:
    """Check that numbers can travel in so many bits.

    Raises:
        ConfigError: If not.
    """
    for direction, bits, allowed in (("up", up, UPLOAD_BITS), ("down", down, DOWNLOAD_BITS)):
        if bits not in allowed:
            raise ConfigError(
                f"{bits} bits of a number that travels {direction} must be "
                f"{' or '.join(map(str, allowed))}"
            )
    if down < PLAIN_BITS <= up:
        raise ConfigError(
            f"numbers come down in {down} bits (download-bits) only where changes come back "
            f"quantized: set upload-bits to {' or '.join(map(str, UPLOAD_BITS[1:]))}, not {up}"
        )


def is_quantized(p: Parameter, bits: int) -> bool:
    """Whether a parameter's slices travel quantized."""
    products = p.kind is Kind.SLICED and len(p.shape) == 2 and not p.factor
    return bits < PLAIN_BITS and products and not p.fixed


def row_bytes(p: Parameter, bits: int) -> int:
    """Return the bytes of one row of a parameter's slices on the wire."""
    width = p.row_width
    return SCALE_BYTES + -(-width * bits // 8) if is_quantized(p, bits) else ELEMENT * width


def quantize_rows(
    rows: Tensor,
    bits: int,
    generator: np.random.BitGenerator | None = None,
    before: Tensor | None = None,
    bits_before: int = PLAIN_BITS,
) -> Tensor:
    """Quantize numbers [rows, width], or how they changed: uint8 [rows, bytes].

    Args:
        rows: Numbers: float32 [rows, width].
        bits: Of a number: 4 or 8.
        generator: Draws what is rounded up; None to round to what is nearest.
        before: What ``rows`` were, to quantize changes: float32 [rows, width], or quantized.
        bits_before: Of a number of ``before``.
    """
    count, width = rows.shape
    quantized = torch.empty(count, SCALE_BYTES + -(-width * bits // 8), dtype=torch.uint8)
    size = max(1, BLOCK // width)
    steps, draws = torch.empty(2, min(size, count), width)
    for start in range(0, count, size):
        here = slice(start, start + size)
        block = rows[here]
        of_block = steps[: len(block)]
        if before is not None:
            block = _changed(block, before[here], bits_before, of_block)
        up = None if generator is None else _drawn(generator, draws[: len(block)])
        _quantize_block(block, bits, up, of_block, quantized[here])
    return quantized


def _changed(block: Tensor, before: Tensor, bits: int, into: Tensor) -> Tensor:
    """Return how rows changed.

    Args:
        block: Numbers: float32 [rows, width].
        before: What they were, in ``bits`` a number.
        bits: Of a number of ``before``.
        into: Is overwritten: float32 [rows, width].
    """
    if bits == PLAIN_BITS:
        return torch.sub(block, before, out=into)
    scale, numbers = _scale_and_numbers(before, block.shape[1], bits)
    # Rounded as in `dequantize_rows`: what did not change must not seem to.
    old = into.copy_(numbers).sub_(2 ** (bits - 1) - 1).mul_(scale)
    return torch.sub(block, old, out=into)


def _drawn(generator: np.random.BitGenerator, into: Tensor) -> Tensor:
    """Fill a tensor with draws from the middles of 2^16 equal parts of [0, 1)."""
    bits = np.asarray(generator.random_raw(-(-into.numel() // 4))).view(np.int16)
    np.multiply(bits[: into.numel()].reshape(into.shape), np.float32(2**-16), out=into.numpy())
    return into.add_(0.5 + 2**-17)


def _quantize_block(
    block: Tensor, bits: int, up: Tensor | None, steps: Tensor, into: Tensor
) -> None:
    """Quantize a few rows.

    Args:
        block: Numbers: float32 [rows, width].
        bits: Of a number.
        up: What is added before numbers are rounded down: [rows, width]; None for 1/2. Is
            overwritten.
        steps: Is overwritten; may be ``block``.
        into: Where the quantized rows go: uint8 [rows, bytes].
    """
    largest = 2 ** (bits - 1) - 1
    scale = block.abs().amax(dim=1, keepdim=True).div_(largest)  # [rows, 1]
    into[:, :SCALE_BYTES] = scale.view(torch.uint8)
    per_scale = scale.clamp_(min=TINY).reciprocal_()
    if up is None:
        torch.mul(block, per_scale, out=steps).add_(largest + 0.5)
    else:
        torch.addcmul(up.add_(largest), block, per_scale, out=steps)
    steps.clamp_(max=2 * largest)
    numbers = into[:, SCALE_BYTES:]
    if bits == 4:
        numbers = torch.zeros(len(steps), 2 * numbers.shape[1], dtype=torch.uint8)
    with np.errstate(invalid="ignore"):  # in rows that are not finite, which their scales tell
        # None is below zero, so that this rounds down. torch would take four times as long.
        np.copyto(numbers[:, : steps.shape[1]].numpy(), steps.numpy(), casting="unsafe")
    if bits == 4:
        torch.bitwise_or(numbers[:, ::2], numbers[:, 1::2] << 4, out=into[:, SCALE_BYTES:])


def _scale_and_numbers(quantized: Tensor, width: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales, float32 [rows, 1], and numbers, uint8 [rows, width], from 0 on."""
    scale = quantized[:, :SCALE_BYTES].flatten().view(torch.float32)[:, None]
    numbers = quantized[:, SCALE_BYTES:]
    if bits == 4:
        numbers = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)[:, :width]
    return scale, numbers


def dequantize_rows(quantized: Tensor, width: int, bits: int) -> Tensor:
    """Return what :func:`quantize_rows` was given, to its rounding: float32 [rows, width]."""
    scale, numbers = _scale_and_numbers(quantized, width, bits)
    return numbers.float().sub_(2 ** (bits - 1) - 1).mul_(scale)


def quantize_changes(
    arch: Architecture,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    bits: int,
    generator: np.random.BitGenerator,
    bits_old: int = PLAIN_BITS,
) -> dict[str, Tensor]:
    """Quantize the changes of packed slices, by name; slices that travel as they are are left out.

    Args:
        arch: The architecture.
        old: Packed slices before training, as :func:`quantize` has them at ``bits_old``.
        new: Packed slices after it.
        bits: Of a number.
        generator: Draws what is rounded up.
        bits_old: Of a number of ``old``.
    """
    changes = {}
    for p in arch.of_kind(Kind.SLICED):  # in one order always: all draw from one generator
        if p.name in old and is_quantized(p, bits):
            before = bits_old if is_quantized(p, bits_old) else PLAIN_BITS
            changes[p.name] = quantize_rows(new[p.name], bits, generator, old[p.name], before)
    return changes


def with_quantized_changes(
    arch: Architecture,
    whole: GlobalModel,
    schedule: Schedule,
    tensors: Mapping[str, Tensor],
    bits: int,
) -> dict[str, Tensor]:
    """Return a client's slices after training, from what it sent.

    What is not quantized stays as it is.

    Args:
        arch: The architecture.
        whole: The global model that the client began with.
        schedule: What the client ran.
        tensors: What the client sent, by name.
        bits: Of a number.

    Raises:
        ReplyError: For quantized rows of another type or shape than they must have.
    """
    slices = dict(tensors)
    for name, quantized in tensors.items():
        p = arch.by_name.get(name)
        if p is None or not is_quantized(p, bits):
            continue  # whoever adds it up says what is wrong with it
        heads = schedule.heads(schedule.trained, p.block)
        shape = p.packed_shape(heads)[0], row_bytes(p, bits)
        if quantized.dtype is not torch.uint8 or tuple(quantized.shape) != shape:
            raise ReplyError(
                f"{name!r} is {quantized.dtype} {list(quantized.shape)}, not {torch.uint8} "
                f"{list(shape)}"
            )
        old = whole.take(p, heads)
        slices[name] = old + dequantize_rows(quantized, old.shape[1], bits)
    return slices


def quantize(arch: Architecture, tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return packed slices as they travel down, by name."""
    return {
        name: quantize_rows(tensor, bits) if is_quantized(arch.by_name[name], bits) else tensor
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True, eq=False)
class Arriving:
    """A whole model as clients get it, laid out for taking slices.

    Attributes:
        model: The values that arrive, in full numbers.
        as_sent_down: The values quantized: what clients count changes from.
    """

    model: GlobalModel
    as_sent_down: GlobalModel

    @classmethod
    def of(cls, arch: Architecture, weights: Mapping[str, Tensor], bits: int) -> "Arriving":
        """Lay out weights that travel down in some bits a number."""
        model = GlobalModel.of(arch, weights)
        if bits == PLAIN_BITS:
            return cls(model, model)
        arrived = dequantize(arch, quantize(arch, model.tensors, bits), bits)
        return cls(GlobalModel(arrived), GlobalModel(quantize(arch, arrived, bits)))


def dequantize(arch: Architecture, tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return packed slices, by name, from how they travelled down."""
    slices = dict(tensors)
    for name, tensor in tensors.items():
        p = arch.by_name.get(name)  # compensation is no parameter
        if p is not None and is_quantized(p, bits):
            slices[name] = dequantize_rows(tensor, p.row_width, bits)
    return slices
