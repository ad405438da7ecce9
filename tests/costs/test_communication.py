"""Bytes that travel, and parameters that are counted, against sums over parameters."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.costs.communication import communication_of
from d2ft_fl.costs.compensation import Extras
from d2ft_fl.costs.parameter_counts import ParameterCounts, Parts, parts_of
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import cost_model
from tests.costs.by_parameters import (
    ADAPTED,
    ARCHITECTURES,
    HEADER,
    UNEVEN,
    added,
    bytes_of_row,
    schedule_of,
    sent_down,
    sent_up,
    tensors,
)

BITS = [(32, 32), (8, 32), (4, 8)]


def of_clients(arch, slots, count=6):
    """Schedules of some clients, and the same as arrays: operations, ranks."""
    schedules = [schedule_of(arch, slots, seed) for seed in range(count)]
    ranks = None if not arch.rank else np.stack([s.ranks for s in schedules])
    return schedules, np.stack([s.operations for s in schedules]), ranks


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("up,down", BITS)
def test_what_travels_is_each_parameter_that_is_wanted(kind, slots, up, down):
    arch = ARCHITECTURES[kind]
    costs = replace(cost_model(arch, slots), bits_up=up, bits_down=down)
    schedules, operations, ranks = of_clients(arch, slots)
    cached = np.random.default_rng(slots).integers(0, 2, (6, arch.blocks, arch.heads)) > 0
    cached[0], cached[1, 0] = False, False
    found = costs.communication.down(operations, cached, ranks)
    expected = [sent_down(arch, s, down, has) for s, has in zip(schedules, cached, strict=True)]
    assert found.tolist() == expected
    found = costs.communication.down(operations, None, ranks)
    assert found.tolist() == [sent_down(arch, s, down) for s in schedules]
    assert [costs.bytes_down(s) for s in schedules] == found.tolist()
    found = costs.communication.up(operations, costs.ranks(operations, ranks))
    assert found.tolist() == [sent_up(arch, s, up) for s in schedules]
    assert [costs.bytes_up(s) for s in schedules] == found.tolist()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_schedules_without_ranks_have_the_architectures_and_say_none(kind):
    arch = ARCHITECTURES[kind]
    schedules, operations, _ = of_clients(arch, 2)
    plain = [Schedule(schedule.operations) for schedule in schedules]
    costs = cost_model(arch, 2)
    down = costs.communication.down(operations, None)
    assert down.tolist() == [sent_down(arch, schedule, 32) for schedule in plain]
    assert [costs.bytes_up(s) for s in plain] == [sent_up(arch, s, 32) for s in plain]


def test_what_quantization_spares_and_what_a_client_keeps_for_it():
    """By hand, of the first of three heads: 24 columns; 3 * 8 rows in, 8 out, 12 of fc1 and fc2."""
    costs = replace(cost_model(UNEVEN), bits_up=4, bits_down=8).communication
    rows = 3 * 8 + 8 + 12 + 12
    assert costs.spared_up[0, 0] == rows * (4 * 24 - (4 + 12))
    assert costs.spared_down[1, 0] == rows * (4 * 24 - (4 + 24))
    assert costs.kept[0, 0] == rows * (4 + 24)
    assert costs.spared_up[0].tolist() == [
        (rows - 2 * less) * (4 * 24 - (4 + 12)) for less in (0, 1, 1)
    ]
    plain = cost_model(UNEVEN).communication
    for none in (plain.spared_up, plain.spared_down, plain.kept):
        assert not none.any()


def test_compensation_adds_means_of_what_is_skipped_and_of_what_is_there():
    """Block 0 skips two sets of heads, block 1 one; block 0 has heads 0 and 1, block 1 all."""
    rows = [[[3, 0, 0], [1, 1, 2]], [[3, 1, 0], [1, 0, 2]], [[0, 1, 0], [1, 1, 2]], [[0] * 3] * 2]
    operations = np.array([rows, rows], dtype=np.int8)
    tokens, dim, width = 17, 24, 8
    skips = 4 * (3 + 1) * 2 * tokens * dim
    means = 4 * tokens * (2 * width + (12 + 11) + 3 * width + 34)
    for compensated, calibrating in ((True, False), (False, True), (True, True)):
        extras = Extras(UNEVEN, compensated, calibrating)
        of_skips, of_means = compensated * skips, calibrating * means
        down, up = of_skips + 2 * HEADER * compensated, of_means + 4 * HEADER * calibrating
        assert extras.down(operations).tolist() == [down] * 2
        assert extras.up(operations).tolist() == [up] * 2
        assert extras.resident(operations).tolist() == [of_skips + of_means] * 2
        plain = communication_of(Extras(UNEVEN, False, False), 4, 32, 32)
        more = communication_of(extras, 4, 32, 32)
        ranks = np.zeros((2, 2, 3), dtype=np.int64)
        assert (more.down(operations, None) - plain.down(operations, None)).tolist() == [down] * 2
        assert (more.up(operations, ranks) - plain.up(operations, ranks)).tolist() == [up] * 2


PARTS = {
    "base": lambda p: not p.factor,
    "trained": lambda p: p.trains,
    "whole": lambda p: p.trains and not p.factor,
    "fixed": lambda p: p.fixed,
    "loose": lambda p: not p.fixed,
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_model_are_counted(kind, part):
    arch, which = ARCHITECTURES[kind], PARTS[part]
    counts = getattr(Parts(arch), part)
    grid = np.array([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]])
    nothing = np.zeros((2, 3), dtype=int)
    assert counts.outer == added(arch, which, nothing, 1)
    for client, found in zip(grid, counts.elements(grid), strict=True):
        assert found == added(arch, which, client, 0)
    of_wire = counts.wire_bytes(grid > 0)
    outer = tensors(arch, which, np.zeros(2, dtype=bool))
    assert counts.outer_bytes == 4 * counts.outer + HEADER * outer
    for client, found in zip(grid, of_wire, strict=True):
        count = tensors(arch, which, client.any(axis=1)) - outer
        assert found == 4 * added(arch, which, client, 0) + HEADER * count
    assert counts.bytes_of_blocks.tolist() == [
        4 * int(shared) + HEADER * (tensors(arch, which, np.arange(2) == block) - outer)
        for block, shared in enumerate(arch.shared_sizes(which))
    ]


def test_factors_are_counted_per_rank():
    """By hand: rank 4; of a head, B of qkv has 3 * 8 rows, A of proj 8 and of fc2 12, 11 and 11
    columns; of a block, A of qkv has 24, and B of proj and fc2 24 each. A of qkv and proj is still.
    """
    factors, trained = Parts(ADAPTED).factors, Parts(ADAPTED).ranked
    assert factors.sliced.tolist() == [[24 + 8 + 12, 24 + 8 + 11, 24 + 8 + 11]] * 2
    assert factors.shared.tolist() == [3 * 24] * 2
    assert trained.sliced.tolist() == [[24 + 12, 24 + 11, 24 + 11]] * 2
    assert trained.shared.tolist() == [2 * 24] * 2
    ranks = np.array([[[1, 3, 0], [0, 0, 0]]])
    assert factors.elements(ranks).tolist() == [44 + 3 * 43 + 3 * 72]
    assert not Parts(UNEVEN).factors.elements(ranks).any()
    lowest = Parts(with_lora(UNEVEN, Lora(rank=1, targets=("qkv", "proj", "fc2"))))
    assert lowest.factors.sliced.tolist() == factors.sliced.tolist()
    counts = ParameterCounts.of(UNEVEN, lambda p: p.block == 1)
    assert counts.per_rank(0).sliced.tolist() == counts.sliced.tolist()


def test_parts_are_counted_once_for_equal_architectures():
    assert parts_of(UNEVEN) is parts_of(UNEVEN)
    assert parts_of(UNEVEN).arch is UNEVEN


def test_a_row_of_few_bits_has_a_scale_and_whole_bytes():
    """So does the reference: 24 columns of 4 bits are 12 bytes, 25 of 13."""
    qkv = UNEVEN.by_name["blocks.0.attn.qkv.weight"]
    bias = UNEVEN.by_name["blocks.0.attn.qkv.bias"]
    assert [bytes_of_row(qkv, bits) for bits in (4, 8, 32)] == [16, 28, 96]
    assert bytes_of_row(bias, 4) == 4


def test_a_client_that_has_a_block_in_part_gets_the_rest_of_it_alone():
    """Headers of fixed tensors come with anything new; what is shared, where nothing was there."""
    schedule = Schedule(np.full((1, 2, 3), Operation.FORWARD_ONLY, dtype=np.int8))
    costs = cost_model(ADAPTED)
    has = np.array([[[1, 1, 1], [1, 0, 1]], [[1, 1, 1], [1, 1, 1]]]) > 0
    part, whole = costs.communication.down(schedule.operations[None].repeat(2, 0), has)
    fixed = [p for p in ADAPTED.parameters if p.fixed and p.block == 1]
    new = sum(len(p.rows[1]) * p.row_width for p in fixed if p.rows)
    assert part - whole == 4 * new + HEADER * len(fixed)
