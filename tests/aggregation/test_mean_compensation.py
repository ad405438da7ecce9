"""Compensated shortcuts: means are measured where subnets run, and stand in where they do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_fl.aggregation.mean_compensation import MeanBook, MeanSums
from d2ft_fl.engine.mean_tally import MeanTally, received
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.trainer import train
from d2ft_fl.errors import ReplyError
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.subnets.packing import down_spec, pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.tasks.task import Batch
from d2ft_fl.wire.blob import encode
from d2ft_fl.wire.compensation import mean_spec, skip_sets
from tests.conftest import (
    CLASSIFY,
    all_of,
    build,
    cost_model,
    embedded,
    images_for,
    learning_rate,
    random_schedule,
    training_options,
    weights_of,
)


def measured(model, arch, schedule, images, labels, **options):
    """The means that one client measures over its examples, in one pass without a step."""
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    tally = MeanTally(partial)
    options = training_options(lr=0.0, head_lr=0.0, batch_size=len(images), **options)
    train(
        partial,
        iter([Batch(images, labels)]),
        CLASSIFY,
        options,
        learning_rate,
        Meter(),
        tally.held(),
    )
    return tally.finish()


def book_of(model, arch, images, labels):
    """What one client that runs everything tells."""
    means = measured(model, arch, all_of(arch), images, labels)
    sums = MeanSums(arch, len(images))
    sums.check(all_of(arch), means)
    sums.add(all_of(arch), [len(images)], means)
    return sums.apply(MeanBook())


def branch_outputs(model, arch, images):
    """What each block's branches add to the stream, before layer scale, by timm's own modules."""
    x = embedded(model, images)
    found = []
    for block in model.blocks:
        attention = block.attn(block.norm1(x))
        x = x + block.ls1(attention)
        feed_forward = block.mlp(block.norm2(x))
        x = x + block.ls2(feed_forward)
        found.append((attention, feed_forward))
    return found


@pytest.mark.parametrize("changes", [{}, {"init_values": 0.3}, {"proj_bias": False}])
def test_a_whole_block_is_replaced_by_its_mean(changes):
    """All heads of a block skipped: its mean over examples, bias and layer scale included."""
    model, arch = build(**changes)
    images, labels = images_for(arch, 6)
    book = book_of(model, arch, images, labels)
    operations = np.full((1, arch.blocks, arch.heads), Operation.FULL, dtype=np.int8)
    operations[0, 1] = Operation.SHORTCUT
    schedule = Schedule(operations)
    offsets = book.offsets(arch, weights_of(model), schedule)
    assert offsets.keys() == {"d2ft.skip.1"}
    block = model.blocks[1]
    attention, feed_forward = branch_outputs(model, arch, images)[1]
    expected = torch.stack([block.ls1(attention).mean(0), block.ls2(feed_forward).mean(0)])
    torch.testing.assert_close(offsets["d2ft.skip.1"][0], expected, rtol=1e-4, atol=1e-5)
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(
        schedule, pack_for(arch, weights_of(model), schedule), received(schedule, offsets)
    )
    x = model.blocks[0](embedded(model, images))
    x = model.blocks[2](x + expected[0] + expected[1])
    torch.testing.assert_close(
        partial(images, [6]), model.forward_head(model.norm(x)), rtol=1e-3, atol=1e-4
    )


def test_with_one_example_a_shortcut_changes_nothing():
    """The mean of one example is its value: compensation is then exact, whatever is skipped."""
    model, arch = build(init_values=0.4)
    images, labels = images_for(arch, 1)
    book = book_of(model, arch, images, labels)
    whole = model(images)
    # A skipped head sees the same input only if nothing changed below: so one block at a time.
    for block in range(arch.blocks):
        operations = np.full((1, arch.blocks, arch.heads), Operation.FULL, dtype=np.int8)
        operations[0, block, 1:3] = Operation.SHORTCUT
        schedule = Schedule(operations)
        offsets = book.offsets(arch, weights_of(model), schedule)
        partial = PartialModel(TimmViT(model), arch)
        packed = pack_for(arch, weights_of(model), schedule)
        partial.reset(schedule, packed, received(schedule, offsets))
        torch.testing.assert_close(partial(images, [1]), whole, rtol=1e-4, atol=1e-5)


def test_means_are_those_of_the_examples_that_ran():
    model, arch = build(depth=1)
    images, labels = images_for(arch, 4)
    operations = np.zeros((2, 1, arch.heads), dtype=np.int8)
    operations[0, 0, 0] = Operation.FULL
    operations[:, 0, 1] = Operation.FORWARD_ONLY
    operations[1, 0, 2] = Operation.FROZEN
    schedule = Schedule(operations)
    means = measured(model, arch, schedule, images, labels)
    spec = mean_spec(arch, schedule)
    assert {n: tuple(t.shape) for n, t in means.items()} == spec
    block = model.blocks[0]
    x = embedded(model, images)
    qkv = block.attn.qkv(block.norm1(x)).view(4, arch.tokens, 3, arch.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v)  # [examples, heads, tokens, d]
    expected = [z[:2, 0].mean(0), z[:, 1].mean(0), z[2:, 2].mean(0)]
    torch.testing.assert_close(
        means["d2ft.mean.0.0"], torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5
    )


def test_sums_do_not_depend_on_order_and_keep_what_nobody_ran():
    model, arch = build(depth=1)
    schedules = [random_schedule(arch, 2, seed) for seed in (1, 2, 3)]
    replies = []
    for index, schedule in enumerate(schedules):
        images, labels = images_for(arch, 4, seed=index)
        replies.append((schedule, [2, 2], measured(model, arch, schedule, images, labels)))
    old = book_of(model, arch, *images_for(arch, 3, seed=9))
    books = []
    for order in ((0, 1, 2), (2, 0, 1)):
        sums = MeanSums(arch, 12)
        for index in order:
            sums.add(*replies[index])
        books.append(sums.apply(old))
    for key, tensor in books[0].means.items():
        assert torch.equal(tensor, books[1].means[key])
    ran = np.any([s.resident for s in schedules], axis=0)
    width = arch.widths[0][0]
    for head in range(arch.heads):
        own = slice(head * width, (head + 1) * width)
        same = torch.equal(books[0].means[0, 0][:, own], old.means[0, 0][:, own])
        assert same == (not ran[0, head])


def test_bad_means_are_named():
    _, arch = build()
    schedule = all_of(arch)
    good = {n: torch.zeros(s) for n, s in mean_spec(arch, schedule).items()}
    sums = MeanSums(arch, 10)
    for change, message in (
        (lambda m: m.pop("d2ft.mean.1.0"), "'d2ft.mean.1.0' is missing"),
        (lambda m: m.update({"d2ft.mean.0.1": torch.zeros(3)}), "is not float32"),
        (lambda m: m["d2ft.mean.2.1"].fill_(torch.inf), "not finite"),
        (lambda m: m["d2ft.mean.2.1"].fill_(1e30), "too large"),
    ):
        means = {n: t.clone() for n, t in good.items()}
        change(means)
        with pytest.raises(ReplyError, match=message):
            sums.check(schedule, means)


def test_slots_that_skip_the_same_share_one_tensor():
    operations = np.zeros((4, 1, 3), dtype=np.int8)
    operations[:, 0, 0] = Operation.FULL
    operations[1, 0, 1] = Operation.FULL
    operations[3] = Operation.FULL
    assert skip_sets(Schedule(operations), 0) == [0, 1, 0, -1]


@pytest.mark.parametrize("seed", range(6))
def test_costs_count_compensation_and_means(seed):
    """Bytes on the wire within the stated slack; peak memory as predicted."""
    model, arch = build(embed_dim=48)
    images, labels = images_for(arch, 16)
    book = book_of(model, arch, images, labels)
    schedule = random_schedule(arch, 2, seed)
    plain = cost_model(arch, 2, batch_size=8)
    costs = replace(plain, compensated=True, calibrating=True)
    tensors = pack_for(arch, weights_of(model), schedule)
    offsets = book.offsets(arch, weights_of(model), schedule)
    real = len(encode({**tensors, **offsets}, {"operations": "00" * schedule.operations.size}))
    slack = 160 * (len(down_spec(arch, schedule)) + arch.blocks) + 2048
    assert real <= costs.bytes_down(schedule) <= real + slack
    partial = PartialModel(TimmViT(model), arch)
    partial.reset(schedule, tensors, received(schedule, offsets))
    tally, meter = MeanTally(partial), Meter(verify=True)
    data = (Batch(images[i : i + 8].clone(), labels[i : i + 8]) for i in (0, 8))
    train(partial, data, CLASSIFY, costs.options, learning_rate, meter, tally.held())
    means = tally.finish()
    up = len(encode({**partial.update(), **means}, {}))
    slack = 160 * (len(up_spec(arch, schedule)) + len(means)) + 2048
    assert up <= costs.bytes_up(schedule) <= up + slack
    predicted = costs.cost(schedule, 16)
    assert meter.flops == predicted.flops == plain.flops(schedule, 16)
    assert meter.peak_bytes <= predicted.memory <= 1.15 * meter.peak_bytes
