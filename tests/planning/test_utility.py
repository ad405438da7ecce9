"""What a round is worth, against its formula by hand and its laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.planning import utility
from d2ft_fl.planning.utility import Utility
from d2ft_fl.subnets.schedule import Operation
from tests.conftest import random_schedule
from tests.strategies.test_strategies import ARCH

FULL, FROZEN, FORWARD, SKIP = 3, 2, 1, 0
EVEN = Utility(np.ones((4, 3)), np.ones((4, 3)))


def of(operations, examples=1.0, bits=(32, 32), judge=EVEN):
    operations = np.asarray(operations, dtype=np.int8)[None]  # one client
    ranks = np.ones(operations.shape[:1] + operations.shape[2:])
    return float(judge.of(operations, ranks, np.array([examples]), [bits])[0])


def rows(*operations):
    """One slot, each of four blocks alike."""
    return np.repeat(np.array(operations)[None, :, None], 3, axis=2)


def test_everything_is_worth_one():
    assert of(rows(FULL, FULL, FULL, FULL)) == pytest.approx(1.0)


def test_by_hand():
    """Half of the blocks train, below one that cuts; the top one skips a third."""
    operations = rows(FULL, FULL, FORWARD, FORWARD)
    operations[0, 3, 0] = SKIP
    path = (1 - utility.CUT) ** 2
    learned = utility.BASE + (1 - utility.BASE) * 0.5 * path
    lost = utility.EXAMPLES * math.log(0.4) ** 2 + utility.LEARNED * math.log(learned) ** 2
    expected = (
        math.exp(-lost) * utility.BITS_UP[4] * utility.BITS_DOWN[8] * (1 - utility.SKIPPED / 3)
    )
    assert of(operations, examples=0.4, bits=(4, 8)) == pytest.approx(expected)


def test_a_block_that_cuts_itself_loses_nothing_of_its_own():
    """One of three heads of the upper block is FORWARD_ONLY: it cuts what the lower one learns."""
    operations = rows(FULL, FULL)
    operations[0, 1, 2] = FORWARD
    trained = (3 * (1 - utility.CUT / 3) + 2) / 6
    judge = Utility(np.ones((2, 3)), np.ones((2, 3)))
    learned = judge.learned(operations[None], np.ones((1, 2, 3)))
    assert learned == pytest.approx(utility.BASE + (1 - utility.BASE) * trained)


def test_a_gradient_that_passes_is_worth_more_than_one_that_is_cut():
    below = of(rows(FULL, FROZEN, FROZEN, FROZEN))
    assert below > of(rows(FULL, FROZEN, FORWARD, FROZEN)) > of(rows(FULL, FORWARD, SKIP, FROZEN))
    # Below all that trains there is none to cut.
    assert of(rows(FORWARD, FORWARD, FORWARD, FULL)) == of(rows(FROZEN, FROZEN, FROZEN, FULL))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.05, 1.0))
def test_doing_more_is_never_worth_less(seed, slots, examples):
    draw = np.random.default_rng(seed)
    operations = random_schedule(ARCH, slots, seed).operations.copy()
    judge = Utility(*draw.random((2, ARCH.blocks, ARCH.heads)) + 0.01)
    before = of(operations, examples, judge=judge)
    place = tuple(int(draw.integers(n)) for n in operations.shape)
    operations[place] = min(Operation.FULL, operations[place] + 1)
    after = of(operations, examples, judge=judge)
    assert after >= before - 1e-12
    assert of(operations, examples / 2, judge=judge) < after


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.05, 1.0))
def test_no_round_has_more_than_the_most(seed, slots, examples):
    draw = np.random.default_rng(seed)
    judge = Utility(*draw.random((2, ARCH.blocks, ARCH.heads)) + 0.01)
    for up, down in [(32, 32), (8, 32), (8, 8), (4, 8)]:
        ranks = np.ones((1, ARCH.blocks, ARCH.heads))
        shares, most = np.array([examples]), Utility.most(examples, (up, down))
        some = random_schedule(ARCH, slots, seed).operations[None]
        everything = np.full_like(some, Operation.FULL)
        assert judge.of(some, ranks, shares, [(up, down)])[0] <= most + 1e-12
        assert judge.of(everything, ranks, shares, [(up, down)])[0] == pytest.approx(most)


# -- by hand, numbers and all ----------------------------------------------------------------


def test_half_of_the_examples_or_a_smaller_batch_by_hand():
    assert Utility.most(0.5, (32, 32)) == pytest.approx(math.exp(-0.05 * math.log(2) ** 2))
    bits = [(32, 32, 1.0), (8, 32, 0.999), (4, 32, 0.993), (32, 8, 0.999), (4, 8, 0.993 * 0.999)]
    for up, down, worth in bits:
        assert Utility.most(1.0, (up, down)) == pytest.approx(worth, abs=1e-9)
    # A quarter of the examples has half the batch; four times that is too much, less is not.
    assert utility.ideal_batch(16, 0.25) == 8
    assert utility.of_batch(32, 16, 0.25) == pytest.approx(math.exp(-0.025 * math.log(4) ** 2))
    assert utility.of_batch(8, 16, 0.25) == utility.of_batch(4, 16, 0.25) == 1
    assert utility.of_batch(12, 16, 0.25) == pytest.approx(math.exp(-0.025 * math.log(1.5) ** 2))


def judged(judge, operations, ranks, examples, bits):
    """One client, subnet by subnet."""
    slots, blocks, heads = operations.shape
    subnets = [(b, h) for b in range(blocks) for h in range(heads)]

    def share(block, head, *which):
        return sum(operations[s, block, head] in which for s in range(slots)) / slots

    def cut(block):
        return sum(share(block, h, SKIP, FORWARD) for h in range(heads)) / heads

    trained = 0.0
    for b, h in subnets:
        path = math.prod(1 - 0.5 * cut(m) for m in range(b + 1, blocks))
        trained += judge.backward[b, h] * share(b, h, FULL) * ranks[b, h] * path
    learned = 0.02 + 0.98 * trained / judge.backward.sum()
    kept = 1.0
    for b in range(blocks):
        skipped = sum(judge.forward[b, h] * share(b, h, SKIP) for h in range(heads)) / heads
        kept *= max(0.0, 1 - 0.3 * skipped / judge.forward.mean())
    lost = 0.05 * math.log(examples) ** 2 + 0.033 * math.log(learned) ** 2
    worth = {32: 1.0, 8: 0.999, 4: 0.993}
    return learned, math.exp(-lost) * worth[bits[0]] * worth[bits[1]] * kept


def test_several_clients_by_hand():
    """Three clients, two slots, four blocks, three heads."""
    draw = np.random.default_rng(0)
    judge = Utility(*draw.random((2, 4, 3)))
    operations = draw.integers(0, 4, (3, 2, 4, 3)).astype(np.int8)
    ranks, examples = draw.uniform(0.3, 1.0, (3, 4, 3)), np.array([0.2, 1.0, 0.7])
    bits = [(4, 8), (32, 8), (8, 32)]
    expected = [judged(judge, *one) for one in zip(operations, ranks, examples, bits, strict=True)]
    learned, worth = zip(*expected, strict=True)
    assert judge.learned(operations, ranks) == pytest.approx(learned)
    assert judge.of(operations, ranks, examples, bits) == pytest.approx(worth)


def test_nothing_is_left_without_the_only_block_that_matters():
    judge = Utility(np.ones((4, 3)), np.repeat([[0.0], [0.0], [9.0], [0.0]], 3, axis=1))
    assert of(rows(FULL, FULL, SKIP, FULL), judge=judge) == 0


def test_the_mean_is_weighted_by_examples_and_who_does_nothing_counts():
    operations = np.stack([rows(FULL, FULL, FULL, FULL).astype(np.int8)] * 5)
    operations[1], operations[3, 0, 3, 0] = SKIP, SKIP
    local, used = np.array([8, 4, 3, 1, 0]), np.array([4, 4, 0, 1, 0])
    found = EVEN.mean_of(operations, local, used, [(32, 32)] * 3 + [(4, 32), (32, 32)])
    # Client 3 skips one head of 12: of the upper block two of three train, and a third cuts.
    learned = 0.02 + 0.98 * (9 * (1 - 0.5 / 3) + 2) / 12
    skipping = math.exp(-0.033 * math.log(learned) ** 2) * 0.9
    expected = (8 * math.exp(-0.05 * math.log(2) ** 2) + 1 * 0.993 * skipping) / 16
    assert found == pytest.approx(expected)


def test_the_mean_of_one_example_and_of_none():
    operations = rows(FULL, FULL, FULL, FULL).astype(np.int8)[None]
    one, none = np.array([1]), np.array([0])
    assert EVEN.mean_of(operations, one, one, [(32, 32)]) == pytest.approx(1.0)
    assert EVEN.mean_of(operations, none, none, [(32, 32)]) == 0
