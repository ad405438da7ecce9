"""One optimiser step after another: losses, modes, what is zeroed, stepped and measured."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.trainer import Stepper, build_optimizer, train
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.task import Batch
from tests.conftest import (
    CLASSIFY,
    all_of,
    build,
    images_for,
    learning_rate,
    training_options,
    weights_of,
)

STILL = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.0, "head_lr": 0.0}
SGD = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "head_lr": 0.1}


def schedule_of(*slots):
    """Slots of blocks of four heads each."""
    return Schedule(np.array(slots, dtype=np.int8))


FULL, FORWARD, SKIP = ([operation] * 4 for operation in (3, 1, 0))


def held(schedule, dtype=torch.float32):
    """A small model, its architecture, and what a client has of it."""
    model, arch = build(depth=schedule.operations.shape[1])
    model.to(dtype)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    return model, arch, partial


def cut(images, labels, *sizes):
    """Batches of some sizes, one after another."""
    rows = zip(images.split(sizes), labels.split(sizes), strict=True)
    return iter([Batch(*some) for some in rows])


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("sizes", [(8, 8, 4), (1,)])
def test_the_loss_of_training_is_the_mean_over_examples(sizes, micro_batches):
    model, arch, partial = held(schedule_of([FULL, FULL], [FULL, FORWARD]), torch.float64)
    images, labels = images_for(arch, sum(sizes), torch.float64)
    options = training_options(**STILL, micro_batches=micro_batches)
    batches = cut(images, labels, *sizes)
    found = train(partial, batches, CLASSIFY, options, learning_rate, Meter())
    expected = F.cross_entropy(model(images), labels).item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_examples_that_do_not_run_do_not_count():
    """Of three, the third is in a slot that runs nothing; of no batch at all there is no loss."""
    model, arch, partial = held(schedule_of([FULL], [SKIP]), torch.float64)
    images, labels = images_for(arch, 3, torch.float64)
    for batches, count in (([3], 2), ([2, 1], 2), ([1], 1), ([], 0)):
        rows = sum(batches)
        data = cut(images[:rows], labels[:rows], *batches)
        found = train(partial, data, CLASSIFY, training_options(**STILL), learning_rate, Meter())
        ran = [0, 1][:count] if batches != [2, 1] else [0, 2]
        expected = F.cross_entropy(model(images[ran]), labels[ran]) if count else torch.zeros(())
        assert found == pytest.approx(expected.item(), rel=1e-12, abs=0)


def test_a_batch_of_which_nothing_runs_weighs_nothing():
    """Its only example is in the first slot, which is skipped."""
    _, arch, partial = held(schedule_of([SKIP], [FULL]))
    before = partial.update()["head.weight"].clone()
    stepper = Stepper(partial, CLASSIFY, training_options(**SGD), learning_rate, Meter())
    assert stepper.step(Batch(*images_for(arch, 1))) == (0.0, 0)
    assert torch.equal(partial.update()["head.weight"], before)


def test_dropout_is_drawn_in_training_alone():
    _, arch, partial = held(schedule_of([FULL]))
    seen = []

    class Watching(ImageClassification):
        def loss(self, outputs, batch):
            seen.append(partial.training)
            if len(seen) == 3:
                raise ArithmeticError
            return super().loss(outputs, batch)

    data, options = images_for(arch, 4), training_options(**SGD)
    train(partial, cut(*data, 2, 2), Watching(), options, learning_rate, Meter())
    assert not partial.training
    with pytest.raises(ArithmeticError):
        train(partial, cut(*data, 4), Watching(), options, learning_rate, Meter())
    assert seen == [True] * 3
    assert not partial.training


ALL_RUN = schedule_of([FULL], [FULL], [FULL])
LAST_SKIPS = schedule_of([FULL], [FULL], [SKIP])


@pytest.mark.parametrize(
    "schedule,parts,sizes,expected",
    [
        (ALL_RUN, 1, (6, 6, 3), [True]),
        (ALL_RUN, 1, (6, 2, 1, 6), [True, False, True]),
        (ALL_RUN, 2, (6, 3), [False]),
        (ALL_RUN, 2, (6, 1), [False]),
        (LAST_SKIPS, 1, (2, 3), [True]),
        (LAST_SKIPS, 1, (1, 1), [False]),
        (LAST_SKIPS, 2, (6, 6), [False]),
    ],
)
def test_gradients_are_overwritten_where_one_pass_fills_every_slot_that_runs(
    schedule, parts, sizes, expected, monkeypatch
):
    _, arch, partial = held(schedule)
    settle, seen = partial.settle, []
    monkeypatch.setattr(partial, "settle", lambda one: seen.append(one) or settle(one))
    options = training_options(**SGD, micro_batches=parts)
    data = cut(*images_for(arch, sum(sizes)), *sizes)
    train(partial, data, CLASSIFY, options, learning_rate, Meter())
    assert seen == expected


def test_heads_step_together_only_where_that_is_asked_for():
    """Head 1 runs FULL in the second slot, in which the last batch has no example."""
    operations = np.full((2, 1, 4), Operation.FORWARD_ONLY, dtype=np.int8)
    operations[0, 0, 0] = operations[1, 0, 1] = Operation.FULL
    ends = []
    for sizes in ((4,), (4, 1)):
        torch.manual_seed(0)
        _, arch, partial = held(Schedule(operations))
        data = cut(*images_for(arch, sum(sizes)), *sizes)
        train(partial, data, CLASSIFY, training_options(lr=0.01), learning_rate, Meter())
        ends.append(partial.update()["blocks.0.attn.qkv.weight"].clone().chunk(2))
    (first, second), (first_later, second_later) = ends
    assert not torch.equal(first, first_later)
    assert torch.equal(second, second_later)


def test_the_classifier_steps_whatever_the_last_block_does():
    _, arch, partial = held(schedule_of([FULL, FORWARD]))
    before = {name: tensor.clone() for name, tensor in partial.update().items()}
    Stepper(partial, CLASSIFY, training_options(**SGD), learning_rate, Meter()).step(
        Batch(*images_for(arch, 2))
    )
    after = partial.update()
    kinds = {name: arch.by_name[name].kind for name in after}
    assert {Kind.FINAL, Kind.SHARED, Kind.SLICED} == set(kinds.values())
    assert not [name for name, tensor in after.items() if torch.equal(tensor, before[name])]


@pytest.mark.parametrize("optimizer,kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_one_kernel_steps_all_slices_of_a_rate(optimizer, kind):
    _, _, partial = held(schedule_of([FULL]))
    options = training_options(
        optimizer=optimizer, lr=0.25, head_lr=0.5, weight_decay=0.125, momentum=0.75
    )
    found = build_optimizer(partial.entries(), options, learning_rate)
    assert type(found) is kind
    rates = {}
    for group in found.param_groups:
        rates[group["lr"]] = sum(value.numel() for value in group["params"])
        assert (group["weight_decay"], group["fused"]) == (0.125, True)
        assert group.get("momentum", 0.75) == 0.75
    head = sum(t.numel() for n, t in partial.update().items() if n.startswith(("head.", "norm.")))
    assert rates == {0.5: head, 0.25: sum(t.numel() for t in partial.update().values()) - head}


class Noting(Meter):
    """A meter that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.bases, self.noted = [], []

    def run(self, step, key, base, known):
        """Keep what is held before a step."""
        self.bases.append(base)
        return super().run(step, key, base, known)

    def note(self, held):
        """Keep what is held between steps."""
        self.noted.append(held)
        super().note(held)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_weights_gradients_moments_and_images_are_held():
    """Of three examples, two run, as a copy; moments are there from the first step on."""
    _, arch, partial = held(schedule_of([FULL, FORWARD], [SKIP, SKIP]))
    images, labels = images_for(arch, 3)
    beside, meter = [torch.zeros(7), torch.zeros(5)], Noting()
    options = training_options(optimizer="sgd", momentum=0.5, proximal=0.5)
    stepper = Stepper(partial, CLASSIFY, options, learning_rate, meter, beside)
    for _ in range(2):
        stepper.step(Batch(images, labels))
    trained = nbytes(partial.update().values())
    own = nbytes(tensor for _, tensor in partial.held()) + nbytes(beside)
    held_before = own + 2 * trained  # gradients, and where the proximal term pulls to
    assert meter.bases == [
        held_before + nbytes([images, images[:2]]),
        held_before + trained + nbytes([images, images[:2]]),
    ]
    assert meter.noted == [held_before + trained] * 2


def test_what_is_held_is_looked_up_by_whether_there_is_a_proximal_term():
    _, arch, partial = held(all_of(build(depth=1)[1]))
    meter = Noting()
    for proximal in (0.0, 0.5):
        options = training_options(**SGD, proximal=proximal)
        stepper = Stepper(partial, CLASSIFY, options, learning_rate, meter)
        stepper.step(Batch(*images_for(arch, 2)))
    without, with_term = meter.noted
    assert with_term - without == nbytes(partial.update().values())
