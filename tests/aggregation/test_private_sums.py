"""Private sums by hand, to the last bit of their integers, on a small architecture."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from d2ft_fl.aggregation.keyed_noise import Noise
from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.aggregation.private_sums import PrivateRound, PrivateSums, Trainers
from d2ft_fl.aggregation.releases import Releases
from d2ft_fl.errors import ReplyError
from tests.aggregation.tiny import (
    ARCH,
    EVERYTHING,
    FORWARD,
    FULL,
    SKIP,
    WEIGHTS,
    schedule,
    update,
    with_one,
)

KEY = bytes(range(32))
ZERO = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
ONE_HEAD = schedule([[SKIP, FULL, SKIP], [SKIP] * 3])
IDLE = schedule([[SKIP] * 3] * 2)
SIZE = 2 * (2 * 24 + 7 + 28 + 4 + 4) + 12 + 3  # numbers that a client changes


def sums(planned, clip=1.0, noise=0.0, rate=1.0, round_number=1, weights=ZERO):
    releases = Releases(Privacy(clip, noise, rate, 1e-5))
    own = PrivateRound(releases, KEY, round_number, Trainers.of(planned, rate))
    return PrivateSums(ARCH, weights, own)


def changed(number, examples=(1,), own=EVERYTHING):
    """What a client sends that has changed the first number of the head's bias, from 0."""
    one = with_one(own, list(examples), "head.bias", number)
    sent = {name: torch.zeros_like(tensor) for name, tensor in one.sent.items()}
    sent["head.bias"][0] = number
    return one.holding(sent)


def total(own):
    """The sum of the first number of the head's bias, as a whole number."""
    (found,) = own._sums.divide_by(ARCH.by_name["head.bias"], {-1: 1.0})
    return int(found[0])


def test_a_change_is_shortened_to_clip_norm_less_what_rounding_can_add():
    """2^20 (1 - 2^-40) of 2^56 on the grid, less half a number of the grid in each direction."""
    own = sums([(EVERYTHING, 1)], clip=2.0**20)
    own.add(changed(2.0**21))
    wanted = 2**56 - 2**16 - Fraction(math.sqrt(SIZE)) / 2  # of 2^56 are 53 bits: 8 at a time
    assert abs(total(own) - wanted) <= 12
    small = sums([(EVERYTHING, 1)], clip=2.0**-20)
    small.add(changed(-1.0))
    assert total(small) == -round(2**16 * (1 - 2.0**-40) - math.sqrt(SIZE) / 2)


def test_a_change_that_is_short_enough_counts_as_it_is():
    own = sums([(EVERYTHING, 1)] * 2, clip=0.5)
    own.add(changed(0.25))
    own.add(changed(0.125))
    assert total(own) == (2 + 1) * 2**33
    own.add(changed(0.0))
    assert total(own) == (2 + 1) * 2**33


@pytest.mark.parametrize("clip", [2.0**-37, 0.0])
def test_where_rounding_alone_is_longer_than_clip_norm_nothing_is_added(clip):
    own = sums([(EVERYTHING, 1)], clip=clip)
    for number in (1.0, -1.0, 0.0):
        own.add(changed(number))
        assert total(own) == 0


def test_a_client_counts_once_if_it_ran_an_example_and_else_not():
    for examples, wanted in (([0], 0), ([1], 1), ([40], 1)):
        own = sums([(EVERYTHING, 1)], clip=4.0)
        own.add(changed(1.0, examples))
        assert total(own) == wanted * 2**36


def test_who_trains_is_counted_by_plans():
    planned = [(EVERYTHING, 1), (ONE_HEAD, 9), (EVERYTHING, 0), (IDLE, 5), (ONE_HEAD, 1)]
    forward = schedule([[FORWARD] * 3] * 2)  # runs and trains the classifier alone
    found = Trainers.of([*planned, (forward, 2)], 0.25)
    assert found.heads.tolist() == [[0.25, 0.75, 0.25], [0.25] * 3]
    assert found.blocks.tolist() == [0.75, 0.25]
    assert (found.some, found.clients) == (1.0, 4)
    assert found.of_parameter(ARCH.by_name["0.ask.weight"]) == {0: 0.25, 1: 0.75, 2: 0.25}
    assert found.of_parameter(ARCH.by_name["0.fall.bias"]) == {-1: 0.75}
    assert found.of_parameter(ARCH.by_name["head.bias"]) == {-1: 1.0}
    nobody = Trainers.of([(IDLE, 5), (EVERYTHING, 0)], 1.0)
    assert nobody.of_parameter(ARCH.by_name["0.ask.weight"]) == {}
    assert nobody.of_parameter(ARCH.by_name["1.fall.bias"]) == {}
    assert nobody.of_parameter(ARCH.by_name["head.bias"]) == {}


def test_what_plans_train_is_what_is_released():
    own = sums([(ONE_HEAD, 1)], noise=0.5)
    assert own.trained == {
        p.name: (1,) if p.rows else () for p in ARCH.parameters if p.trains and p.block < 1
    }
    assert own.subnets_trained.tolist() == [[False, True, False], [False] * 3]
    first = sums([(schedule([[FULL, SKIP, SKIP], [SKIP] * 3]), 1)])
    assert first.trained["0.ask.weight"] == (0,)


def test_noise_on_the_grid_is_what_key_round_and_release_say():
    """With noise 0.5 of clip-norm 3: 1.5 on 2^36; over what 0.75 clients of 2 plans count."""
    planned = [(EVERYTHING, 1), (ONE_HEAD, 1)]
    own = sums(planned, clip=3.0, noise=0.5, rate=0.75, round_number=4)
    own.add(update(EVERYTHING, [1], 0.125))
    plain = sums(planned, clip=3.0, noise=0.0, rate=0.75, round_number=4)
    plain.add(update(EVERYTHING, [1], 0.125))
    noisy, without = own.apply(), plain.apply()
    (name,) = own.private.releases.names[4]
    assert len(name) == 32  # 16 bytes
    stream = Noise(KEY, "noise", 4, name)
    for p in ARCH.parameters:
        if not p.trains:
            assert noisy[p.name] is ZERO[p.name]
            continue
        # Heads of block 0 count 0.75, 1.5 and 0.75, one by one; of block 1 1 at least, together.
        counts = {0: [1, 1.5, 1], 1: [1] * 3, -1: [1.5]}[p.block]
        heads = [[0], [1], [2]] if p.block == 0 else [[0, 1, 2]]
        if not p.rows:
            counts, heads = [1.5 if p.block < 1 else 1], [None]
        for own_heads, count in zip(heads, counts, strict=False):
            with_noise, calm = (
                p.pack(t[p.name], own_heads) if own_heads else t[p.name] for t in (noisy, without)
            )
            drawn = np.rint(1.5 * 2**36 * stream.normal(calm.numel())) / 2**36
            wanted = torch.from_numpy(drawn).view(calm.shape) / count
            assert torch.allclose(with_noise.double() - calm.double(), wanted, atol=1e-6)
    assert own.figures == {"epsilon": Privacy(3.0, 0.5, 0.75, 1e-5).epsilon([1])}


def test_a_bad_update_is_refused_and_changes_nothing():
    own = sums([(EVERYTHING, 1)])
    with pytest.raises(ReplyError, match="not finite"):
        own.add(changed(math.nan))
    assert total(own) == 0
