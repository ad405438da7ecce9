"""How LoRA's factors begin.

Of a product ``W + scaling * B A`` (see :mod:`d2ft_fl.lora.config`):

- ``lora`` (Hu et al., arXiv 2106.09685; as peft): A is uniform within ``1 / sqrt(in)``, which is
  Kaiming's with a = sqrt(5), and B is zero, so that the model starts as it was. Where the factor
  common to the block does not train (A of qkv and fc1, B of proj and fc2), that one is drawn and
  the other is zero: a product of which the fixed factor is zero would never change.
- ``federa`` (FeDeRA, Yan et al., arXiv 2404.18848; for one machine PiSSA, arXiv 2404.02948, whose
  arithmetic in peft this is): with the singular values and vectors ``W = U S V^T``,

      B = U_r sqrt(S_r / scaling)    A = sqrt(S_r / scaling) V_r^T    W <- W - scaling * B A

  The factors hold the principal part of the weights, and what trains is what mattered most.
- :func:`from_update` (SLoRA, Babakniya et al., arXiv 2308.06522): the weights' change in a first
  stage of ordinary, sparse, training is factorised likewise, and W stays.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from d2ft_fl.config.choices import LORA_INITS
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import delta, targeted
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter


class Factors(NamedTuple):
    """The best product of a rank for a matrix: ``scaling * b @ a`` is nearest to it.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        discarded: Frobenius norm of what the rank leaves out: ``sqrt(sum_{i > rank} S_i^2)``.
    """

    a: Tensor
    b: Tensor
    discarded: float


@torch.no_grad()
def begin(
    arch: Architecture,
    weights: Mapping[str, Tensor],
    init: str,
    seed: int,
    frozen_common: bool = False,
) -> dict[str, Tensor]:
    """Return the state that a run starts from: the model's own weights, and factors.

    Args:
        arch: With factors.
        weights: The model's own, by name.
        init: One of :data:`.LORA_INITS`.
        seed: Decides draws, each together with the name of its tensor.
        frozen_common: Whether the factor common to a block does not train; only ``lora`` asks.
    """
    if init not in LORA_INITS:
        raise ConfigError(f"lora-init = {init!r} is unknown; use one of {', '.join(LORA_INITS)}")
    state = dict(weights)
    for weight, a, b in targeted(arch):
        matrix = weights[weight.name]
        if init == "federa":
            pair = factorise(matrix, arch.rank, arch.scaling, matrix.dtype, silent_factor(a, b))
            state[a.name], state[b.name] = pair.a, pair.b
            residual = matrix.double() - delta(pair.a, pair.b, arch.scaling)
            state[weight.name] = residual.to(matrix.dtype)
            continue
        for p in (a, b):
            drawn = p.kind is Kind.SHARED if frozen_common else p.factor == "A"
            state[p.name] = (_uniform(p, seed) if drawn else torch.zeros(p.shape)).to(matrix.dtype)
    return state


@torch.no_grad()
def from_update(
    arch: Architecture, weights: Mapping[str, Tensor], change: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Return the state in which factors stand for a change of weights, and the share left out.

    Args:
        arch: With factors.
        weights: The model's own, before the change.
        change: Name of every targeted weight -> its change [out, in].

    Returns:
        The state; and the Frobenius norm of what the rank discards, over that of the change.
    """
    state, lost, whole = dict(weights), 0.0, 0.0
    for weight, a, b in targeted(arch):
        moved, dtype = change[weight.name], weights[weight.name].dtype
        pair = factorise(moved, arch.rank, arch.scaling, dtype, silent_factor(a, b))
        state[a.name], state[b.name] = pair.a, pair.b
        lost += pair.discarded**2
        whole += float(moved.double().square().sum())
    return state, math.sqrt(lost / whole) if whole else 0.0


def factorise(
    matrix: Tensor,
    rank: int,
    scaling: float,
    dtype: torch.dtype = torch.float32,
    silent: str = "B",
) -> Factors:
    """Factorise ``matrix`` as ``scaling * b @ a``, by its singular values, in double precision.

    A direction of which the matrix holds nothing would be zero in both factors, and get no gradient
    ever; it begins as in LoRA instead: zero in one factor, and in the other as long as a row of A
    that is drawn.

    Args:
        matrix: [out, in].
        rank: Of the factors.
        scaling: What their product is multiplied by.
        dtype: Of the factors.
        silent: The factor that is zero where the matrix holds nothing; it should train.
    """
    u, s, vt = singular(matrix)
    u, size, vt = u[:, :rank], s[:rank], vt[:rank]
    # What is no larger than the rounding of the largest is noise.
    holds = size > torch.finfo(dtype).eps * s[0]
    root = torch.where(holds, (size / scaling).sqrt(), 0.0)
    idle = torch.where(holds, root, 1 / math.sqrt(3))  # of uniform draws within 1 / sqrt(in)
    in_b, in_a = (root, idle) if silent == "B" else (idle, root)
    left_out = float(torch.cat([size[~holds], s[rank:]]).norm())
    a, b = (in_a[:, None] * vt).to(dtype), (u * in_b).to(dtype)
    return Factors(a.contiguous(), b.contiguous(), left_out)


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, S, V^T) with ``matrix = U diag(S) V^T``, in double precision.

    Of each pair of singular vectors, which are known up to a sign, the entry of the left one that
    is largest in magnitude is positive.
    """
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()  # [1, values]
    u *= signs
    vt *= signs.t()
    return u, s, vt


def silent_factor(a: Parameter, b: Parameter) -> str:
    """Return the factor to be zero where :func:`factorise` finds nothing: B, if it trains."""
    return "A" if a.trains and not b.trains else "B"


def _uniform(p: Parameter, seed: int) -> Tensor:
    """Draw uniformly within 1 / sqrt(width), decided by the seed and the parameter's name alone.

    The width is ``in`` of A, and ``out`` of B: of either, the factor common to a block is as large.
    """
    digest = hashlib.sha256(f"{seed}:{p.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    bound = 1 / math.sqrt(p.shape[1 if p.factor == "A" else 0])
    return (2 * torch.rand(p.shape, generator=generator, dtype=torch.float32) - 1) * bound
