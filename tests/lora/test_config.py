"""Which factors there are and how they divide, written out; and the weights that they make."""

from dataclasses import replace

import pytest
import torch

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import (
    Lora,
    delta,
    merged,
    merged_packed,
    most_rank,
    targeted,
    targets_alone,
    with_lora,
    without_lora,
)
from d2ft_fl.subnets.architecture import Kind, Parameter
from tests.conftest import TARGETS, build, weights_of

torch.manual_seed(0)
# qkv is [72, 24], proj [24, 24], fc1 [66, 24] and fc2 [24, 66]; the last two divide unevenly.
MODEL, BASE = build(depth=2, mlp_ratio=66 / 24)
OWN = Lora(rank=3, alpha=6.0, dropout=0.25)


def test_by_default_factors_are_as_in_peft():
    """Of which the tests of adapters know the same."""
    assert Lora() == Lora(rank=8, alpha=8.0, targets=(), rslora=False, dropout=0.0)


def test_options_say_what_is_tuned():
    config = RunConfig(
        lora_rank=3, lora_alpha=5.0, lora_targets=" qkv ,, fc2", lora_rslora=True, lora_dropout=0.25
    )
    assert Lora.of(config) == Lora(3, 5.0, ("qkv", "fc2"), True, 0.25)
    with pytest.raises(ConfigError, match="lora-targets is empty"):
        Lora.of(replace(config, lora_targets=" , "))


def test_scaling_is_alpha_over_the_rank_or_over_its_root():
    assert Lora(rank=16, alpha=6.0).scaling == 0.375
    assert Lora(rank=16, alpha=6.0, rslora=True).scaling == 1.5


def test_factors_stand_behind_their_weight_and_divide_as_it_does():
    """Of products in, B divides over heads on its rows; of products out, A on its columns."""
    arch = with_lora(BASE, OWN, frozen=[("proj", "B")])
    order = [p.role for p in arch.parameters if p.role.startswith("qkv.") and p.block == 0]
    assert order[:3] == ["qkv.weight", "qkv.lora_A", "qkv.lora_B"]
    factors = {p.role: p for p in arch.parameters if p.factor and p.block == 1}
    expected = {  # shape, sliced axis
        "qkv.lora_A": ((3, 24), None),
        "qkv.lora_B": ((72, 3), 0),
        "proj.lora_A": ((3, 24), 1),
        "proj.lora_B": ((24, 3), None),
        "fc1.lora_A": ((3, 24), None),
        "fc1.lora_B": ((66, 3), 0),
        "fc2.lora_A": ((3, 66), 1),
        "fc2.lora_B": ((24, 3), None),
    }
    assert factors.keys() == expected.keys()
    for role, (shape, axis) in expected.items():
        target, factor = role.split(".lora_")
        module = f"blocks.1.{'attn' if target in ('qkv', 'proj') else 'mlp'}.{target}"
        common = axis is None
        assert factors[role] == Parameter(
            name=f"{module}.lora_{factor}.weight",
            shape=shape,
            kind=Kind.SHARED if common else Kind.SLICED,
            role=role,
            block=1,
            axis=axis or 0,
            rows=() if common else BASE.by_name[f"{module}.weight"].rows,
            trains=role != "proj.lora_B",
            fixed=role == "proj.lora_B",
            factor=factor,
        )
    assert (arch.rank, arch.scaling, arch.lora_dropout) == (3, 2.0, 0.25)


@pytest.mark.parametrize("fixed", [[], [("qkv", "A"), ("fc2", "B")]])
def test_a_factor_may_rest_in_a_round_and_change_in_another(fixed):
    arch = with_lora(BASE, OWN, frozen=[("qkv", "A"), ("fc1", "A")], fixed=fixed)
    factors = [p for p in arch.parameters if p.factor]
    assert {p.role for p in factors if not p.trains} == {"qkv.lora_A", "fc1.lora_A"}
    assert {p.role for p in factors if p.fixed} == {f"{t}.lora_{factor}" for t, factor in fixed}


@pytest.mark.parametrize(
    "make,targets,trained",
    [
        (with_lora, ("fc2",), {"fc2.lora_A", "fc2.lora_B"}),
        (targets_alone, ("proj", "qkv"), {"proj.weight", "qkv.weight"}),
        (targets_alone, (), {f"{target}.weight" for target in TARGETS}),
    ],
    ids=["factors", "some weights", "all weights"],
)
def test_beside_what_is_targeted_the_classifier_alone_trains(make, targets, trained):
    arch = make(BASE, replace(OWN, targets=targets))
    assert {p.role for p in arch.parameters if p.factor} <= trained
    for p in arch.parameters:
        trains = p.role in trained or p.name in ("head.weight", "head.bias")
        assert (p.trains, p.fixed) == (trains, not trains), p.name


