from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update
from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import GlobalModel, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.quantization import quantize_changes, with_quantized_changes
from tests.conftest import build, random_schedule, weights_of

MODEL, ARCH = build(depth=2)
WEIGHTS = weights_of(MODEL)
SLOTS = 2


def update(seed, schedule=None, examples=None, step=None):
    """A client's reply: its weights are the global ones plus noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    schedule = schedule or random_schedule(ARCH, SLOTS, seed)
    tensors = {}
    for name, shape in up_spec(ARCH, schedule).items():
        p, base = ARCH.by_name[name], WEIGHTS[name]
        if p.kind is Kind.SLICED:
            base = p.pack(base, schedule.heads(schedule.trained, p.block))
        tensors[name] = base + 0.1 * torch.randn(shape, generator=generator)
    return Update(schedule, examples or [3 + seed % 5, 2], tensors, step or 1 + seed % 3 / 4)


def quantized(u, bits):
    """The update as it travels in few bits, and in full numbers, as the server reads it."""
    whole, sent = GlobalModel.of(ARCH, WEIGHTS), dict(u.tensors)
    old = {
        name: whole.take(ARCH.by_name[name], u.schedule.heads(u.schedule.trained, p.block))
        for name in sent
        if (p := ARCH.by_name[name]).kind is Kind.SLICED
    }
    sent |= quantize_changes(ARCH, old, sent, bits, np.random.SFC64(0))

    def in_full(tensors):
        return with_quantized_changes(ARCH, whole, u.schedule, tensors, bits)

    return replace(u, sent=sent, bits=bits, in_full=in_full), u.holding(in_full(sent))


def folded(updates):
    sums = Sums(ARCH, WEIGHTS, examples=1000)
    for u in updates:
        sums.add(u)
    return sums.apply()


def by_hand(updates):
    """The formula of the design in float64, head by head, written out with loops."""
    new = {}
    for name, old in WEIGHTS.items():
        p, value = ARCH.by_name[name], old.double().clone()
        if p.kind is Kind.EMBEDDING:
            new[name] = value
            continue
        for head in range(ARCH.heads) if p.kind is Kind.SLICED else [None]:
            top, bottom = 0.0, 0
            for u in updates:
                full = u.schedule.operations == Operation.FULL  # [slots, blocks, heads]
                if p.kind is Kind.SLICED:
                    ran = full[:, p.block, head]
                elif p.kind is Kind.SHARED:
                    ran = full[:, p.block].any(axis=1)
                else:
                    ran = (u.schedule.operations != Operation.SHORTCUT).any(axis=(1, 2))
                n = int(np.dot(ran, u.slot_examples))
                if n == 0:
                    continue
                if p.kind is Kind.SLICED:
                    heads = u.schedule.heads(u.schedule.trained, p.block)
                    whole = torch.zeros(p.shape)
                    p.unpack_(whole, u.tensors[name], heads)
                    top = top + n * u.step * (
                        p.pack(whole, [head]).double() - p.pack(old, [head]).double()
                    )
                else:
                    top = top + n * u.step * (u.tensors[name].double() - old.double())
                bottom += n
            if bottom:
                if p.kind is Kind.SLICED:
                    p.unpack_(value, p.pack(value, [head]) + top / bottom, [head])
                else:
                    value += top / bottom
        new[name] = value
    return new


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4, unique=True))
def test_fold_is_the_formula_slice_by_slice(seeds):
    updates = [update(seed) for seed in seeds]
    ours, expected = folded(updates), by_hand(updates)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=5, unique=True), st.randoms())
def test_order_of_replies_does_not_matter(seeds, random):
    updates = [update(seed) for seed in seeds]
    expected = folded(updates)
    random.shuffle(updates)
    shuffled = folded(updates)
    assert all(torch.equal(shuffled[name], tensor) for name, tensor in expected.items())


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4, unique=True), st.sampled_from([8, 4]))
def test_quantized_changes_add_up_to_the_bits_that_full_numbers_do(seeds, bits):
    few, full = zip(*(quantized(update(seed), bits) for seed in seeds), strict=True)
    expected = folded(full)
    assert all(torch.equal(expected[name], tensor) for name, tensor in folded(few).items())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "change,message",
    [
        (lambda rows: rows[:-1], "has shape"),
        (lambda rows: rows.short(), "int16"),
        (lambda rows: scaled(rows, float("nan")), "not finite"),
        (lambda rows: scaled(rows, float("inf")), "not finite"),
        (lambda rows: scaled(rows, 1e9), "more than can be summed"),
    ],
)
def test_a_bad_quantized_change_is_refused_and_nothing_of_it_is_added(bits, change, message):
    few, _ = quantized(update(7, Schedule.filled(Operation.FULL, SLOTS, 2, 4)), bits)
    sums = Sums(ARCH, WEIGHTS, examples=1000)
    sums.add(few)
    before = sums.apply()
    name = "blocks.1.mlp.fc2.weight"
    bad = replace(few, sent=few.sent | {name: change(few.sent[name].clone())})
    # As Python, compiled loops warn of a scale of infinity times 0.
    with np.errstate(invalid="ignore"), pytest.raises(ReplyError, match=message):
        sums.add(bad)
    assert all(torch.equal(before[n], t) for n, t in sums.apply().items())


def scaled(rows, scale):
    """Quantized rows, of which the first has another scale."""
    rows[0, :4] = torch.tensor([scale]).view(torch.uint8)
    return rows


def test_a_slice_nobody_trained_keeps_its_bits():
    operations = np.full((SLOTS, 2, 4), Operation.FORWARD_ONLY, dtype=np.int8)
    operations[0, 1, 3] = Operation.FULL
    new = folded([update(1, Schedule(operations))])
    for p in ARCH.parameters:
        if p.kind is Kind.SLICED:
            rest = [h for h in range(4) if (p.block, h) != (1, 3)]
            assert torch.equal(p.pack(new[p.name], rest), p.pack(WEIGHTS[p.name], rest))
            if p.block == 1:
                assert not torch.equal(p.pack(new[p.name], [3]), p.pack(WEIGHTS[p.name], [3]))
        elif p.kind is Kind.EMBEDDING or p.block == 0:
            assert torch.equal(new[p.name], WEIGHTS[p.name])


def test_everyone_full_is_the_weighted_mean():
    """FedAvg, and not a mean over clients that did not train (which shrinks weights)."""
    everything = Schedule.filled(Operation.FULL, SLOTS, 2, 4)
    updates = [update(s, everything, [n, n], step=1.0) for s, n in ((1, 5), (2, 10), (3, 1))]
    new = folded(updates)
    for name in up_spec(ARCH, everything):
        p = ARCH.by_name[name]
        mean = sum(n * u.tensors[name].double() for u, n in zip(updates, (5, 10, 1), strict=True))
        got = p.pack(new[name], range(4)) if p.kind is Kind.SLICED else new[name]
        torch.testing.assert_close(got.double(), mean / 16, rtol=1e-6, atol=1e-7)


def broken(name, change):
    good = update(7, Schedule.filled(Operation.FULL, SLOTS, 2, 4))
    tensors = dict(good.tensors)
    change(tensors, name)
    return Update(good.schedule, good.slot_examples, tensors)


def poke(value):
    def change(tensors, name):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t, n: t.pop(n), "is missing"),
        (lambda t, n: t.update({"blocks.9.attn.qkv.weight": t[n]}), "was not assigned"),
        (lambda t, n: t.update({n: t[n][:-1]}), "has shape"),
        (lambda t, n: t.update({n: t[n].double()}), "float64"),
        (poke(float("nan")), "not finite"),
        (poke(float("inf")), "not finite"),
        (poke(1e9), "more than can be summed"),
    ],
)
def test_a_bad_reply_is_refused_and_nothing_of_it_is_added(change, message):
    sums = Sums(ARCH, WEIGHTS, examples=1000)
    sums.add(update(1))
    before = sums.apply()
    with pytest.raises(ReplyError, match=message):
        sums.add(broken("blocks.1.mlp.fc2.weight", change))
    assert all(torch.equal(before[n], t) for n, t in sums.apply().items())


def test_many_examples_do_not_make_an_honest_update_too_large():
    everything = Schedule.filled(Operation.FULL, SLOTS, 2, 4)
    sums = Sums(ARCH, WEIGHTS, examples=1_000_000)
    for seed in (1, 2):
        sums.add(update(seed, everything, [250_000, 250_000]))
    expected = by_hand([update(seed, everything, [250_000, 250_000]) for seed in (1, 2)])
    for name, tensor in sums.apply().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)
