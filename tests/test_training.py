import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.full import learning_rate
from d2ft_fl.meter import Meter
from d2ft_fl.partial import PartialModel
from d2ft_fl.subnets import Kind, Operation, Schedule, pack_for
from d2ft_fl.training import LocalOptions, build_optimizer, fisher, train, trained_slices
from tests.conftest import build, images_for, weights_of


def batches(images, labels, size):
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def trained(model, arch, schedule, images, labels, options):
    partial = PartialModel(model, arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    data = batches(images, labels, options.batch_size)
    train(partial, data, options, learning_rate, Meter())
    return partial.trainable()


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_full_equals_plain_training(optimizer, slots):
    """Invariant 1: in float64, whatever the slots, since their gradients add up."""
    model, arch = build()
    model.double()
    images, labels = images_for(arch, 20, torch.float64)
    options = LocalOptions(batch_size=8, optimizer=optimizer, lr=0.01, head_lr=0.05)
    schedule = Schedule.filled(Operation.FULL, slots, arch.blocks, arch.heads)
    ours = trained(model, arch, schedule, images, labels, options)

    groups = [
        {
            "params": [p for n, p in model.named_parameters() if (arch.by_name[n].kind) is kind],
            "lr": learning_rate(kind, options),
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
    options = LocalOptions(batch_size=4, lr=0.01)
    images, labels = images_for(arch, 5)
    partial = PartialModel(model, arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    seen = {}

    class Spy(Meter):
        def note(self, held):
            name = "blocks.0.attn.qkv.weight"
            rows = partial.rows(name)
            seen.setdefault("steps", []).append(
                {
                    h: partial.sliced()[name].detach()[r.start : r.stop].clone()
                    for h, r in rows.items()
                }
            )

    train(partial, batches(images, labels, 4), options, learning_rate, Spy())
    first, second = seen["steps"]
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_moments_and_step_counts_are_per_slice():
    model, arch = build(depth=1)
    schedule = Schedule.filled(Operation.FULL, 1, 1, arch.heads)
    partial = PartialModel(model, arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    slices = trained_slices(partial)
    options = LocalOptions()
    optimizer = build_optimizer(slices, options, learning_rate)
    for s in slices:
        s.value.grad = s.grad.fill_(1.0) if s.head in (-1, 2) else None
    optimizer.step()
    for s in slices:
        state = optimizer.state.get(s.value, {})
        assert bool(state) == (s.head in (-1, 2))
        if state:
            assert state["exp_avg"].shape == s.value.shape


def test_a_slot_without_work_is_skipped_and_its_examples_do_not_count():
    model, arch = build(depth=2)
    operations = np.zeros((2, 2, 4), dtype=np.int8)
    operations[0] = Operation.FULL
    images, labels = images_for(arch, 8)
    options = LocalOptions(batch_size=8, optimizer="sgd", momentum=0.0, lr=0.1)
    half = trained(model, arch, Schedule(operations), images, labels, options)
    only = trained(model, arch, Schedule(operations[:1]), images[:4], labels[:4], options)
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, only[name])


def test_fisher_is_the_mean_of_squared_gradients():
    model, arch = build(depth=2)
    images, labels = images_for(arch, 3)
    schedule = Schedule.filled(Operation.FULL, 1, arch.blocks, arch.heads)
    partial = PartialModel(model, arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    ours = fisher(partial, images, labels, Meter())
    expected = np.zeros((arch.blocks, arch.heads))
    for x, y in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for p in arch.of_kind(Kind.SLICED):
            squares = model.get_parameter(p.name).grad.double().square()
            for head in range(arch.heads):
                expected[p.block, head] += float(p.pack(squares, [head]).sum()) / 3
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert all(t.grad is None for t in partial.trainable().values())
