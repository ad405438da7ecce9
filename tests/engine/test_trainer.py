import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.probes import probe_scores
from d2ft_fl.engine.trainer import Stepper, build_optimizer, train
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.planning.importance import MEASURED
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.tasks.task import Batch
from tests.conftest import (
    CLASSIFY,
    build,
    images_for,
    learning_rate,
    random_schedule,
    training_options,
    weights_of,
)


def batches(images, labels, size):
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def trained(model, arch, schedule, images, labels, options):
    partial = PartialModel(TimmViT(model), arch)
    partial.numerics = Numerics.of(options)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    data = batches(images, labels, options.batch_size)
    train(partial, (Batch(*rows) for rows in data), CLASSIFY, options, learning_rate, Meter())
    return partial.update()


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_full_equals_plain_training(optimizer, slots):
    """Invariant 1: in float64, whatever the slots, since their gradients add up."""
    model, arch = build()
    model.double()
    images, labels = images_for(arch, 20, torch.float64)
    options = training_options(batch_size=8, optimizer=optimizer, lr=0.01, head_lr=0.05)
    schedule = Schedule.filled(Operation.FULL, slots, arch.blocks, arch.heads)
    ours = trained(model, arch, schedule, images, labels, options)

    groups = [
        {
            "params": [p for n, p in model.named_parameters() if (arch.by_name[n].kind) is kind],
            "lr": learning_rate(kind, False, options),
        }
        for kind in (Kind.SLICED, Kind.SHARED, Kind.FINAL)
    ]
    reference = (
        torch.optim.AdamW(groups, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, momentum=0.9)
    )
    for x, y in batches(images, labels, 8):
        reference.zero_grad()
        F.cross_entropy(model(x), y).backward()
        reference.step()
    tolerance = 1e-10 if optimizer == "sgd" else 1e-6  # Adam divides by tiny second moments
    for name, tensor in ours.items():
        p, expected = arch.by_name[name], model.get_parameter(name).detach()
        if p.kind is Kind.SLICED:
            expected = p.pack(expected, range(arch.heads))
        assert (tensor - expected).norm() <= tolerance * expected.norm(), name


def test_a_slice_that_no_slot_of_a_batch_ran_full_is_not_stepped():
    """With 2 slots a last batch of one example runs slot 0 only."""
    model, arch = build(depth=1)
    operations = np.full((2, 1, 4), Operation.FORWARD_ONLY, dtype=np.int8)
    operations[0, 0, 0] = operations[1, 0, 1] = Operation.FULL
    schedule = Schedule(operations)
    options = training_options(batch_size=4, lr=0.01)
    images, labels = images_for(arch, 5)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    stepper = Stepper(partial, CLASSIFY, options, learning_rate, Meter())
    seen = []
    for x, y in batches(images, labels, 4):
        stepper.step(Batch(x, y))
        seen.append(partial.update()["blocks.0.attn.qkv.weight"].clone().chunk(2))  # heads 0 and 1
    first, second = seen
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    states = {e.heads: stepper.optimizer.state[e.value]["step"] for e in stepper.entries if e.heads}
    assert states == {(0,): 2, (1,): 1}


def test_gradient_and_optimiser_state_exist_for_trained_slices_only():
    model, arch = build()
    schedule = random_schedule(arch, 2, 4)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    entries = partial.entries()
    optimizer = build_optimizer(entries, training_options(), learning_rate)
    for entry in entries:
        entry.value.grad = entry.grad
    optimizer.step()
    moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    gradients = sum(gradient.numel() for gradient in partial.gradients())
    sent = sum(int(np.prod(shape)) for shape in up_spec(arch, schedule).values())
    assert moments == gradients == sent


