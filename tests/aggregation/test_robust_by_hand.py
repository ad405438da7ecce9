"""Robust means and clipping by hand, to the bit, on an architecture of uneven slices."""

import os
import tempfile
from itertools import permutations

import pytest
import torch

from d2ft_fl.aggregation.robust import ROBUST, ClippedUpdates, RobustSums, clipped, mixed
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.errors import ReplyError, RunError
from tests.aggregation.tiny import (
    ARCH,
    EVERYTHING,
    FULL,
    SKIP,
    WEIGHTS,
    packed_old,
    schedule,
    update,
    with_one,
)

ONE_HEAD = schedule([[SKIP, FULL, SKIP], [SKIP] * 3])


def kept(kind, updates, suspects=1, **options):
    sums = RobustSums(ARCH, WEIGHTS, kind, suspects, **options)
    for one in updates:
        sums.add(one)
    return sums


def everywhere(new, shift):
    """Whether all weights have moved by a shift, times the number of their packed row."""
    wanted = update(EVERYTHING, [1], shift).sent
    return all(
        torch.equal(p.pack(new[p.name], range(3)) if p.rows else new[p.name], wanted[p.name])
        for p in ARCH.parameters
        if p.trains
    )


@pytest.mark.parametrize(
    "kind,options,wanted",
    [
        ("median", {}, 1.0),
        ("median", {"mixing": False}, 1.0),
        ("median", {"mixing": True}, 0.5),  # of 0 and 1 twice, and of 1 and 5
        ("trimmed-mean", {}, 1.0),
        ("mean-around-median", {}, 0.5),  # of 0 and 1
    ],
)
def test_slices_are_mixed_only_where_that_is_asked_for(kind, options, wanted):
    updates = [update(EVERYTHING, [1], shift) for shift in (0.0, 1.0, 5.0)]
    assert everywhere(kept(kind, updates, **options).apply(), wanted)


@pytest.mark.parametrize(
    "kind,suspects,wanted",
    [
        ("median", 1, 2.5),
        ("trimmed-mean", 1, 2.5),
        ("mean-around-median", 1, 5 / 3),  # of 0, 1 and 4
        ("median", 2, None),  # five clients are needed
    ],
)
def test_of_four_clients_the_middle_two_count(kind, suspects, wanted):
    sums = kept(kind, [update(EVERYTHING, [1], 3 * s) for s in (4.0, 1.0, 9.0, 0.0)], suspects)
    new = sums.apply()
    assert everywhere(new, 3 * wanted) if wanted else sums.trained == {}


def test_of_values_that_are_as_near_the_smaller_counts():
    updates = [update(EVERYTHING, [1], shift) for shift in (3.0, 1.0, 2.0)]
    assert everywhere(kept("mean-around-median", updates).apply(), 1.5)


def test_of_many_values_that_are_as_near_the_smaller_count():
    """Of 33 clients 8 are left out: the one at 0 counts, the 16 below it, and 8 of those above."""
    updates = [update(EVERYTHING, [1], shift) for shift in [0.0] + [25.0, -25.0] * 16]
    new = kept("mean-around-median", updates, suspects=8).apply()
    assert everywhere(new, (-16 + 8) * 25 / 25)


def test_of_many_neighbours_that_are_as_near_the_first_are_mixed():
    """Beside 0 there are twenty at 1 and twelve at -1; with itself, 17 of 33 are mixed."""
    values = torch.tensor([0.0] + [1.0] * 20 + [-1.0] * 12, dtype=torch.float64)[:, None]
    assert mixed(values, 16)[0].item() == 16 / 17


def test_who_answers_first_decides_nothing_even_where_two_are_as_near():
    """The one in the middle is as near to either of the others."""
    updates = [update(EVERYTHING, [1], shift) for shift in (0.0, 1.0, 2.0)]
    first, *others = [kept("median", order, mixing=True).apply() for order in permutations(updates)]
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_mixing_tells_apart_what_lies_far_from_zero_close_together():
    """Of 30 slices 1, 2, 3 ... apart, each is mixed with its two neighbours; at the end, with one
    and the next."""
    values = 1e8 + torch.arange(30, dtype=torch.float64)[:, None] ** 1.5
    found = mixed(values, 27)
    for number in range(30):
        by_distance = sorted(range(30), key=lambda n: abs(float(values[n] - values[number])))
        assert found[number].item() == pytest.approx(
            float(values[by_distance[:3]].mean()), abs=1e-6
        )


def test_what_enough_clients_trained_is_known_slice_by_slice():
    updates = [update(own, [1], 1.0) for own in (ONE_HEAD, EVERYTHING, ONE_HEAD)]
    sums = kept("median", updates)
    assert sums.figures == {"too_few_trainers": None}
    names = {p.name: (1,) if p.rows else () for p in ARCH.parameters if p.trains and p.block < 1}
    assert sums.trained == names
    assert sums.subnets_trained.tolist() == [[False, True, False], [False] * 3]
    new = sums.apply()
    # Slices that somebody trained: heads of four parameters and two shared ones, in two blocks, and
    # the classifier's two. Of block 0 one head and the shared are of three clients.
    assert sums.figures == {"too_few_trainers": 1 - (4 + 2 + 2) / (2 * (3 * 4 + 2) + 2)}
    for p in ARCH.parameters:
        if p.name not in names:
            assert new[p.name] is WEIGHTS[p.name]
        elif p.rows:
            # Rows of head 1 are the first that two send, and the second that the third sends.
            rest = p.pack(new[p.name], [0, 2])
            assert torch.equal(rest, p.pack(WEIGHTS[p.name], [0, 2]))
            assert torch.equal(p.pack(new[p.name], [1]), updates[0].sent[p.name])


