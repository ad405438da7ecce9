import hashlib
import math

import numpy as np
import pytest
import torch

from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, delta, is_common, merged, targeted, with_lora
from d2ft_fl.lora.init import begin, factorise, from_update, silent_factor
from tests.conftest import TARGETS, build, weights_of

torch.manual_seed(0)
MODEL, BASE = build(depth=2)
WEIGHTS = weights_of(MODEL)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def numpy_tail(matrix, rank):
    """Frobenius norm of what a rank leaves out."""
    return float(np.linalg.norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:]))


@pytest.mark.parametrize("frozen_common", [False, True])
def test_lora_starts_as_the_model_was(frozen_common):
    arch = with_lora(BASE, Lora(rank=3, alpha=6.0))
    state = begin(arch, WEIGHTS, "lora", seed=5, frozen_common=frozen_common)
    assert state.keys() == set(arch.by_name)
    for name, tensor in merged(arch, state).items():
        assert torch.equal(tensor, WEIGHTS[name])
    for weight, a, b in targeted(arch):
        target = weight.role.split(".")[0]
        for p in (a, b):
            drawn = is_common(arch, target, p.factor) if frozen_common else p.factor == "A"
            assert bool(state[p.name].any()) == drawn
            assert state[p.name].dtype == torch.float32
            assert tuple(state[p.name].shape) == p.shape


def test_draws_are_uniform_as_peft_draws_them():
    arch = with_lora(BASE, Lora(rank=24))
    for common in (False, True):
        state = begin(arch, WEIGHTS, "lora", seed=1, frozen_common=common)
        for p in arch.parameters:
            if p.factor and state[p.name].any():
                bound = 1 / math.sqrt(p.shape[1 if p.factor == "A" else 0])
                values = state[p.name]
                assert 0.9 * bound < values.abs().max() <= bound
                assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
                assert abs(values.mean()) < 0.15 * bound


def test_a_draw_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = begin(with_lora(BASE, Lora(rank=3)), WEIGHTS, "lora", seed=5)
    part = begin(with_lora(BASE, Lora(rank=3, targets=("fc2",))), WEIGHTS, "lora", seed=5)
    other = begin(with_lora(BASE, Lora(rank=3)), WEIGHTS, "lora", seed=6)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(whole[name], tensor) for name, tensor in part.items())
    drawn = [name for name in whole if name.endswith("lora_A.weight")]
    assert not any(torch.equal(whole[name], other[name]) for name in drawn)
    first = {tuple(whole[name].flatten()[:4].tolist()) for name in drawn}
    assert len(first) == len(drawn)


@pytest.mark.parametrize("common", [False, True])
def test_a_draw_is_that_of_the_first_bytes_of_a_hash(common):
    """SHA-256 of seed and name: the first eight hexadecimal digits are the generator's seed."""
    arch = with_lora(BASE, Lora(rank=3))
    state = begin(arch, WEIGHTS, "lora", seed=5, frozen_common=common)
    for role, width in (
        (("fc2.lora_B", 24),) if common else (("fc2.lora_A", 96), ("fc1.lora_A", 24))
    ):
        p = next(p for p in arch.parameters if p.role == role)
        digits = hashlib.sha256(f"5:{p.name}".encode()).hexdigest()[:8]
        share = torch.rand(p.shape, generator=torch.Generator().manual_seed(int(digits, 16)))
        torch.testing.assert_close(state[p.name], (share - 0.5) / 0.5 / math.sqrt(width))


def test_federa_splits_the_weights_and_changes_nothing():
    arch = with_lora(BASE, Lora(rank=3, alpha=6.0))
    state = begin(arch, WEIGHTS, "federa", seed=0)
    for name, tensor in merged(arch, state).items():
        torch.testing.assert_close(tensor, WEIGHTS[name], rtol=0, atol=1e-6)
    for weight, a, b in targeted(arch):
        residual = float(state[weight.name].double().norm())
        assert residual == pytest.approx(numpy_tail(WEIGHTS[weight.name], 3), rel=1e-5)
        product = delta(state[a.name], state[b.name], arch.scaling)
        assert torch.linalg.matrix_rank(product, rtol=1e-5) == 3
        # One half of the singular values each, so that both train alike.
        norms = state[a.name].norm(dim=1), state[b.name].norm(dim=0)
        torch.testing.assert_close(*norms)


def test_federa_of_full_rank_leaves_no_residual():
    arch = with_lora(BASE, Lora(rank=24, alpha=3.0))
    state = begin(arch, WEIGHTS, "federa", seed=0)
    for name, tensor in merged(arch, state).items():
        torch.testing.assert_close(tensor, WEIGHTS[name], rtol=0, atol=1e-6)
    for weight, _, _ in targeted(arch):
        assert state[weight.name].abs().max() < 1e-6


def test_federa_is_what_peft_calls_pissa():
    from peft import LoraConfig, get_peft_model

    lora = Lora(rank=4, alpha=12.0)
    arch = with_lora(BASE, lora)
    weights = dict(WEIGHTS)
    for weight, _, _ in targeted(arch):  # singular values apart, so that vectors are well defined
        u, s, vt = torch.linalg.svd(WEIGHTS[weight.name], full_matrices=False)
        weights[weight.name] = u * 0.8 ** torch.arange(len(s)) @ vt
    state = begin(arch, weights, "federa", seed=0)
    found = {w.role: (w, a, b) for w, a, b in targeted(arch) if w.block == 1}
    plain = torch.nn.ModuleDict()
    for target in TARGETS:
        weight = weights[found[f"{target}.weight"][0].name]
        plain[target] = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain[target].weight.data.copy_(weight)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=[*TARGETS], init_lora_weights="pissa"
    )
    theirs = get_peft_model(plain, config).base_model.model
    for target in TARGETS:
        weight, a, b = found[f"{target}.weight"]
        layer = theirs[target]
        their_a, their_b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        assert layer.scaling["default"] == arch.scaling
        assert relative(state[weight.name], layer.base_layer.weight.data) < 1e-5
        product = delta(their_a, their_b, arch.scaling)
        assert relative(delta(state[a.name], state[b.name], arch.scaling), product) < 1e-5
        signs = (state[a.name] * their_a).sum(dim=1).sign()
        assert relative(state[a.name] * signs[:, None], their_a) < 1e-5
        assert relative(state[b.name] * signs, their_b) < 1e-5


