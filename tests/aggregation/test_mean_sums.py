"""Means of subnets by hand, to the bit, on an architecture of uneven slices."""

import math

import numpy as np
import pytest
import torch

from d2ft_fl.aggregation.mean_compensation import MeanBook, MeanSums
from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.wire.compensation import mean_spec
from tests.aggregation.tiny import (
    ARCH,
    DIM,
    EVERYTHING,
    FORWARD,
    FULL,
    SKIP,
    TOKENS,
    WEIGHTS,
    ramp,
    schedule,
)

FROZEN = Operation.FROZEN
# Heads that run in block 0: 1 in both slots, 2 in the second. In block 1 none.
PART = schedule(
    [[SKIP, FULL, SKIP], [SKIP, SKIP, SKIP]], [[SKIP, FORWARD, FROZEN], [SKIP, SKIP, SKIP]]
)
WIDTHS = ((1, 3, 2), (1, 4, 2))  # columns of each head, of either branch


def means_of(own, first):
    """What a client tells: numbers from ``first`` on, for every branch others."""
    return {
        name: ramp(shape, 0.25, first + 100 * number)
        for number, (name, shape) in enumerate(mean_spec(ARCH, own).items())
    }


def columns(branch, head):
    start = sum(WIDTHS[branch][:head])
    return slice(start, start + WIDTHS[branch][head])


def test_means_of_two_clients_are_weighted_by_examples():
    sums = MeanSums(ARCH, 100)
    one, other = means_of(PART, 1.0), means_of(EVERYTHING, -7.0)
    sums.check(PART, one)
    sums.add(PART, [3, 5], one)
    sums.add(EVERYTHING, [8], other)
    book = sums.apply(MeanBook())
    assert book.known.all()
    assert set(book.means) == {(block, branch) for block in range(2) for branch in range(2)}
    for branch in range(2):
        mine, theirs = one[f"d2ft.mean.0.{branch}"], other[f"d2ft.mean.0.{branch}"]
        found = book.means[0, branch]
        assert found.shape == (TOKENS, sum(WIDTHS[branch]))
        assert found.dtype == torch.float32
        assert torch.equal(found[:, columns(branch, 0)], theirs[:, columns(branch, 0)])
        # Head 1 ran on 8 examples of either; head 2 on 5 of one and 8 of the other.
        width = WIDTHS[branch][1]
        middle = (mine[:, :width] + theirs[:, columns(branch, 1)]) / 2
        assert torch.equal(found[:, columns(branch, 1)], middle)
        last = (5 * mine[:, width:].double() + 8 * theirs[:, columns(branch, 2)].double()) / 13
        assert torch.equal(found[:, columns(branch, 2)], last.float())
        assert torch.equal(book.means[1, branch], other[f"d2ft.mean.1.{branch}"])


def test_what_nobody_ran_keeps_what_was_known_of_it():
    sums = MeanSums(ARCH, 100)
    assert sums.apply(book := MeanBook()) is book
    told = means_of(PART, 1.0)
    sums.add(PART, [2, 0], told)  # nobody ran head 2, in the second slot
    first = sums.apply(MeanBook())
    assert first.known.tolist() == [[False, True, False], [False] * 3]
    assert set(first.means) == {(0, 0), (0, 1)}
    for branch in range(2):
        found, width = first.means[0, branch].clone(), WIDTHS[branch][1]
        assert torch.equal(found[:, columns(branch, 1)], told[f"d2ft.mean.0.{branch}"][:, :width])
        found[:, columns(branch, 1)] = 0
        assert not found.any()
    again = MeanSums(ARCH, 100)
    other = schedule([[FULL, SKIP, SKIP], [SKIP, SKIP, FULL]])
    again.add(other, [1], more := means_of(other, -3.0))
    second = again.apply(first)
    assert second.known.tolist() == [[True, True, False], [False, False, True]]
    for branch in range(2):
        kept = first.means[0, branch].clone()
        kept[:, columns(branch, 0)] = more[f"d2ft.mean.0.{branch}"]
        assert torch.equal(second.means[0, branch], kept)
        assert torch.equal(
            second.means[1, branch][:, columns(branch, 2)], more[f"d2ft.mean.1.{branch}"]
        )
        assert not second.means[1, branch][:, : columns(branch, 2).start].any()
    assert not first.means[0, 0][:, columns(0, 0)].any()  # the book of before is as it was


