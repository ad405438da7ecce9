"""Partial execution against the unmodified timm model, and the laws that schedules obey."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2ft_fl import timm_vit
from d2ft_fl.partial import PartialModel
from d2ft_fl.subnets import Kind, Operation, Schedule, pack_for
from tests.conftest import build, images_for, random_schedule, weights_of

FULL, FORWARD_ONLY, SHORTCUT = Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT
VARIANTS = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "registers": {"reg_tokens": 2},
    "average pooling": {"global_pool": "avg", "class_token": False},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "uneven slices": {"embed_dim": 28, "num_heads": 7, "mlp_ratio": 66 / 28},
    "one head": {"num_heads": 1},
    "one block": {"depth": 1},
}


def partial_model(model, arch, schedule):
    partial = PartialModel(model, arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    return partial


def relative(a, b):
    return float(((a - b).norm() / b.norm().clamp_min(1e-30)).detach())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", VARIANTS)
def test_all_full_equals_the_unmodified_model(name, dtype, tolerance):
    model, arch = build(**VARIANTS[name])
    check_equal_to_timm(model.to(dtype), arch, dtype, tolerance, side=16, channels=1)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_all_full_equals_unmodified_vit_tiny(dtype, tolerance):
    model, arch = build(
        img_size=64, patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3
    )
    check_equal_to_timm(model.to(dtype), arch, dtype, tolerance, side=64, channels=3)


def check_equal_to_timm(model, arch, dtype, tolerance, side, channels):
    images, labels = images_for(arch, 4, dtype, side, channels)
    expected = model(images)
    F.cross_entropy(expected, labels).backward()
    partial = partial_model(model, arch, Schedule.filled(FULL, 1, arch.blocks, arch.heads))
    logits = partial(images, 0)
    F.cross_entropy(logits, labels).backward()
    assert relative(logits, expected) <= tolerance
    trainable = partial.trainable()
    assert trainable.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in trainable.items():
        p, gradient = arch.by_name[name], model.get_parameter(name).grad
        if p.kind is Kind.SLICED:
            gradient = p.pack(gradient, range(arch.heads))
        assert relative(tensor.grad, gradient) <= tolerance, name


@pytest.mark.parametrize("seed", range(6))
def test_forward_only_changes_gradients_but_not_values(seed):
    model, arch = build()
    images, _ = images_for(arch, 3)
    full = partial_model(model, arch, Schedule.filled(FULL, 1, arch.blocks, arch.heads))
    draw = np.random.default_rng(seed).integers(1, 3, (1, arch.blocks, arch.heads))
    mixed = partial_model(model, arch, Schedule(draw.astype(np.int8)))
    torch.testing.assert_close(mixed(images, 0), full(images, 0), rtol=1e-5, atol=1e-5)


def test_a_block_is_a_sum_over_heads():
    """Running heads one by one and adding their branches gives the whole, biases once."""
    model, arch = build(depth=1)
    images, _ = images_for(arch, 2)
    x = timm_vit.embed(model, images)
    branches = []
    for head in range(arch.heads):
        operations = np.zeros((1, 1, arch.heads), dtype=np.int8)
        operations[0, 0, head] = FULL
        partial = partial_model(model, arch, Schedule(operations))
        out = partial.blocks[0]._branch(x, 0, *attention_of(partial))
        branches.append(out - x - model.blocks[0].attn.proj.bias)
    whole = model.blocks[0].attn(model.blocks[0].norm1(x))
    expected = sum(branches) + model.blocks[0].attn.proj.bias
    torch.testing.assert_close(expected, whole, rtol=1e-4, atol=1e-5)


def attention_of(partial):
    from d2ft_fl.partial import ATTENTION

    return ATTENTION, partial.blocks[0]._attention


def test_a_block_without_work_is_the_identity():
    model, arch = build()
    operations = np.full((1, arch.blocks, arch.heads), FULL, dtype=np.int8)
    operations[0, 1] = SHORTCUT
    partial = partial_model(model, arch, Schedule(operations))
    images, _ = images_for(arch, 2)
    x = timm_vit.embed(model, images)
    for index in (0, 2):
        x = model.blocks[index](x)
    torch.testing.assert_close(partial(images, 0), timm_vit.classify(model, x))
    assert 1 not in partial.blocks


@pytest.mark.parametrize("seed", range(8))
def test_gradients_exist_for_trained_slices_and_nowhere_else(seed):
    model, arch = build(init_values=0.1)
    schedule = random_schedule(arch, 3, seed)
    partial = partial_model(model, arch, schedule)
    images, labels = images_for(arch, 4)
    for slot in range(3):
        for _, tensor in partial.held():
            tensor.grad = None
        F.cross_entropy(partial(images, slot), labels).backward()
        full = schedule.operations[slot] == FULL
        for name, tensor in partial.trainable().items():
            p = arch.by_name[name]
            if p.kind is Kind.FINAL:
                assert tensor.grad is not None
            elif p.kind is Kind.SHARED:
                assert (tensor.grad is not None) == full[p.block].any(), name
            else:
                for head, rows in partial.rows(name).items():
                    own = None if tensor.grad is None else tensor.grad[rows.start : rows.stop]
                    assert (own is not None and bool(own.any())) == full[p.block, head], name
        trainable = {id(t) for t in partial.trainable().values()}
        assert all(t.grad is None for _, t in partial.held() if id(t) not in trainable)


def test_permuting_heads_permutes_gradients():
    model, arch = build()
    images, labels = images_for(arch, 3)
    order = [2, 0, 3, 1]
    weights = weights_of(model)
    permuted = dict(weights)
    for p in arch.of_kind(Kind.SLICED):
        tensor = weights[p.name].clone()
        p.unpack_(tensor, p.pack(weights[p.name], order), range(arch.heads))
        permuted[p.name] = tensor
    operations = random_schedule(arch, 1, 3).operations
    gradients = []
    for values, ops in ((weights, operations), (permuted, operations[:, :, order])):
        partial, schedule = PartialModel(model, arch), Schedule(np.ascontiguousarray(ops))
        partial.reset(schedule, pack_for(arch, values, schedule))
        F.cross_entropy(partial(images, 0), labels).backward()
        gradients.append(
            {
                (name, head): tensor.grad[rows.start : rows.stop]
                for name, tensor in partial.sliced().items()
                for head, rows in partial.rows(name).items()
            }
        )
    for (name, head), gradient in gradients[0].items():
        other = gradients[1][name, order.index(head)]
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


def test_only_resident_weights_are_held():
    model, arch = build()
    schedule = random_schedule(arch, 2, 1)
    partial = partial_model(model, arch, schedule)
    held = sum(t.numel() for _, t in partial.held())
    sent = sum(t.numel() for t in pack_for(arch, weights_of(model), schedule).values())
    assert held == sent