@pytest.mark.parametrize("options", [{"micro_batches": 3}, {"checkpointing": True}])
def test_what_saves_memory_changes_no_result(options):
    model, arch = build(init_values=0.1)
    model.double()
    images, labels = images_for(arch, 20, torch.float64)
    schedule = random_schedule(arch, 3, 8)
    base = training_options(batch_size=8, optimizer="sgd", lr=0.05, head_lr=0.05)
    expected = trained(model, arch, schedule, images, labels, base)
    ours = trained(model, arch, schedule, images, labels, replace(base, **options))
    for name, tensor in ours.items():
        error = (tensor - expected[name]).norm()
        assert error <= 1e-12 * expected[name].norm(), name


def test_shared_parameters_go_on_training_after_a_batch_without_them():
    """Head 0 runs FULL in the second slot only, in which a batch of one has no example."""
    model, arch = build(depth=1)
    operations = np.full((2, 1, 4), Operation.FORWARD_ONLY, dtype=np.int8)
    operations[1, 0, 0] = Operation.FULL
    schedule = Schedule(operations)
    options = training_options(batch_size=4, optimizer="sgd", momentum=0.0, lr=0.1)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    stepper = Stepper(partial, CLASSIFY, options, learning_rate, Meter())
    images, labels = images_for(arch, 4)
    moved = []
    for count in (4, 1, 4):
        before = partial.update()["blocks.0.norm1.weight"].clone()
        stepper.step(Batch(images[:count], labels[:count]))
        moved.append(not torch.equal(before, partial.update()["blocks.0.norm1.weight"]))
    assert moved == [True, False, True]


def test_a_smaller_last_batch_leaves_no_stale_gradients():
    """One pass a batch overwrites gradients; a slot without examples must not leave old ones."""
    model, arch = build(depth=1)
    model.double()
    operations = np.full((2, 1, 4), Operation.FULL, dtype=np.int8)
    operations[0, 0, 1] = Operation.FORWARD_ONLY  # head 1 trains in the second slot only
    schedule = Schedule(operations)
    images, labels = images_for(arch, 5, torch.float64)
    options = training_options(batch_size=4, optimizer="sgd", momentum=0.0, lr=0.1, head_lr=0.1)
    ours = trained(model, arch, schedule, images, labels, options)
    slow = trained(model, arch, schedule, images, labels, replace(options, micro_batches=4))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, slow[name], rtol=1e-10, atol=1e-12)


def test_a_slot_without_work_is_skipped_and_its_examples_do_not_count():
    model, arch = build(depth=2)
    operations = np.zeros((2, 2, 4), dtype=np.int8)
    operations[0] = Operation.FULL
    images, labels = images_for(arch, 8)
    options = training_options(batch_size=8, optimizer="sgd", momentum=0.0, lr=0.1)
    half = trained(model, arch, Schedule(operations), images, labels, options)
    only = trained(model, arch, Schedule(operations[:1]), images[:4], labels[:4], options)
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, only[name])


def scored(model, arch, images, labels, kinds):
    schedule = Schedule.filled(Operation.FULL, 1, arch.blocks, arch.heads)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule), gradients=False)
    found = probe_scores(partial, Batch(images, labels), CLASSIFY, kinds, Meter())
    assert all(t.grad is None for t in partial.whole().values())
    assert all(branch.observer is None for branch in partial.branches())
    return found


def subnet_elements(model, arch, block, head, of):
    """All elements of a subnet, of each parameter's value or gradient."""
    slices = [p.pack(of(model.get_parameter(p.name)), [head]) for p in arch.of_kind(Kind.SLICED)
              if p.block == block]  # fmt: skip
    return torch.cat([t.flatten() for t in slices])


UNALIKE = {
    "plain": {},
    "uneven slices": {"mlp_ratio": 66 / 24},
    "gated attention": {"gated": True},
    "layer scale": {"init_values": 0.1},
    "no biases": {"qkv_bias": False},
}


