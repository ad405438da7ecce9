"""Partial execution against the unmodified timm model, and the laws that schedules obey."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import all_of, build, embedded, images_for, random_schedule, running, weights_of

FULL, FROZEN, FORWARD_ONLY, SHORTCUT = (
    Operation.FULL,
    Operation.FROZEN,
    Operation.FORWARD_ONLY,
    Operation.SHORTCUT,
)
VARIANTS = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "registers": {"reg_tokens": 2},
    "average pooling": {"global_pool": "avg", "class_token": False},
    "average of normed tokens": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "maximum pooling": {"global_pool": "max"},
    "average and maximum": {"global_pool": "avgmax"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "uneven slices": {"embed_dim": 28, "num_heads": 7, "mlp_ratio": 66 / 28},
    "q/k norms": {"qk_norm": True},
    "root mean square norms": {"norm_layer": "rmsnorm", "qk_norm": True},
    "gated attention": {"gated": True},
    "one head": {"num_heads": 1},
    "one block": {"depth": 1},
}


def partial_model(model, arch, schedule, **numerics):
    dtype = next(model.parameters()).dtype
    numerics = Numerics(**{"dtype": dtype, **numerics})
    partial = PartialModel(TimmViT(model.to(dtype)), arch, numerics)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    partial.gradients()
    return partial


def gradients(partial):
    """Gradients by name, as updates travel: heads ascending."""
    found = {name: t.grad for name, t in partial.whole().items()}
    for index, block in partial.blocks.items():
        weights = dict(block.store.weights)
        block.store.weights = block.store.grads
        for role in block.store.grads:
            found[partial.specs[index][role].name] = block.store.ascending(role)
        block.store.weights = weights
    return found


def relative(a, b):
    return float(((a - b).norm() / b.norm().clamp_min(1e-30)).detach())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", VARIANTS)
def test_all_full_equals_the_unmodified_model(name, dtype, tolerance, recompute):
    model, arch = build(**VARIANTS[name])
    shake(model)
    check_equal_to_timm(model.to(dtype), arch, dtype, tolerance, 16, 1, recompute=recompute)


def shake(model):
    """Move every parameter off its initial value, so that none is zero or one by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_all_full_equals_unmodified_vit_tiny(dtype, tolerance):
    model, arch = build(
        img_size=64, patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3
    )
    check_equal_to_timm(model.to(dtype), arch, dtype, tolerance, side=64, channels=3)


def check_equal_to_timm(model, arch, dtype, tolerance, side, channels, **numerics):
    images, labels = images_for(arch, 4, dtype, side, channels)
    expected = model(images)
    F.cross_entropy(expected, labels).backward()
    partial = partial_model(model, arch, all_of(arch), **numerics)
    logits = partial(images, [4])
    F.cross_entropy(logits, labels).backward()
    assert relative(logits, expected) <= tolerance
    found = gradients(partial)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    # A key's bias moves all its logits alike: its gradient is zero in theory.
    scale = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for name, gradient in found.items():
        p, expected = arch.by_name[name], model.get_parameter(name).grad
        if p.kind is Kind.SLICED:
            expected = p.pack(expected, range(arch.heads))
        error = (gradient - expected).norm()
        assert error <= tolerance * max(float(expected.norm()), 1e-3 * scale), name


def reference(model, images, labels, operations):
    """timm's blocks head by head, detached as a schedule says: slow, plain, differentiable.

    Every head is a whole block's branch with the other heads' columns left out; FORWARD_ONLY is
    detached, FROZEN has detached weights.
    """
    x = embedded(model, images)
    for block, row in zip(model.blocks, operations, strict=True):
        if not row.any():
            continue
        trains = bool((row == FULL).any())
        for norm, run, bias, scale in (
            (block.norm1, attention_head, block.attn.proj.bias, block.ls1),
            (block.norm2, feed_forward_head, block.mlp.fc2.bias, block.ls2),
        ):
            total = bias if trains else bias.detach()
            for head, operation in enumerate(row):
                if operation == SHORTCUT:
                    continue
                shared = [p if trains else p.detach() for p in (norm.weight, norm.bias)]
                y = F.layer_norm(x, (x.shape[-1],), *shared, norm.eps)
                part = run(block, y, head, operation == FULL)
                total = total + (part.detach() if operation == FORWARD_ONLY else part)
            gamma = getattr(scale, "gamma", None)
            if gamma is not None:
                total = total * (gamma if trains else gamma.detach())
            x = x + total
    return model.forward_head(model.norm(x))