def test_factorise_is_the_nearest_product_and_its_signs_are_fixed():
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    a, b, discarded = factorise(matrix, 3, 2.0)
    assert discarded == pytest.approx(numpy_tail(matrix, 3), rel=1e-6)
    error = (matrix.double() - delta(a, b, 2.0)).norm()
    assert float(error) == pytest.approx(discarded, rel=1e-5)
    assert (b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0).all()
    negative = factorise(-matrix, 3, 2.0)
    torch.testing.assert_close(negative.b, b)
    torch.testing.assert_close(negative.a, -a)


@pytest.mark.parametrize("silent", ["A", "B"])
def test_directions_that_hold_nothing_can_still_train(silent):
    """Zero in both factors would be without gradient for ever."""
    thin = torch.outer(torch.arange(6.0), torch.ones(4))
    for matrix, used in ((thin, 1), (torch.zeros(6, 4), 0)):
        a, b, discarded = factorise(matrix, 3, 0.5, silent=silent)
        torch.testing.assert_close(delta(a, b, 0.5).float(), matrix)
        assert discarded < 1e-6
        zero, live = (a[used:], b[:, used:]) if silent == "A" else (b[:, used:], a[used:])
        assert not zero.any()
        lengths = live.norm(dim=0 if silent == "A" else 1)
        torch.testing.assert_close(lengths, torch.full((3 - used,), 1 / math.sqrt(3)))


@pytest.mark.parametrize("largest", [2.0**10, 2.0**-10])
def test_what_is_no_larger_than_the_rounding_of_the_largest_is_nothing(largest):
    """Singular values of 1, 1/4, and the float32 step from 1 or a little more, times a factor."""
    step = 2.0**-23
    for last, held in ((1.01 * step, True), (step, False)):
        matrix = largest * torch.diag(torch.tensor([1, 0.25, last], dtype=torch.float64))
        a, b, discarded = factorise(matrix, 3, 2.0)
        assert bool(b[:, 2].any()) == held
        assert a[2].any()
        assert discarded == pytest.approx(0.0 if held else largest * step, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    "a,b,silent", [(True, True, "B"), (True, False, "A"), (False, True, "B"), (False, False, "B")]
)
def test_b_is_silent_unless_a_alone_trains(a, b, silent):
    frozen = [("qkv", factor) for factor, trains in (("A", a), ("B", b)) if not trains]
    arch = with_lora(BASE, Lora(rank=3), frozen)
    assert silent_factor(*targeted(arch)[0][1:]) == silent


def test_factors_of_an_update():
    arch = with_lora(BASE, Lora(rank=3, alpha=6.0))
    generator = torch.Generator().manual_seed(2)
    change = {w.name: torch.randn(w.shape, generator=generator) for w, _, _ in targeted(arch)}
    state, discarded = from_update(arch, WEIGHTS, change)
    assert all(torch.equal(state[name], tensor) for name, tensor in WEIGHTS.items())
    lost = math.hypot(*(numpy_tail(c, 3) for c in change.values()))
    assert discarded == pytest.approx(
        lost / math.hypot(*(float(c.norm()) for c in change.values())), rel=1e-6
    )
    off = {
        w.name: delta(state[a.name], state[b.name], arch.scaling) - change[w.name]
        for w, a, b in targeted(arch)
    }
    assert math.hypot(*(float(o.norm()) for o in off.values())) == pytest.approx(lost, rel=1e-6)


def test_an_update_within_the_rank_loses_nothing():
    arch = with_lora(BASE, Lora(rank=3, alpha=6.0))
    known = begin(arch, WEIGHTS, "federa", seed=0)
    change = {w.name: delta(known[a.name], known[b.name], 2.0) for w, a, b in targeted(arch)}
    state, discarded = from_update(arch, WEIGHTS, change)
    assert discarded < 1e-6
    for w, a, b in targeted(arch):
        assert relative(delta(state[a.name], state[b.name], 2.0), change[w.name]) < 1e-6
    still, nothing = from_update(arch, WEIGHTS, {n: torch.zeros_like(c) for n, c in change.items()})
    assert nothing == 0.0
    for name, tensor in merged(arch, still).items():
        assert torch.equal(tensor, WEIGHTS[name])


def test_factors_that_rest_are_not_the_ones_that_are_zero():
    """proj's B is common to the block: where it does not train, A is zero in empty directions."""
    arch = with_lora(BASE, Lora(rank=3), frozen=[("proj", "B"), ("qkv", "A")])
    nothing = {w.name: torch.zeros(w.shape) for w, _, _ in targeted(arch)}
    for state in (
        from_update(arch, WEIGHTS, nothing)[0],
        begin(arch, WEIGHTS | nothing, "federa", seed=0),
    ):
        for _, a, b in targeted(arch):
            for p in (a, b):
                assert p.trains or state[p.name].any()


def test_an_unknown_beginning_is_refused():
    with pytest.raises(ConfigError, match="'svd' is unknown"):
        begin(with_lora(BASE, Lora()), WEIGHTS, "svd", seed=0)