@pytest.mark.parametrize("kind", UNALIKE)
def test_scores_are_what_autograd_says(kind):
    model, arch = build(depth=2, **UNALIKE[kind])
    model.double()
    images, labels = images_for(arch, 3, torch.float64)
    ours = scored(model, arch, images, labels, MEASURED)
    expected = {name: np.zeros((arch.blocks, arch.heads)) for name in MEASURED}
    for x, y in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for at in np.ndindex(arch.blocks, arch.heads):
            g = subnet_elements(model, arch, *at, lambda p: p.grad)
            w = subnet_elements(model, arch, *at, lambda p: p.detach())
            expected["fisher"][at] += g.square().mean() / 3
            expected["gradient"][at] += g.abs().mean() / 3
            expected["taylor"][at] += (w * g).sum().abs() / 3
    assert tuple(ours) == MEASURED
    for name in MEASURED:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-10, err_msg=name)


def test_kinds_measured_together_are_those_measured_alone():
    model, arch = build(depth=2)
    data = images_for(arch, 3)
    together = scored(model, arch, *data, ("gradient", "fisher"))
    for kind in together:
        assert np.array_equal(together[kind], scored(model, arch, *data, (kind,))[kind])


def test_taylor_tells_what_shrinking_a_subnet_does_to_the_loss():
    """All weights of one subnet times 1 - e: the loss moves by e times the sum of w g."""
    model, arch = build(depth=1)
    model.double()
    images, labels = images_for(arch, 1, torch.float64)
    ours = scored(model, arch, images, labels, ("taylor",))["taylor"][0, 2]
    losses = []
    with torch.no_grad():
        for factor in (1 - 1e-5, 1 + 1e-5):
            other = copy.deepcopy(model)
            for p in arch.of_kind(Kind.SLICED):
                own = p.pack(model.get_parameter(p.name), [2])
                p.unpack_(other.get_parameter(p.name), factor * own, [2])
            losses.append(float(F.cross_entropy(other(images), labels)))
    assert abs(losses[1] - losses[0]) / 2e-5 == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_proximal_term_is_that_of_the_loss(slots):
    """FedProx: plain training whose loss has mu / 2 |w - w_0|^2 on top."""
    model, arch = build(depth=2)
    model.double()
    images, labels = images_for(arch, 20, torch.float64)
    options = training_options(batch_size=8, optimizer="sgd", lr=0.05, head_lr=0.05, proximal=0.7)
    schedule = Schedule.filled(Operation.FULL, slots, arch.blocks, arch.heads)
    ours = trained(model, arch, schedule, images, labels, options)
    free = [p for p in model.parameters() if p.requires_grad]
    began = [p.detach().clone() for p in free]
    reference = torch.optim.SGD(free, lr=0.05, momentum=0.9)
    for x, y in batches(images, labels, 8):
        reference.zero_grad()
        far = sum((p - b).square().sum() for p, b in zip(free, began, strict=True))
        (F.cross_entropy(model(x), y) + 0.35 * far).backward()
        reference.step()
    for name, tensor in ours.items():
        p, expected = arch.by_name[name], model.get_parameter(name).detach()
        if p.kind is Kind.SLICED:
            expected = p.pack(expected, range(arch.heads))
        assert (tensor - expected).norm() <= 1e-10 * expected.norm(), name


def test_the_proximal_term_leaves_what_was_not_stepped():
    """With 2 slots a last batch of one example runs slot 0 only."""
    model, arch = build(depth=1)
    operations = np.full((2, 1, 4), Operation.FORWARD_ONLY, dtype=np.int8)
    operations[0, 0, 0] = operations[1, 0, 1] = Operation.FULL
    schedule = Schedule(operations)
    options = training_options(batch_size=4, lr=0.01, proximal=0.5)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    stepper = Stepper(partial, CLASSIFY, options, learning_rate, Meter())
    seen = []
    for x, y in batches(*images_for(arch, 5), 4):
        stepper.step(Batch(x, y))
        seen.append(partial.update()["blocks.0.attn.qkv.weight"].clone().chunk(2))
    assert torch.equal(seen[0][1], seen[1][1])
