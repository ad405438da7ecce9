"""Moments of micro-batches, for many at once, against loops over slots and heads."""

import numpy as np
import pytest

from d2ft_fl.costs.memory import MicroBatchMemory
from d2ft_fl.subnets.branches import Trains
from tests.conftest import cost_model
from tests.costs.by_parameters import ADAPTED, UNEVEN
from tests.costs.moments_by_loops import branch_moments, drawn, peak

BLOCKS, HEADS = 3, UNEVEN.heads
LIKE = cost_model(UNEVEN).activations
OF_A_ALONE = Trains(  # nothing before the product out, nor the norm
    anything=True, norm=False, scale=False, inward=False, y=False, z=False,
    weights=(False, False), near=(False, True), far=(False, False),
)  # fmt: skip
TRAINS = {
    "all": UNEVEN.trains,
    "LoRA": ADAPTED.trains,
    "one factor of a product out": (OF_A_ALONE, OF_A_ALONE),
}


def tables(slots, seed, count=2):
    """Operations, of which some are rare, sizes, some of them 0, and ranks of what trains."""
    draw = np.random.default_rng(seed)
    operations = np.stack(
        [
            draw.choice(4, size=(slots, BLOCKS, HEADS), p=draw.dirichlet([0.6] * 4))
            for _ in range(count)
        ]
    ).astype(np.int8)
    operations[::2, 0] = operations[::2, -1]  # some slots are alike
    sizes = draw.integers(0 if slots > 1 else 1, 6, (count, slots))
    ranks = draw.integers(1, 5, (count, BLOCKS, HEADS)) * (operations == 3).any(axis=1)
    return operations, sizes, ranks


FLAGS = [
    {},
    {"narrow": 700, "stream": 700},  # nothing is cast
    {"near": np.array([0, 0]), "ranked": np.array([0, 0]), "drops": np.array([0, 0])},
    {"near": np.array([300, 0]), "ranked": np.array([0, 400])},
    {"stream": 10_000, "narrow": 5_000, "rms": True},
    {"scores": 50_000, "cast_scores": 0},
    {"gradient": 200_000},
    {"besides": np.zeros((3, 2, HEADS), dtype=np.int64), "weights": np.full((2, HEADS), 5_000)},
]


@pytest.mark.parametrize("flags", range(len(FLAGS)))
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("trains", TRAINS)
def test_moments_are_those_of_each_branch(trains, slots, checkpointing, flags):
    seed = 12 * flags + 3 * checkpointing + slots + 100 * list(TRAINS).index(trains)
    b = drawn(LIKE, seed, trains=TRAINS[trains], **FLAGS[flags])
    operations, sizes, ranks = tables(slots, seed)
    found = MicroBatchMemory.of(b, checkpointing, operations, sizes, ranks)
    peaks = found.peak()
    for index, row in enumerate(sizes.tolist()):
        branches = branch_moments(b, checkpointing, operations[index], row, ranks[index])
        assert found.saved[index].tolist() == [one.saved for one in branches]
        assert found.forward[index].tolist() == [one.forward() for one in branches]
        assert found.backward[index].tolist() == [one.backward() for one in branches]
        assert found.embedding[index] == 3 * b.embedded * sum(row)
        assert peaks[index] == peak(b, branches, sum(row))
