"""Products by oneDNN: the same numbers, the same FLOPs, and no more memory than is predicted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from d2ft_fl.engine import matmul
from d2ft_fl.engine.matmul import add_product, times, transposed_times, write_product
from d2ft_fl.engine.meter import Flops
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build, random_schedule, weights_of
from tests.costs.test_cost_model import KINDS, measure
from tests.engine.test_partial_model import VARIANTS, check_equal_to_timm, shake

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, matmul.OPERATOR), reason="this torch has no such operator"
)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """oneDNN for everything, as on a machine where it is faster and products are large."""
    monkeypatch.setattr(matmul, "LEAST", 1)
    monkeypatch.setattr(matmul, "_onednn", True)


def schedule_of_two(arch, slots, seed):
    """Subnets that are FULL or not there: what most of its branches do is one piece."""
    draw = np.random.default_rng(seed)
    chosen = draw.random((slots, arch.blocks, arch.heads)) < 0.6
    return Schedule(np.where(chosen, Operation.FULL, Operation.SHORTCUT).astype(np.int8))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m,k,n", [(1, 1, 1), (3, 5, 7), (64, 48, 96), (130, 33, 17)])
def test_a_product_is_a_product_however_it_lies(m, k, n, bias):
    left, right, more = torch.randn(m, k), torch.randn(k, n), torch.randn(n) if bias else None
    exact = left.double() @ right.double() + (more.double() if bias else 0.0)
    for a in (left, left.t().contiguous().t(), torch.randn(m, k + 2)[:, 1:-1].copy_(left)):
        for b in (right, right.t().contiguous().t()):
            found = times(a, b, more)
            assert found.shape == (m, n)
            assert float((found - exact).norm() / exact.norm()) < 1e-6
            assert torch.equal(found, times(a, b, more))


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_products_go_where_they_are_to(library, monkeypatch):
    matmul.use(library)
    try:
        left, right, bias = torch.randn(6, 5), torch.randn(5, 4), torch.randn(4)
        exact = left.double() @ right.double()
        close = {"rtol": 0, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(times(left, right, into=torch.ones(6, 4)), exact + 1, **close)
        into = times(left, right, bias, torch.ones(6, 4))
        torch.testing.assert_close(into, exact + bias + 1, **close)
        wide = torch.zeros(6, 9)
        write_product(wide[:, 2:6], left, right, bias)
        torch.testing.assert_close(wide[:, 2:6], exact + bias, **close)
        assert not wide[:, :2].any()
        assert not wide[:, 6:].any()
        torch.testing.assert_close(add_product(torch.ones(6, 4), left, right), exact + 1, **close)
        for a, b in ((left, torch.randn(6, 3)), (left, torch.randn(6, 7))):  # wide and narrow
            torch.testing.assert_close(transposed_times(a, b), a.double().t() @ b.double(), **close)
    finally:
        matmul.use("auto")


def lying(rows, columns):
    """A matrix as it may lie in memory: whole, transposed, rows or columns of a wider one."""
    whole = torch.randn(rows, columns)
    yield whole
    yield whole.t().contiguous().t()
    yield torch.randn(rows + 3, columns)[2:-1].copy_(whole)
    yield torch.randn(rows, columns + 9)[:, 4:-5].copy_(whole)
    yield torch.randn(columns, rows + 9)[:, 4:-5].t().copy_(whole)


def test_no_product_is_left_to_the_slow_reference(capfd):
    """oneDNN says which of its implementations ran: ``ref`` is hundreds of times slower."""
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for a in lying(20, 48):
            for b in lying(48, 33):
                times(a, b)
                times(a, b, torch.randn(33), torch.randn(20, 33))
            for b in lying(20, 33):
                transposed_times(a, b)
                transposed_times(b, a)
    said = capfd.readouterr().out
    assert "inner_product" in said
    assert ",ref" not in said


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_no_step_is_left_to_the_slow_reference(kind, capfd):
    """Of schedules in which heads that train are cut out of what others run beside them."""
    model, arch = build(embed_dim=48, depth=3, num_heads=4, **KINDS.get(kind, {}))
    weights = weights_of(model)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for row in ([3, 3, 3, 2], [3, 2, 1, 0], [2, 3, 3, 1]):
            schedule = Schedule(np.broadcast_to(np.array(row, dtype=np.int8), (1, 3, 4)).copy())
            measure(arch, weights, model, schedule, 14, batch_size=6)
    said = capfd.readouterr().out
    assert "inner_product" in said
    assert ",ref" not in said


def test_an_unknown_library_is_refused():
    with pytest.raises(ConfigError, match=r"'blas' must be one of auto, mkl, onednn"):
        matmul.use("blas")


def test_flops_are_those_of_any_product():
    left, right, into = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    with Flops() as own, FlopCounterMode(display=False) as torchs:
        times(left, right)
    assert own.flops == torchs.get_total_flops() == 2 * 5 * 7 * 3
    with Flops() as own, FlopCounterMode(display=False) as torchs:
        times(left, right, torch.randn(3), into)
    assert own.flops == torchs.get_total_flops() == 2 * 5 * 7 * 3


def test_other_types_and_small_products_are_left_alone(monkeypatch):
    for dtype in (torch.float64, torch.bfloat16):
        left, right = torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype)
        assert times(left, right).dtype is dtype
        assert not matmul.is_faster(left, right)
    monkeypatch.setattr(matmul, "LEAST", 4 * 4 * 4)
    assert matmul.is_faster(torch.ones(4, 4), torch.ones(4, 4))
    assert not matmul.is_faster(torch.ones(4, 4), torch.ones(4, 3))


@pytest.mark.parametrize("name", VARIANTS)
def test_all_full_equals_the_unmodified_model(name):
    model, arch = build(**VARIANTS[name])
    shake(model)
    check_equal_to_timm(model, arch, torch.float32, 1e-5, 16, 1)


@pytest.mark.parametrize("kind", ["none", *KINDS])
@settings(max_examples=5, deadline=None)  # of each kind
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 3),
    batch=st.integers(1, 12),
    both=st.booleans(),
)
def test_memory_is_never_above_the_prediction(kind, seed, slots, batch, both):
    model, arch = build(embed_dim=48, depth=3, num_heads=4, **KINDS.get(kind, {}))
    schedule = (schedule_of_two if both else random_schedule)(arch, slots, seed)
    predicted, meter = measure(arch, weights_of(model), model, schedule, 14, batch_size=batch)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory
