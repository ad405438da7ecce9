"""Sums of updates by hand, to the bit, on an architecture of uneven slices."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_fl.aggregation.grid import SUM_BITS
from d2ft_fl.aggregation.sums import MOST_STEP, Sums
from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.wire.quantization import quantize_changes, with_quantized_changes
from tests.aggregation.tiny import (
    ARCH,
    EVERYTHING,
    FORWARD,
    FULL,
    SKIP,
    WEIGHTS,
    packed_old,
    schedule,
    update,
    with_one,
)

# Slot 0 trains heads 0 and 2 of block 0, slot 1 heads 1 and 2 of it; of block 1 slot 1 head 1.
PART = schedule(
    [[FULL, FORWARD, FULL], [FORWARD, FORWARD, SKIP]], [[SKIP, FULL, FULL], [SKIP, FULL, SKIP]]
)


def added(*updates, examples=100):
    sums = Sums(ARCH, WEIGHTS, examples)
    for one in updates:
        sums.add(one)
    return sums


def test_one_client_gets_what_it_sent_and_the_rest_keeps_its_bits():
    sent = update(PART, [3, 5], 0.5)
    new = added(sent).apply()
    for name, tensor in sent.tensors.items():
        p = ARCH.by_name[name]
        rest = torch.zeros_like(WEIGHTS[name])
        if p.rows:
            heads = PART.heads(PART.trained, p.block)
            p.unpack_(rest, tensor - packed_old(PART, name), heads)
        else:
            rest = tensor - WEIGHTS[name]
        assert torch.equal(new[name], WEIGHTS[name] + rest), name
    assert new["embed"] is WEIGHTS["embed"]


def test_examples_and_steps_of_two_clients_by_hand():
    """A row's change is its number times 0.5 of one, and times -0.25, at a step of 2, of another.

    One runs 3 examples in slot 0 and 5 in slot 1, the other 8 in its only slot.
    """
    sums = added(update(PART, [3, 5], 0.5), update(EVERYTHING, [8], -0.25, step=2.0))
    new = sums.apply()
    moved = {name: (new[name] - WEIGHTS[name]).double() for name in new}
    # A packed row i of the first, packed row j of the second; heads own 1, 3 and 2 rows of six.
    # In block 0 the first trains all heads, on 3, 5 and 8 examples.
    means = [
        (n * 0.5 * row - 8 * 2 * 0.25 * row) / (n + 8)
        for row, n in zip(range(1, 7), (3, 5, 5, 5, 8, 8), strict=True)
    ]
    # Packed rows 1 .. 6 are the rows 0, 1, 2, 5, 3, 4.
    wanted = torch.tensor(means, dtype=torch.float64)[[0, 1, 2, 4, 5, 3]]
    assert torch.allclose(moved["0.ask.weight"], wanted[:, None].expand(6, 4), rtol=0, atol=1e-6)
    assert torch.allclose(moved["0.give.weight"], wanted.expand(4, 6), rtol=0, atol=1e-6)
    # In block 1 the first trains head 1 on 5 examples: its rows 1, 2, 3 are the second's 2, 3, 4.
    means = [-0.5] + [(5 * 0.5 * r - 8 * 0.5 * (r + 1)) / 13 for r in (1, 2, 3)] + [-2.5, -3.0]
    wanted = torch.tensor(means, dtype=torch.float64)[[0, 1, 2, 4, 5, 3]]
    assert torch.allclose(moved["1.ask.weight"], wanted[:, None].expand(6, 4), rtol=0, atol=1e-6)
    # What a block shares: 8 examples train block 0 of the first, 5 block 1; the head has 8.
    row = torch.arange(1, 5, dtype=torch.float64)
    assert torch.equal(moved["0.fall.bias"], 0 * row)
    assert torch.allclose(moved["1.fall.bias"], -1.5 / 13 * row, rtol=0, atol=1e-6)
    assert torch.equal(moved["head.bias"], 0 * row[:3])
    assert sums.subnets_trained.tolist() == [[True] * 3] * 2


def test_a_step_of_one_is_the_default_and_what_was_trained_is_known():
    plain, stepping = added(update(PART, [4, 4], 0.5)), added(update(PART, [4, 4], 0.5, step=1.0))
    both = plain.apply(), stepping.apply()
    assert all(torch.equal(both[0][name], both[1][name]) for name in WEIGHTS)
    assert plain.subnets_trained.tolist() == [[True, True, True], [False, True, False]]
    heads = {0: (0, 1, 2), 1: (1,)}
    assert plain.trained == {
        p.name: heads[p.block] if p.rows else () for p in ARCH.parameters if p.trains
    }
    assert added(update(PART, [4, 0], 0.5)).trained["0.ask.weight"] == (0, 2)
    assert not added().subnets_trained.any()


def test_sums_come_in_stretches_of_neighbours_that_count_alike():
    p = ARCH.by_name["0.ask.weight"]
    sums = added(update(EVERYTHING, [2], 0.5))
    one = 2 * 0.5 * 2**36  # of the first packed row, on two examples
    for counts, rows in (
        ({0: 2, 1: 2, 2: 2}, [6]),
        ({0: 2, 1: 2, 2: 5}, [4, 2]),
        ({0: 5, 1: 2, 2: 2}, [1, 5]),
        ({0: 2, 2: 2}, [1, 2]),
        ({1: 4.5}, [3]),
    ):
        totals = sums.divide_by(p, counts)
        assert [len(total) for total in totals] == rows
        assert totals[-1].dtype == np.int64
        last = 6 if 2 in counts else 4  # the packed row in which they end
        assert totals[-1][-1].tolist() == [last * one] * 4
    # Head 1 alone is divided, by 4.5; the rest is of nobody now.
    moved = sums.apply()["0.ask.weight"] - WEIGHTS["0.ask.weight"]
    wanted = [0, 2 / 4.5, 3 / 4.5, 0, 0, 4 / 4.5]
    assert torch.allclose(moved, torch.tensor(wanted)[:, None].expand(6, 4), atol=1e-6)
    head = ARCH.by_name["head.bias"]
    (total,) = sums.divide_by(head, {-1: 4.0})
    assert total.tolist() == [one, 2 * one, 3 * one]
    assert torch.equal(
        sums.apply()["head.bias"] - WEIGHTS["head.bias"], torch.tensor([1.0, 2.0, 3.0]) / 4
    )


def test_how_long_a_change_is():
    """Of one whose rows change by 3, 6, ..., a row of four numbers or one."""
    own = update(schedule([[FULL, SKIP, SKIP], [SKIP] * 3]), [1], 3.0)
    # Head 0 has one row of 4, 4, 1 and 4 numbers; 4 shared ones twice, 3 rows of 4 and of 1.
    squares = 9 * (13 + 2 * (1 + 4 + 9 + 16) + (4 + 1) * (1 + 4 + 9))
    sums = added()
    assert sums.length(sums.terms(own)) == math.sqrt(squares)
    still = update(PART, [1, 1], 0.0)
    assert sums.length(sums.terms(still)) == 0.0


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_an_update_is_included_by_a_factor(factor):
    sums, plain = added(), added()
    own = update(EVERYTHING, [1], 0.5)
    sums.include(own, sums.terms(own), factor)
    plain.include(own, plain.terms(own))
    once, times = plain.apply(), sums.apply()
    for name, sent in own.tensors.items():
        p = ARCH.by_name[name]
        packed = (p.pack(t[name], range(3)) if p.rows else t[name] for t in (once, times))
        assert torch.equal(next(packed), sent)
        old = packed_old(EVERYTHING, name)
        assert torch.equal(next(packed), old + factor * (sent - old))


# -- limits --------------------------------------------------------------------------------------


ZERO = {**WEIGHTS, "head.bias": torch.zeros(3)}  # from where any change is exact


@pytest.mark.parametrize(
    "examples,most",
    [(0, 2.0**26), (1, 2.0**26), (4, 2.0**24), (2**20, 2.0**7)],  # 62 - 36 bits; then 62 - 35
)
def test_what_all_examples_together_could_take_out_of_the_sums_is_refused(examples, most):
    below = torch.nextafter(torch.tensor(most), torch.tensor(0.0)).item()
    for value in (below, -below, most, -most):
        own = with_one(EVERYTHING, [0], "head.bias", value)
        own.sent["head.bias"][1:] = 0.0
        for take in (Sums(ARCH, ZERO, examples).add, Sums(ARCH, ZERO, examples).terms):
            if abs(value) == below:
                take(own)
                continue
            with pytest.raises(ReplyError, match=r"'head.bias' changes by more than can"):
                take(own)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_wrap(sign):
    """Everybody's change is nearly the largest, at the largest step: 63 bits."""
    assert MOST_STEP * 2**SUM_BITS <= 2**63
    value = sign * (2.0**24 - 1)
    own = with_one(EVERYTHING, [1], "head.bias", value)
    own.sent["head.bias"][1:] = 0.0
    sums = Sums(ARCH, ZERO, 4)
    for _ in range(4):
        sums.add(replace(own, step=MOST_STEP))
    assert sums.apply()["head.bias"].tolist() == [2 * value, 0, 0]


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("take", ["add", "terms"])
def test_the_first_that_is_wrong_is_named(take):
    def refused(sent):
        with pytest.raises(ReplyError) as error:
            getattr(added(), take)(replace(good, sent=sent))
        return str(error.value)

    good = update(EVERYTHING, [1], 0.5)
    rest = {n: t for n, t in good.sent.items() if not n.startswith("1.")}
    assert refused(rest) == "'1.ask.weight' is missing"
    more = dict.fromkeys(("embed", "1.norm", "a"), good.sent["head.bias"])
    assert refused({**good.sent, **more}) == "'1.norm' was not assigned"
    short = good.sent["1.ask.weight"][:-1]
    assert refused({**good.sent, "1.ask.weight": short}) == (
        "'1.ask.weight' has shape [5, 4], not [6, 4]"
    )
    double = good.sent["head.weight"].double()
    assert refused({**good.sent, "head.weight": double}) == (
        "'head.weight' is torch.float64, not torch.float32"
    )
    for bad in (math.nan, math.inf, -math.inf):
        wrong = good.sent["0.fall.bias"].clone()
        wrong[2] = bad
        assert refused({**good.sent, "0.fall.bias": wrong}) == (
            "'0.fall.bias' holds values that are not finite"
        )


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantized_must_have_the_rows_and_bytes_of_its_slices(bits):
    whole, good = GlobalModel.of(ARCH, WEIGHTS), update(PART, [2, 2], 0.5)
    old = {name: packed_old(PART, name) for name in good.sent}
    few = {**good.sent, **quantize_changes(ARCH, old, good.sent, bits, np.random.SFC64(0))}
    own = replace(
        good,
        sent=few,
        bits=bits,
        in_full=lambda sent: with_quantized_changes(ARCH, whole, PART, sent, bits),
    )
    # 3 rows of head 1: four bytes of a scale, then 4 numbers of a row; head 1 has 4 of 7.
    assert few["1.ask.weight"].shape == (3, 4 + 4 * bits // 8)
    assert few["1.fall.weight"].shape == (4, 4 + 4 * bits // 8)
    sums = added(own)
    full = added(good.holding(own.tensors))
    ours, theirs = sums.apply(), full.apply()
    assert all(torch.equal(ours[name], theirs[name]) for name in WEIGHTS)
    name = "1.fall.weight"
    for wrong, words in (
        (few[name][:3], rf"has shape \[3, {4 + bits // 2}\], not \[4, {4 + bits // 2}\]"),
        (few[name][:, :-1], rf"has shape \[4, {3 + bits // 2}\], not \[4, {4 + bits // 2}\]"),
        (few[name].to(torch.int8), "is torch.int8, not torch.uint8"),
    ):
        with pytest.raises(ReplyError, match=words):
            sums.add(replace(own, sent={**few, name: wrong}))
