"""What a client changed, on its way up in few bits a number.

A row d of the change of a slice becomes whole numbers q of b bits, and one scale s for them:

    s = max |d| / (2^(b-1) - 1)        q = floor(d / s + u),  u drawn from [0, 1)

so that s q is d on average: stochastic rounding, by row (QSGD, Alistarh et al., NeurIPS 2017, arXiv
1610.02132, whose norm is that of the whole gradient). The server, which has what the row was
before, adds s q to it. Coded are the weights of subnets' products; biases, what a block shares,
LoRA's factors and the classifier travel as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2ft_fl.errors import ReplyError
from d2ft_fl.memory import ELEMENT
from d2ft_fl.packed import GlobalModel
from d2ft_fl.subnets import Architecture, Kind, Parameter, Schedule

BITS = (32, 8, 4)  # 32: nothing is coded
SCALE_BYTES = 4


def is_coded(p: Parameter, bits: int) -> bool:
    """Whether a parameter's slices travel up coded."""
    return bits < BITS[0] and p.kind is Kind.SLICED and len(p.shape) == 2 and not p.factor


def row_bytes(p: Parameter, bits: int) -> int:
    """Bytes of one row of a parameter's slices on the wire."""
    width = p.numel // p.shape[p.axis]
    return SCALE_BYTES + -(-width * bits // 8) if is_coded(p, bits) else ELEMENT * width


def encode(new: Tensor, old: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """The change from ``old`` to ``new`` [rows, width], coded: uint8 [rows, bytes]."""
    change = new - old
    most = 2 ** (bits - 1) - 1
    scale = change.abs().amax(dim=1, keepdim=True) / most  # [rows, 1]
    steps = change / torch.where(scale > 0, scale, 1.0)
    drawn = torch.rand(steps.shape, generator=generator, dtype=steps.dtype)
    codes = ((steps + drawn).floor_().clamp_(-most, most) + most).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return torch.cat([scale.view(torch.uint8), codes], dim=1)


def decode(coded: Tensor, old: Tensor, bits: int) -> Tensor:
    """What :func:`encode` made of ``old`` [rows, width], to its rounding: float32."""
    scale = coded[:, :SCALE_BYTES].flatten().view(torch.float32)[:, None]  # [rows, 1]
    codes = coded[:, SCALE_BYTES:]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, : old.shape[1]]
    return old + scale * (codes.float() - (2 ** (bits - 1) - 1))


def encoded(
    arch: Architecture,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    bits: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Of what became of some packed slices, by name, those that travel coded: as they travel."""
    return {
        name: encode(new[name], tensor, bits, generator)
        for name, tensor in old.items()
        if is_coded(arch.by_name[name], bits)
    }


def decoded(
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
    for name, coded in tensors.items():
        p = arch.by_name.get(name)
        if p is None or not is_coded(p, bits):
            continue  # whoever adds it up says what is wrong with it
        heads = schedule.heads(schedule.trained, p.block)
        shape = p.packed_shape(heads)[0], row_bytes(p, bits)
        if coded.dtype is not torch.uint8 or tuple(coded.shape) != shape:
            raise ReplyError(
                f"{name!r} is {coded.dtype} {list(coded.shape)}, not {torch.uint8} {list(shape)}"
            )
        found[name] = decode(coded, whole.take(p, heads), bits)
    return found