def test_sums_are_whole_multiples_of_two_to_the_minus_32():
    sums = MeanSums(ARCH, 1)
    own = schedule([[FULL, SKIP, SKIP], [SKIP] * 3])
    means = {name: torch.zeros(shape) for name, shape in mean_spec(ARCH, own).items()}
    grid = 2.0**-32
    means["d2ft.mean.0.0"][:, 0] = grid * torch.tensor([0.625, 0.375, -0.625, 7.25, 0.5])
    sums.add(own, [1], means)
    found = sums.apply(MeanBook()).means[0, 0][:, 0] / grid
    assert found.tolist() == [1, 0, -1, 7, 0]


@pytest.mark.parametrize("examples,limit", [(0, 2.0**29), (1, 2.0**29), (8, 2.0**26)])
def test_means_that_all_examples_would_take_out_of_the_sums_are_refused(examples, limit):
    sums = MeanSums(ARCH, examples)
    below = torch.nextafter(torch.tensor(limit), torch.tensor(0.0)).item()
    for value, refused in ((below, False), (-below, False), (limit, True), (-limit, True)):
        means = means_of(EVERYTHING, 1.0)
        means["d2ft.mean.1.0"][2, 1] = value
        if refused:
            with pytest.raises(ReplyError, match=r"'d2ft.mean.1.0' holds values that are not"):
                sums.check(EVERYTHING, means)
        else:
            sums.check(EVERYTHING, means)
    for value in (math.nan, math.inf):
        means["d2ft.mean.1.0"][2, 1] = value
        with pytest.raises(ReplyError, match="not finite, or too large"):
            sums.check(EVERYTHING, means)


def test_means_of_another_type_or_shape_are_refused():
    sums, good = MeanSums(ARCH, 8), means_of(EVERYTHING, 1.0)
    name = "d2ft.mean.1.1"
    for bad in (good[name].double(), good[name][:, 1:], good[name][1:]):
        with pytest.raises(ReplyError, match=r"'d2ft.mean.1.1' is not float32 \[5, 7\]"):
            sums.check(EVERYTHING, {**good, name: bad})
    rest = {n: t for n, t in good.items() if not n.startswith("d2ft.mean.1")}
    with pytest.raises(ReplyError, match=r"'d2ft.mean.1.0' is missing"):
        sums.check(EVERYTHING, rest)


def test_shortcuts_are_compensated_by_what_skipped_heads_add():
    means = {
        (block, branch): ramp((TOKENS, sum(WIDTHS[branch])), 0.25, block - branch)
        for block in range(2)
        for branch in range(2)
    }
    known = np.array([[True, True, False], [True, True, True]])
    book = MeanBook(means, known)
    own = schedule(  # block 0: two sets, of heads 0 and 2 and of head 1; block 1: all, and none
        [[SKIP, FULL, SKIP], [SKIP, SKIP, SKIP]],
        [[FULL, SKIP, FULL], [FULL, FULL, FULL]],
        [[FULL, FULL, FULL], [SKIP, SKIP, SKIP]],
    )
    offsets = book.offsets(ARCH, WEIGHTS, own)
    assert {n: tuple(t.shape) for n, t in offsets.items()} == {
        "d2ft.skip.0": (2, 2, TOKENS, DIM),
        "d2ft.skip.1": (1, 2, TOKENS, DIM),
    }
    # A product out's own columns of each head, as the architecture lists them.
    rows = {"give": ([0], [1, 2, 5], [3, 4]), "fall": ([6], [0, 1, 3, 5], [2, 4])}

    def adds(block, heads):
        out = []
        for branch, product in enumerate(("give", "fall")):
            weight = WEIGHTS[f"{block}.{product}.weight"]
            own = torch.zeros(TOKENS, DIM)
            for head in heads:
                for row in rows[product][head]:
                    own += means[block, branch][:, row, None] * weight[None, :, row]
            out.append(own)
        return torch.stack(out)

    assert torch.equal(offsets["d2ft.skip.0"][0], adds(0, [0]))  # of head 2 nothing is known
    assert torch.equal(offsets["d2ft.skip.0"][1], adds(0, [1]))
    whole = adds(1, [0, 1, 2])
    whole[1] = (whole[1] + WEIGHTS["1.fall.bias"]) * WEIGHTS["1.scale.gamma"]
    assert torch.equal(offsets["d2ft.skip.1"][0], whole)


def test_before_anything_is_known_nothing_is_compensated():
    own = schedule([[SKIP, FULL, SKIP], [SKIP, SKIP, SKIP]])
    assert MeanBook().offsets(ARCH, WEIGHTS, own) == {}
    nothing = MeanBook({}, np.zeros((2, 3), dtype=bool)).offsets(ARCH, WEIGHTS, own)
    assert set(nothing) == {"d2ft.skip.0", "d2ft.skip.1"}
    assert not any(tensor.any() for tensor in nothing.values())
