"""Quantization: slices travel in few bits a number.

A row d becomes whole numbers q of b bits, and one scale s for them:

    s = max |d| / (2^(b-1) - 1)        q = floor(d / s + u)

**Up**, d is what a client changed of a row, and u is drawn from [0, 1), so that s q is d on
average: stochastic rounding (QSGD, Alistarh et al., NeurIPS 2017, arXiv 1610.02132, whose norm is
that of the whole gradient). The server adds s q to what the row is.

**Down**, d is the row, and u = 1/2: all clients begin with the same weights, next to the server's,
which stay as exact as they are. So what comes back must be a change: down needs few bits up.

Quantized are the weights of subnets' products; biases, what a block shares, LoRA's factors, what
never changes and the classifier travel as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2ft_fl.config.choices import DOWNLOAD_BITS, PLAIN_BITS, UPLOAD_BITS
from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire.sizes import ELEMENT

SCALE_BYTES = 4


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


def quantize_rows(rows: Tensor, bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Quantize numbers [rows, width]: uint8 [rows, bytes].

    Args:
        rows: Numbers: float32 [rows, width].
        bits: Of a number: 4 or 8.
        generator: Draws what is rounded up; None to round to what is nearest.
    """
    largest = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(dim=1, keepdim=True) / largest  # [rows, 1]
    steps = rows / torch.where(scale > 0, scale, 1.0)
    up = 0.5 if generator is None else torch.rand(steps.shape, generator=generator)
    numbers = ((steps + up).floor_().clamp_(-largest, largest) + largest).to(torch.uint8)
    if bits == 4:
        numbers = torch.nn.functional.pad(numbers, (0, numbers.shape[1] % 2))
        numbers = numbers[:, ::2] | numbers[:, 1::2] << 4
    return torch.cat([scale.view(torch.uint8), numbers], dim=1)


def dequantize_rows(quantized: Tensor, width: int, bits: int) -> Tensor:
    """Return what :func:`quantize_rows` was given, to its rounding: float32 [rows, width]."""
    scale = quantized[:, :SCALE_BYTES].flatten().view(torch.float32)[:, None]  # [rows, 1]
    numbers = quantized[:, SCALE_BYTES:]
    if bits == 4:
        numbers = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)[:, :width]
    return scale * (numbers.float() - (2 ** (bits - 1) - 1))


def quantize_changes(
    arch: Architecture,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    bits: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Quantize the changes of packed slices, by name; slices that travel as they are are left out.

    Args:
        arch: The architecture.
        old: Packed slices before training.
        new: Packed slices after it.
        bits: Of a number.
        generator: Draws what is rounded up.
    """
    return {
        name: quantize_rows(new[name] - tensor, bits, generator)
        for name, tensor in old.items()
        if is_quantized(arch.by_name[name], bits)
    }


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


def dequantize(arch: Architecture, tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return packed slices, by name, from how they travelled down."""
    slices = dict(tensors)
    for name, tensor in tensors.items():
        p = arch.by_name.get(name)  # compensation is no parameter
        if p is not None and is_quantized(p, bits):
            slices[name] = dequantize_rows(tensor, p.row_width, bits)
    return slices