def test_without_lora_an_architecture_is_what_it_was():
    """So that nothing that LoRA froze counts as fixed."""
    assert without_lora(with_lora(BASE, OWN, [("qkv", "A")])) == BASE
    assert without_lora(targets_alone(BASE, OWN)) == BASE


def test_the_rank_lies_between_one_and_that_of_the_smallest_product():
    small = build(depth=2, mlp_ratio=0.5)[1]  # fc1 is [12, 24], fc2 [24, 12]
    assert most_rank(small, TARGETS) == most_rank(small, ("qkv", "fc2")) == 12
    assert most_rank(small, ("proj", "qkv")) == 24
    for rank, targets in ((1, ()), (12, ()), (24, ("qkv", "proj"))):
        found = Lora(rank, targets=targets).check(small)
        assert found == (targets or TARGETS)
    for rank, targets, most in ((0, (), 12), (13, (), 12), (25, ("qkv", "proj"), 24)):
        with pytest.raises(ConfigError, match=f"= {rank} must lie between 1 and {most}, the"):
            with_lora(small, Lora(rank, targets=targets))


@pytest.mark.parametrize(
    "targets,message", [(("qkv", "fc3"), "'fc3' is unknown"), (("qkv", "qkv"), "names one twice")]
)
def test_targets_that_cannot_be_are_refused(targets, message):
    with pytest.raises(ConfigError, match=message):
        with_lora(BASE, Lora(targets=targets))


def whole_numbers(arch):
    """A state of small whole numbers, so that float32 rounds no sum of products."""
    generator = torch.Generator().manual_seed(4)
    shapes = {p.name: p.shape for p in arch.parameters}
    return {
        name: torch.randint(-4, 5, shape, generator=generator).float()
        for name, shape in shapes.items()
    }


def test_what_factors_add_is_in_double_precision():
    """2 (1, 2; 0, 1; 3, 0) (1, 0, 4, 1; 5, 1, 0, 2), and 2^24 + 1, which is no float32."""
    a, b = torch.tensor([[1.0, 0, 4, 1], [5, 1, 0, 2]]), torch.tensor([[1.0, 2], [0, 1], [3, 0]])
    found = delta(a, b, 2.0)
    assert found.dtype == torch.float64
    assert found.tolist() == [[22, 4, 8, 10], [10, 2, 0, 4], [6, 0, 24, 6]]
    large = delta(torch.tensor([[2.0**24], [1.0]]), torch.ones(1, 2), 1.0)
    assert large.item() == 2**24 + 1


def test_merged_weights_are_those_and_what_factors_add():
    arch = with_lora(BASE, replace(OWN, targets=("fc2", "qkv")))
    state = whole_numbers(arch)
    found = merged(arch, state)
    assert found.keys() == BASE.by_name.keys()
    products = {w.name: (a, b) for w, a, b in targeted(arch)}
    assert {name.split(".")[3] for name in products} == {"qkv", "fc2"}
    assert len(products) == 4  # of two blocks
    for name, tensor in found.items():
        expected = state[name]
        if name in products:
            a, b = (state[p.name] for p in products[name])
            expected = expected + 2 * b @ a
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 3]])
def test_packed_weights_are_merged_as_whole_ones(heads):
    """Of a block that is there; the other may be missing."""
    arch = with_lora(BASE, OWN)
    state = whole_numbers(arch)
    own = [p for p in arch.parameters if p.block == 1]
    packed = {
        p.name: p.pack(state[p.name], heads) if p.kind is Kind.SLICED else state[p.name]
        for p in own
    }
    found, whole = merged_packed(arch, packed), merged(arch, state)
    assert found.keys() == {p.name for p in own if not p.factor}
    for name, tensor in found.items():
        p = arch.by_name[name]
        expected = p.pack(whole[name], heads) if p.kind is Kind.SLICED else state[name]
        assert torch.equal(tensor, expected), name


def test_merged_weights_keep_their_type():
    arch = with_lora(BASE, OWN)
    state = {name: tensor.bfloat16() for name, tensor in weights_of(MODEL).items()}
    state |= {p.name: torch.zeros(p.shape) for p in arch.parameters if p.factor}
    for name, tensor in merged(arch, state).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[name])