def test_who_ran_no_example_is_no_trainer():
    idle = [update(EVERYTHING, [0], 9.0)] * 2
    sums = kept("median", [update(EVERYTHING, [1], 1.0), *idle])
    assert sums.trained == {}
    new = sums.apply()
    assert all(new[name] is tensor for name, tensor in WEIGHTS.items())
    assert sums.left == 1
    nothing = kept("median", [])
    assert all(nothing.apply()[name] is tensor for name, tensor in WEIGHTS.items())
    assert nothing.left is None


def test_changes_below_two_to_the_26_are_kept_and_others_refused():
    zero = {**WEIGHTS, "head.bias": torch.zeros(3)}
    for value, refused in ((2.0**26 - 4, False), (2.0**26, True)):
        sums = RobustSums(ARCH, zero, "median", 1)
        one = with_one(EVERYTHING, [100], "head.bias", value)
        if refused:
            with pytest.raises(ReplyError, match="more than can be summed"):
                sums.add(one)
        else:
            sums.add(one)


def test_what_is_left_is_found_and_not_given():
    with pytest.raises(TypeError):
        RobustSums(ARCH, WEIGHTS, "median", 1, False, 0.5)


# -- files ---------------------------------------------------------------------------------------


def test_tensors_lie_in_memory_as_their_type_wants():
    """An odd number of float32, so that the second update would begin between two float64."""
    weights = {**WEIGHTS, "0.ask.weight": WEIGHTS["0.ask.weight"].double()}
    updates = [update(EVERYTHING, [1], shift) for shift in (1.0, 2.0, 4.0)]
    sums = RobustSums(ARCH, weights, "median", 1)
    for one in updates:
        sums.add(one.holding({**one.sent, "0.ask.weight": one.sent["0.ask.weight"].double()}))
    found = sums._kept()
    assert sum(tensor.nbytes for tensor in found[0].values()) % 8 == 4
    for tensors, one in zip(found, updates, strict=True):
        for name, tensor in tensors.items():
            assert tensor.data_ptr() % tensor.itemsize == 0
            assert torch.equal(tensor.float(), one.sent[name])
    assert sums.apply()["0.ask.weight"].dtype == torch.float64


def test_a_rounds_file_is_closed_when_it_was_aggregated():
    before = set(os.listdir("/proc/self/fd"))
    sums = kept("median", [update(EVERYTHING, [1], 1.0)] * 3)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    sums.apply()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_device_that_is_full_is_named_at_the_first_byte(monkeypatch):
    def full(**options):
        return open("/dev/full", "r+b", **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    sums = RobustSums(ARCH, WEIGHTS, "median", 1)
    with pytest.raises(RunError, match="cannot be written to: No space left"):
        sums.add(update(ONE_HEAD, [1], 1.0))
    sums._file.close()


# -- clipping ------------------------------------------------------------------------------------


def three_four():
    """An update whose whole change is 5 long: 3 of one number, 4 of another."""
    own = update(EVERYTHING, [1], 0.0)
    own.sent["head.bias"][2] += 3.0
    own.sent["1.give.weight"][1, 3] += 4.0
    return own


def test_a_change_as_long_as_allowed_stays_and_a_longer_one_is_shortened():
    own = three_four()
    for norm in (5.0, 6.0):
        assert clipped(ARCH, WEIGHTS, own, norm) is own
    short = clipped(ARCH, WEIGHTS, own, 2.5)
    assert (short.schedule, short.slot_examples) == (own.schedule, own.slot_examples)
    for name, tensor in short.tensors.items():
        change = tensor - packed_old(EVERYTHING, name)
        assert tensor.dtype == torch.float32
        wanted = torch.zeros_like(change)
        if name == "head.bias":
            wanted[2] = 1.5
        if name == "1.give.weight":
            wanted[1, 3] = 2.0
        assert torch.equal(change, wanted)


@pytest.mark.parametrize("kind", [None, *ROBUST])
def test_clipped_updates_are_handed_on(kind):
    def made():
        return RobustSums(ARCH, WEIGHTS, kind, 1) if kind else Sums(ARCH, WEIGHTS, 10)

    inner, plain = made(), made()
    outer = ClippedUpdates(inner, ARCH, WEIGHTS, 2.5)
    for _ in range(3):
        outer.add(three_four())
        plain.add(clipped(ARCH, WEIGHTS, three_four(), 2.5))
    assert outer.trained == plain.trained != {}
    assert outer.subnets_trained.all()
    new, wanted = outer.apply(), plain.apply()
    assert all(torch.equal(new[name], tensor) for name, tensor in wanted.items())
    assert new["head.bias"][2] == WEIGHTS["head.bias"][2] + 1.5
    assert outer.figures == plain.figures


def test_what_is_wrong_is_refused_before_it_is_clipped():
    outer = ClippedUpdates(Sums(ARCH, WEIGHTS, 10), ARCH, WEIGHTS, 2.5)
    bad = three_four()
    del bad.sent["0.fall.bias"]
    with pytest.raises(ReplyError, match=r"'0.fall.bias' is missing"):
        outer.add(bad)
    strange = three_four()
    strange.sent["1.norm"] = strange.sent["head.bias"]
    with pytest.raises(ReplyError, match=r"'1.norm' was not assigned"):
        outer.add(strange)
    assert outer.trained == {}
