"""Products of matrices, by the faster of the two libraries that torch has for them on a CPU.

torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone. oneDNN
uses it wherever it is, which there is twice as fast. torch leaves no choice; but it has an operator
for what its own compiler makes of linear layers, and that is oneDNN's.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Below so many multiplications, what comes before a product takes longer than it.
LEAST = 1 << 20


def times(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left @ right + bias``: [m, k] times [k, n], plus [n]; outside any graph."""
    if is_faster(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


def is_faster(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these faster; it makes new tensors only."""
    return (
        left.dtype is torch.float32
        and left.numel() * right.shape[1] >= LEAST
        and left.device.type == "cpu"
        and is_faster_here()
    )


@cache
def is_faster_here() -> bool:
    """Whether oneDNN is the faster one on this machine: AVX-512, but not Intel's."""
    mkldnn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, OPERATOR)
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return mkldnn and torch.backends.mkl.is_available() and avx512 and not _is_intels()


def _is_intels() -> bool:
    """Whether the processor is Intel's; so it is where nothing tells."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


OPERATOR = "_linear_pointwise"
if hasattr(torch.ops.mkldnn, OPERATOR):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(left: torch.Size, weight: torch.Size, *args: object, **kwargs: object) -> int:
        """Return FLOPs of [m, k] times the transpose of [n, k]."""
        return 2 * left[0] * left[1] * weight[0]
