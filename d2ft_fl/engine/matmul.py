"""Products of matrices, by the faster of the two libraries that torch has for them on a CPU.

torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone. oneDNN
uses it wherever it is, which there is up to twice as fast. torch leaves no choice; but it has an
operator for what its own compiler makes of linear layers, and that is oneDNN's.

Every large product of the engine is :func:`times`, or :func:`write_product` where its columns are
some of a wider tensor; :func:`add_product` is for narrow ones.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from d2ft_fl.config.choices import PRODUCTS
from d2ft_fl.errors import ConfigError

# Below so many multiplications, what comes before a product takes longer than what it saves.
LEAST = 1 << 23


def times(
    left: Tensor, right: Tensor, bias: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """Return ``left @ right + bias + into``: [m, k] times [k, n], plus [n], plus [m, n].

    Outside any graph.

    Args:
        left: [m, k].
        right: [k, n].
        bias: [n], or None.
        into: [m, n], or None. It may be overwritten; the result may be it.
    """
    if is_faster(left, right):
        if into is None:
            return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(left, into, right.t(), bias, "add")
    if into is None:
        return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)
    return add_product(into if bias is None else into.add_(bias), left, right)


def transposed_times(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left.t() @ right``: [k, m] and [k, n] to [m, n], which may lie transposed.

    oneDNN is up to 1.4 times faster with the narrower of the two on its left.
    """
    swapped = left.shape[1] > right.shape[1] or not _is_dense(right)
    if swapped and is_faster(right.t(), left):
        return times(right.t(), left).t()
    return times(left.t(), right)


def is_transposed_faster(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN does :func:`transposed_times`."""
    return is_faster(left.t(), right) or is_faster(right.t(), left)


def write_product(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """Do ``out = left @ right + bias``, for columns of a wider tensor."""
    if is_faster(left, right):
        out.copy_(times(left, right, bias))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Do ``total += left @ right``. Not by ``addmm_``, which torch's FLOP counter does not know."""
    return torch.addmm(total, left, right, out=total)


def is_faster(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these faster; it makes new tensors only.

    It is hundreds of times slower where the right one is a cut of a wider tensor, which may lie in
    any way on the left.
    """
    return (
        _onednn
        and left.dtype is torch.float32
        and left.numel() * right.shape[1] >= LEAST
        and left.device.type == "cpu"
        and _is_dense(right)
    )


def _is_dense(matrix: Tensor) -> bool:
    """Whether nothing lies between its rows, or between its columns."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def use(library: str) -> None:
    """Multiply by one library from now on: ``mkl``, ``onednn``, or ``auto`` for the faster one.

    Raises:
        ConfigError: When there is no such library here.
    """
    global _onednn
    if library not in PRODUCTS:
        raise ConfigError(f"--products {library!r} must be one of {', '.join(PRODUCTS)}")
    if library == "onednn" and not _is_there():
        raise ConfigError("--products 'onednn': this torch has none; use mkl or auto")
    _onednn = is_faster_here() if library == "auto" else library == "onednn"


@cache
def is_faster_here() -> bool:
    """Whether oneDNN is the faster one on this machine: AVX-512, but not Intel's."""
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return _is_there() and torch.backends.mkl.is_available() and avx512 and not _is_intels()


def _is_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, OPERATOR)


def _is_intels() -> bool:
    """Whether the processor is Intel's; so it is where nothing tells."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


OPERATOR = "_linear_pointwise"
if hasattr(torch.ops.mkldnn, OPERATOR):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(left: torch.Size, *others: object, **kwargs: object) -> int:
        """Return FLOPs of [m, k] times the transpose of [n, k]; what is added stands before it."""
        weight = others[1] if len(others) == 4 else others[0]
        assert isinstance(weight, torch.Size)
        return 2 * left[0] * left[1] * int(weight[0])


_onednn = is_faster_here()
