"""The engine under LoRA: against a head-by-head reference, and against peft's own training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.lora.config import Lora, merged, targeted, with_lora
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation
from tests.conftest import (
    TARGETS,
    all_of,
    build,
    embedded,
    images_for,
    random_schedule,
    running,
    weights_of,
)
from tests.engine.test_partial_model import gradients, relative, shake

SUBSETS = st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True)


def adapted(lora, frozen=(), dtype=torch.float64, **changes):
    """A shaken small model in double precision, its architecture with factors, and their state."""
    model, base = build(**changes)
    shake(model)
    model.to(dtype)
    arch = with_lora(base, lora, frozen)
    state = weights_of(model)
    generator = torch.Generator().manual_seed(7)
    for p in arch.parameters:
        if p.factor:
            state[p.name] = 0.2 * torch.randn(p.shape, generator=generator, dtype=dtype)
    return model, arch, state


def held(arch, state, schedule, dtype=torch.float64, recompute=False):
    model, _ = build()
    partial = PartialModel(TimmViT(model.to(dtype)), arch, Numerics(dtype, recompute))
    partial.reset(schedule, pack_for(arch, state, schedule))
    partial.gradients()
    partial.settle(overwrite=False)
    return partial


def reference(model, arch, leaves, state, images, operations):
    """Logits of one slot [blocks, heads], head by head, with whole LoRA weights."""
    x = embedded(model, images)
    pairs = {w.name: (a.name, b.name) for w, a, b in targeted(arch)}

    def weight(block, role, trains):
        (name,) = [p.name for p in arch.parameters if (p.block, p.role) == (block, role)]
        value = state[name]
        if name in pairs:
            a, b = (leaves[n] if trains else leaves[n].detach() for n in pairs[name])
            value = value + arch.scaling * b @ a
        return value

    def bias(block, role):
        (name,) = [p.name for p in arch.parameters if (p.block, p.role) == (block, role)]
        return state[name]

    for index, row in enumerate(operations):
        if not row.any():
            continue
        block, width = model.blocks[index], arch.widths[1][0]
        for norm in (block.norm1, block.norm2):
            y = F.layer_norm(x, (arch.dim,), norm.weight, norm.bias, norm.eps)
            first = norm is block.norm1
            total = bias(index, "proj.bias" if first else "fc2.bias")
            for head, operation in enumerate(row):
                if operation == Operation.SHORTCUT:
                    continue
                trains = operation == Operation.FULL
                if first:
                    d = arch.widths[0][0]
                    rows = slice(head * d, (head + 1) * d)
                    q, k, v = (
                        F.linear(y, w[rows], b[rows])
                        for w, b in zip(
                            weight(index, "qkv.weight", trains).chunk(3),
                            bias(index, "qkv.bias").chunk(3),
                            strict=True,
                        )
                    )
                    z = (q @ k.transpose(-1, -2) * d**-0.5).softmax(-1) @ v
                    out = weight(index, "proj.weight", trains)[:, rows]
                else:
                    rows = slice(head * width, (head + 1) * width)
                    inward = weight(index, "fc1.weight", trains)[rows]
                    z = F.gelu(F.linear(y, inward, bias(index, "fc1.bias")[rows]))
                    out = weight(index, "fc2.weight", trains)[:, rows]
                part = z @ out.t()
                total = total + (part.detach() if operation == Operation.FORWARD_ONLY else part)
            x = x + total
    return model.forward_head(model.norm(x))


@settings(max_examples=30, deadline=None)
@example(seed=41, slots=2, examples=2, targets=["qkv"], frozen="", recompute=False)
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 4),
    examples=st.integers(1, 7),
    targets=SUBSETS,
    frozen=st.sampled_from(["", "A", "B"]),
    recompute=st.booleans(),
)
def test_any_schedule_equals_the_sum_over_heads(seed, slots, examples, targets, frozen, recompute):
    """Values and gradients of random schedules and targets, in double precision."""
    lora = Lora(rank=3, alpha=5.0, targets=tuple(targets))
    still = [(target, frozen) for target in targets] if frozen else []
    model, arch, state = adapted(lora, still)
    schedule = random_schedule(arch, slots, seed)
    sizes = running(schedule, examples)
    if not sum(sizes):
        return
    images, labels = images_for(arch, sum(sizes), torch.float64)
    leaves = {
        p.name: state[p.name].clone().requires_grad_(p.trains) for p in arch.parameters if p.factor
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(arch.by_name[name].trains)
    expected, start = [], 0
    for slot, size in enumerate(sizes):
        if size:
            part = images[start : start + size]
            expected.append(reference(model, arch, leaves, state, part, schedule.operations[slot]))
            start += size
    expected = torch.cat(expected)
    F.cross_entropy(expected, labels).backward()
    partial = held(arch, state, schedule, recompute=recompute)
    logits = partial(images, sizes)
    F.cross_entropy(logits, labels).backward()
    assert relative(logits, expected) <= 1e-10
    found = gradients(partial)
    assert found.keys() == up_spec(arch, schedule).keys()
    for name, gradient in found.items():
        p = arch.by_name[name]
        wanted = (leaves[name] if p.factor else model.get_parameter(name)).grad
        wanted = torch.zeros(p.shape, dtype=torch.float64) if wanted is None else wanted
        if p.kind is Kind.SLICED:
            wanted = p.pack(wanted, schedule.heads(schedule.trained, p.block))
        assert (gradient - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12, name


def test_everything_merged_is_the_adapted_model():
    model, arch, state = adapted(Lora(rank=2, alpha=4.0))
    images, _ = images_for(arch, 3, torch.float64)
    for operation in (Operation.FULL, Operation.FORWARD_ONLY):
        logits = held(arch, state, all_of(arch, operation))(images, [3])
        model.load_state_dict(merged(arch, state))
        torch.testing.assert_close(logits, model(images))


def test_only_factors_of_trained_heads_are_held():
    """Those of the others are folded into their weights; base weights have no gradient."""
    _, arch, state = adapted(Lora(rank=2), dtype=torch.float32)
    schedule = random_schedule(arch, 2, 5)
    partial = held(arch, state, schedule, torch.float32)
    names = {f"{p.block}.{p.role}": p for p in arch.parameters if p.factor}
    for name, tensor in partial.held():
        if name in names:
            p = names[name]
            assert schedule.trained[p.block].any()
            if p.kind is Kind.SLICED:
                heads = schedule.heads(schedule.trained, p.block)
                assert tuple(tensor.shape) == p.packed_shape(heads)
    sent = sum(t.numel() for t in partial.update().values())
    assert sum(g.numel() for g in partial.gradients()) == sent


def test_dropout_acts_on_what_goes_into_a():
    """With an all-ones F and W = 0 the sum has only dropped inputs in it; see LoraConfig."""
    lora = Lora(rank=2, alpha=2.0, dropout=0.5)
    _, arch, state = adapted(lora)
    images, labels = images_for(arch, 4, torch.float64)
    found = []
    for recompute in (False, True):
        partial = held(arch, state, all_of(arch), recompute=recompute)
        partial.train(True)
        torch.manual_seed(1)
        F.cross_entropy(partial(images, [4]), labels).backward()
        found.append(gradients(partial))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    still = held(replace(arch, lora_dropout=0.0), state, all_of(arch))
    still.train(True)
    partial.train(False)
    torch.testing.assert_close(partial(images, [4]), still(images, [4]))


@pytest.mark.parametrize("name", ["qkv", "fc1", "proj", "fc2"])
def test_dropout_gradients_are_those_of_the_same_draw(name):
    """Finite differences along a random direction, the draw held still."""
    _, arch, state = adapted(Lora(rank=2, alpha=2.0, dropout=0.4, targets=(name,)))
    images, labels = images_for(arch, 4, torch.float64)
    schedule = all_of(arch)

    def loss(values):
        partial = held(arch, values, schedule)
        partial.train(True)
        torch.manual_seed(1)
        return F.cross_entropy(partial(images, [4]), labels), partial

    value, partial = loss(state)
    value.backward()
    slope, step = 0.0, 1e-5
    moved = {True: dict(state), False: dict(state)}
    for key, gradient in gradients(partial).items():
        p = arch.by_name[key]
        direction = torch.randn(p.shape, dtype=torch.float64)
        packed = p.pack(direction, range(arch.heads)) if p.kind is Kind.SLICED else direction
        slope += float((gradient * packed).sum())
        for up in (True, False):
            moved[up][key] = state[key] + (step if up else -step) * direction
    difference = float((loss(moved[True])[0] - loss(moved[False])[0]).detach()) / (2 * step)
    assert difference == pytest.approx(slope, rel=1e-6)
