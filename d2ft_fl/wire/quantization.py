"""Slices on their way in few bits a number.

A row d becomes whole numbers q of b bits, and one scale s for them:

    s = max |d| / (2^(b-1) - 1)        q = floor(d / s + u)

**Up**, d is what a client changed of a row, and u is drawn from [0, 1), so that s q is d on
average: stochastic rounding (QSGD, Alistarh et al., NeurIPS 2017, arXiv 1610.02132, whose norm is
that of the whole gradient). The server adds s q to what the row is.

**Down**, d is the row, and u = 1/2: all clients begin with the same weights, next to the server's,
which stay as exact as they are. So what comes back must be a change: down needs few bits up.

Coded are the weights of subnets' products; biases, what a block shares, LoRA's factors, what never
changes and the classifier travel as they are.
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
    """Whether numbers can travel in so many bits.

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
            f"numbers come down in {down} bits (download-bits) only where changes come back coded: "
            f"set upload-bits to {' or '.join(map(str, UPLOAD_BITS[1:]))}, not {up}"
        )


def is_quantized(p: Parameter, bits: int) -> bool:
    """Whether a parameter's slices travel coded."""
    products = p.kind is Kind.SLICED and len(p.shape) == 2 and not p.factor
    return bits < PLAIN_BITS and products and not p.fixed


def row_bytes(p: Parameter, bits: int) -> int:
    """Bytes of one row of a parameter's slices on the wire."""
    width = p.numel // p.shape[p.axis]
    return SCALE_BYTES + -(-width * bits // 8) if is_quantized(p, bits) else ELEMENT * width


def quantize_rows(rows: Tensor, bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Numbers [rows, width], coded: uint8 [rows, bytes].

    Args:
        generator: Draws what is rounded up; None to round to what is nearest.
    """
    most = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(dim=1, keepdim=True) / most  # [rows, 1]
    steps = rows / torch.where(scale > 0, scale, 1.0)
    up = 0.5 if generator is None else torch.rand(steps.shape, generator=generator)
    codes = ((steps + up).floor_().clamp_(-most, most) + most).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return torch.cat([scale.view(torch.uint8), codes], dim=1)


def dequantize_rows(quantized: Tensor, width: int, bits: int) -> Tensor:
    """What :func:`encode` was given, to its rounding: float32 [rows, width]."""
    scale = quantized[:, :SCALE_BYTES].flatten().view(torch.float32)[:, None]  # [rows, 1]
    codes = quantized[:, SCALE_BYTES:]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :width]
    return scale * (codes.float() - (2 ** (bits - 1) - 1))


def quantize_changes(
    arch: Architecture,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    bits: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Of what became of some packed slices, by name, those that travel coded: as they travel."""
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
    """What a client made of a model, from what it sent; what is not coded stays as it is.

    Raises:
        ReplyError: For codes of another type or shape than they must have.
    """
    found = dict(tensors)
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
        found[name] = old + dequantize_rows(quantized, old.shape[1], bits)
    return found


def quantize(arch: Architecture, tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Packed slices as they travel down, by name."""
    return {
        name: quantize_rows(tensor, bits) if is_quantized(arch.by_name[name], bits) else tensor
        for name, tensor in tensors.items()
    }


def dequantize(arch: Architecture, tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The same as a client takes them."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        p = arch.by_name.get(name)  # compensation is no parameter
        if p is not None and is_quantized(p, bits):
            found[name] = dequantize_rows(tensor, p.numel // p.shape[p.axis], bits)
    return found