def attention_head(block, y, head, trains):
    attn = block.attn
    rows = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
    weight, bias, out = attn.qkv.weight, attn.qkv.bias, attn.proj.weight
    if not trains:
        weight, bias, out = weight.detach(), bias.detach(), out.detach()
    parts = [
        F.linear(y, w[rows], b[rows]) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True)
    ]
    q, k, v = parts
    weights = (q @ k.transpose(-1, -2) * attn.head_dim**-0.5).softmax(-1)
    return (weights @ v) @ out[:, rows].t()


def feed_forward_head(block, y, head, trains):
    mlp = block.mlp
    width = mlp.fc1.out_features // block.attn.num_heads
    rows = slice(head * width, (head + 1) * width)
    weight, bias, out = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight
    if not trains:
        weight, bias, out = weight.detach(), bias.detach(), out.detach()
    return F.gelu(F.linear(y, weight[rows], bias[rows])) @ out[:, rows].t()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 4),
    examples=st.integers(1, 7),
    scale=st.booleans(),
    recompute=st.booleans(),
)
def test_any_schedule_equals_the_sum_over_heads(seed, slots, examples, scale, recompute):
    """Values and gradients of random schedules against a head-by-head reference, in float64."""
    model, arch = build(init_values=0.3 if scale else None)
    shake(model)
    model.double()
    schedule = random_schedule(arch, slots, seed)
    sizes = running(schedule, examples)
    total = sum(sizes)
    if not total:
        return
    images, labels = images_for(arch, total, torch.float64)
    expected = []
    start = 0
    for slot, size in enumerate(sizes):
        if size:
            part = images[start : start + size]
            expected.append(reference(model, part, labels, schedule.effective[slot]))
            start += size
    expected = torch.cat(expected)
    F.cross_entropy(expected, labels).backward()
    partial = partial_model(model, arch, schedule, recompute=recompute)
    partial.settle(overwrite=False)
    logits = partial(images, sizes)
    F.cross_entropy(logits, labels).backward()
    assert relative(logits, expected) <= 1e-10
    for name, gradient in gradients(partial).items():
        p, wanted = arch.by_name[name], model.get_parameter(name).grad
        wanted = torch.zeros(p.shape, dtype=torch.float64) if wanted is None else wanted
        if p.kind is Kind.SLICED:
            wanted = p.pack(wanted, schedule.heads(schedule.trained, p.block))
        assert (gradient - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12, name


@pytest.mark.parametrize("seed", range(6))
def test_operations_that_run_change_gradients_but_not_values(seed):
    model, arch = build()
    images, _ = images_for(arch, 3)
    full = partial_model(model, arch, all_of(arch))
    draw = np.random.default_rng(seed).integers(1, 4, (1, arch.blocks, arch.heads))
    mixed = partial_model(model, arch, Schedule(draw.astype(np.int8)))
    torch.testing.assert_close(mixed(images, [3]), full(images, [3]), rtol=1e-5, atol=1e-5)


def test_a_block_without_work_is_the_identity():
    model, arch = build()
    operations = np.full((1, arch.blocks, arch.heads), FULL, dtype=np.int8)
    operations[0, 1] = SHORTCUT
    partial = partial_model(model, arch, Schedule(operations))
    images, _ = images_for(arch, 2)
    x = embedded(model, images)
    for index in (0, 2):
        x = model.blocks[index](x)
    torch.testing.assert_close(partial(images, [2]), model.forward_head(model.norm(x)))
    assert 1 not in partial.blocks


@pytest.mark.parametrize("seed", range(8))
def test_gradients_exist_for_trained_slices_and_nowhere_else(seed):
    model, arch = build(init_values=0.1)
    schedule = random_schedule(arch, 3, seed)
    partial = partial_model(model, arch, schedule)
    partial.settle(overwrite=False)
    images, labels = images_for(arch, 4)
    for slot in np.flatnonzero(schedule.active):
        for gradient in partial.gradients():
            gradient.zero_()
        sizes = [4 if s == slot else 0 for s in range(3)]
        F.cross_entropy(partial(images, sizes), labels).backward()
        full = schedule.operations[slot] == FULL
        found = gradients(partial)
        assert found.keys() == up_spec(arch, schedule).keys()
        for name, gradient in found.items():
            p = arch.by_name[name]
            if p.kind is Kind.FINAL:
                assert gradient.any()
            elif p.kind is Kind.SHARED:
                assert bool(gradient.any()) == full[p.block].any(), name
            else:
                start = 0
                for head in schedule.heads(schedule.trained, p.block):
                    rows = gradient[start : start + len(p.rows[head])]
                    start += len(rows)
                    assert bool(rows.any()) == full[p.block, head], name
    trainable = {id(t) for t in partial.whole().values()}
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
    found = []
    for values, ops in ((weights, operations), (permuted, operations[:, :, order])):
        partial, schedule = PartialModel(TimmViT(model), arch), Schedule(np.ascontiguousarray(ops))
        partial.reset(schedule, pack_for(arch, values, schedule))
        partial.gradients()
        F.cross_entropy(partial(images, [3]), labels).backward()
        rows = {}
        for name, gradient in gradients(partial).items():
            p, start = arch.by_name[name], 0
            if p.kind is Kind.SLICED:
                for head in schedule.heads(schedule.trained, p.block):
                    rows[name, head] = gradient[start : start + len(p.rows[head])]
                    start += len(p.rows[head])
        found.append(rows)
    assert found[0]
    for (name, head), gradient in found[0].items():
        other = found[1][name, order.index(head)]
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


def test_only_resident_weights_are_held():
    model, arch = build()
    schedule = random_schedule(arch, 2, 1)
    partial = partial_model(model, arch, schedule)
    held = sum(t.numel() for _, t in partial.held())
    sent = sum(t.numel() for t in pack_for(arch, weights_of(model), schedule).values())
    assert held == sent


def test_an_update_travels_as_it_came():
    """Storage order is the engine's own business."""
    model, arch = build()
    for seed in range(5):
        schedule = random_schedule(arch, 3, seed)
        packed = pack_for(arch, weights_of(model), schedule)
        partial = PartialModel(TimmViT(model), arch)
        partial.reset(schedule, packed)
        update = partial.update()
        assert {n: tuple(t.shape) for n, t in update.items()} == up_spec(arch, schedule)
        for name, tensor in update.items():
            p = arch.by_name[name]
            expected = packed[name]
            if p.kind is Kind.SLICED:
                heads = schedule.heads(schedule.trained, p.block)
                expected = p.pack(weights_of(model)[name], heads)
            assert torch.equal(tensor, expected), name


def test_checkpointing_gives_the_same_bits_with_dropout():
    """What was drawn on the way forward is drawn again."""
    model, arch = build(attn_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.3)
    images, labels = images_for(arch, 5)
    schedule = random_schedule(arch, 2, 11)
    found = []
    for recompute in (False, True):
        partial = partial_model(model, arch, schedule, recompute=recompute)
        partial.train(True)
        torch.manual_seed(3)
        F.cross_entropy(partial(images, running(schedule, 5)), labels).backward()
        found.append(gradients(partial))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_dropout_and_stochastic_depth_follow_timm():
    """With the same draws as timm's own modules: everything FULL, one block, one kind each."""
    for changes in ({"proj_drop_rate": 0.3}, {"drop_path_rate": 0.5}, {"attn_drop_rate": 0.3}):
        model, arch = build(depth=1, num_heads=1, **changes)
        images, _ = images_for(arch, 6)
        model.train()
        torch.manual_seed(5)
        expected = model(images)
        partial = partial_model(model, arch, all_of(arch))
        partial.train(True)
        torch.manual_seed(5)
        torch.testing.assert_close(partial(images, [6]), expected, rtol=1e-4, atol=1e-5)
        partial.train(False)
        model.eval()
        torch.testing.assert_close(partial(images, [6]), model(images), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_torchs_autocast():
    model, arch = build(embed_dim=48, qk_norm=True, init_values=0.2)
    images, labels = images_for(arch, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
    F.cross_entropy(expected.float(), labels).backward()
    partial = partial_model(model, arch, all_of(arch), dtype=torch.bfloat16)
    logits = partial(images, [6])
    assert logits.dtype is torch.bfloat16
    F.cross_entropy(logits.float(), labels).backward()
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.02)
    for name, gradient in gradients(partial).items():
        p, wanted = arch.by_name[name], model.get_parameter(name).grad
        if p.kind is Kind.SLICED:
            wanted = p.pack(wanted, range(arch.heads))
        assert gradient.dtype is torch.float32
        assert relative(gradient, wanted) <= 0.05 or wanted.norm() < 1e-3, name
