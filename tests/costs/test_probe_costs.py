"""Costs of probes, put together from what passes over the whole model cost."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.costs.probe_costs import NO_PROBES, Probes, probes_cost, round_cost, with_probes
from d2ft_fl.costs.resources import Cost
from d2ft_fl.subnets.schedule import Operation
from tests.conftest import all_of, cost_model
from tests.costs.by_parameters import ADAPTED, ARCHITECTURES, HEADER, UNEVEN, schedule_of, sent_down
from tests.costs.rounds_by_loops import pass_features
from tests.costs.test_round_seconds import MACHINE

PIXELS, KINDS = 16 * 16, ("fisher", "taylor")
# Epochs, what trades FLOPs or time for memory, and fewer tokens are for training alone.
OPTIONS = {"batch_size": 8, "checkpointing": True, "micro_batches": 3, "epochs": 2}


def model(arch, **changes):
    costs = cost_model(arch, 3, **OPTIONS)
    return replace(costs, machine=MACHINE, bits_up=8, bits_down=8, tokens=9, **changes)


def plain():
    """Of the weights themselves: without factors, and without what is for training alone."""
    return replace(cost_model(UNEVEN, 1, batch_size=8), machine=MACHINE)


def work_of(schedule, sizes, live):
    costs = plain()
    features = pass_features(costs, schedule, sizes, live)
    seconds = sum(getattr(MACHINE, name) * much for name, much in features.items())
    return round(seconds * max(MACHINE.products[0]))


def merged(kind):
    """FLOPs of A times B, of qkv, proj and fc2: of all rows, at rank 4, in two blocks."""
    return (kind == "LoRA") * 2 * 2 * 4 * 24 * (3 * 24 + 24 + 34)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scoring_takes_one_example_at_a_time(kind):
    arch, everything = ARCHITECTURES[kind], all_of(UNEVEN)
    found = probes_cost(model(arch), Probes(scored=5, kinds=KINDS))
    elements = sum(int(np.prod(p.shape)) for p in UNEVEN.parameters)
    # The gradient of the widest tensor is held while it is looked at, with what is made of it.
    memory = 4 * (elements + 2 * (3 * 24 * 24) + 5 * PIXELS)
    memory += plain().peak_bytes(everything, [1])
    assert found == Cost(
        flops=5 * plain().flops(everything, 1) + merged(kind),
        memory=memory + memory // 32,
        bytes_up=2 * (4 * 2 * 3 + HEADER),
        bytes_down=sent_down(arch, all_of(arch, slots=3), 8),
        work=5 * work_of(everything, [1], True),
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("viewed,batch", [(17, 8), (16, 8), (5, 5)])
def test_selecting_takes_a_batch_at_a_time_forward(kind, viewed, batch):
    arch, forward = ARCHITECTURES[kind], all_of(UNEVEN, Operation.FORWARD_ONLY)
    found = probes_cost(model(arch), Probes(viewed=viewed))
    elements = sum(int(np.prod(p.shape)) for p in UNEVEN.parameters)
    memory = 4 * (elements + batch * PIXELS + viewed) + plain().peak_bytes(forward, [batch])
    backward = 4 * 24 * 5  # of the classifier, which is not run
    work = viewed // batch * work_of(forward, [batch], False)
    if viewed % batch:
        work += work_of(forward, [viewed % batch], False)
    assert found == Cost(
        flops=viewed * (plain().flops(forward, 1) - backward) + merged(kind),
        memory=memory + memory // 32,
        bytes_up=0,
        bytes_down=sent_down(arch, all_of(arch, slots=3), 8),
        work=work,
    )


def test_both_take_what_each_takes_and_the_larger_peak():
    costs = model(ADAPTED)
    for viewed in (1, 16):  # at first scoring has the larger peak, and then selecting
        one, other = probes_cost(costs, Probes(4)), probes_cost(costs, Probes(viewed=viewed))
        both = probes_cost(costs, Probes(4, viewed))
        assert both.flops == one.flops + other.flops
        assert both.work == one.work + other.work
        assert both.memory == max(one.memory, other.memory)
        assert both.bytes_down == one.bytes_down == other.bytes_down


def test_dropout_is_off_and_takes_nothing():
    dropped = replace(
        UNEVEN,
        output_dropout=0.1,
        branches=tuple(replace(branch, dropout=0.1) for branch in UNEVEN.branches),
    )
    probes = Probes(3, 20, KINDS)
    assert probes_cost(model(dropped), probes) == probes_cost(model(UNEVEN), probes)


def test_a_client_that_has_something_is_sent_the_rest():
    costs, probes = model(ADAPTED), Probes(3)
    has = np.array([[1, 0, 1], [0, 0, 0]]) > 0
    nothing, something = probes_cost(costs, probes), probes_cost(costs, probes, has)
    down = sent_down(ADAPTED, all_of(ADAPTED, slots=3), 8, has)
    assert something == replace(nothing, bytes_down=down)
    assert down < nothing.bytes_down
    assert probes_cost(costs, NO_PROBES, has) == probes_cost(costs, NO_PROBES) == Cost()


def test_probes_to_try_in_turn():
    assert [bool(p) for p in (Probes(), Probes(1), Probes(viewed=1))] == [False, True, True]
    everything = Probes(4, 20, KINDS)
    assert everything.alternatives == (everything, Probes(viewed=20), Probes())
    assert Probes(viewed=20).alternatives == (Probes(viewed=20), Probes())
    assert NO_PROBES.alternatives == (Probes(),)


def test_a_round_with_probes_is_both_and_everything_comes_down_once():
    assert with_probes(Cost(1, 20, 300, 4000, 50_000), Cost(2, 10, 500, 7000, 80_000)) == Cost(
        3, 20, 800, 7000, 130_000
    )
    assert with_probes(Cost(memory=3), Cost(memory=4)).memory == 4


def test_shortcuts_of_a_client_that_has_it_all_are_not_compensated():
    costs = replace(model(ADAPTED), tokens=0, compensated=True)
    schedule, probes = schedule_of(ADAPTED, 3, 2), Probes(3, 20, KINDS)
    has = np.array([[1, 0, 1], [0, 0, 0]]) > 0
    before = probes_cost(costs, probes, has)
    for timed in (False, True):
        of_round = replace(costs, compensated=False).cost(schedule, 20, timed=timed)
        expected = with_probes(of_round, before)
        assert round_cost(costs, schedule, 20, probes, has, timed) == expected
        assert (of_round.work > 0) == timed
    alone = round_cost(costs, schedule, 20, NO_PROBES, has, False)
    assert alone == costs.cost(schedule, 20, has, False) != costs.cost(schedule, 20, None, False)
    assert round_cost(costs, schedule, 20, NO_PROBES).work == costs.cost(schedule, 20).work > 0
