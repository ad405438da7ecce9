"""Peak memory of rounds, against a loop over their batches and micro-batches."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs import round_memory
from d2ft_fl.costs.round_memory import RoundMemory, active_slots, sizes_of_slots
from d2ft_fl.subnets.schedule import Operation, Schedule, micro_batches, slot_sizes
from tests.conftest import all_of, cost_model
from tests.costs.by_parameters import ARCHITECTURES, UNEVEN, held, schedule_of

MOMENTS = {"adamw": 2, "sgd": 1}
PIXELS = 16 * 16


def peak_of_round(costs, schedule, examples, parts=None):
    """Batch by batch, margin included."""
    options, arch = costs.options, costs.arch
    gradient = 1 + (options.proximal > 0)  # and FedProx's start
    state = gradient + MOMENTS[options.optimizer]
    bits = costs.bits_up, costs.bits_down
    before, after = (held(arch, schedule, copies, *bits) for copies in (gradient, state))
    peak, known = after, {}
    for epoch in range(options.epochs):
        for start in range(0, examples, options.batch_size):
            batch = min(options.batch_size, examples - start)
            sizes = slot_sizes(batch, costs.slots)
            active = schedule.active.tolist()
            cut = micro_batches(sizes, active, parts or options.micro_batches)
            run = sum(map(sum, cut))
            images = batch + (run if run < batch else 0)  # those that run are put together
            for part in map(tuple, cut):
                known[part] = known.get(part) or costs.peak_bytes(schedule, part)
            worst = max((known[tuple(part)] for part in cut), default=0)
            resident = before if epoch == start == 0 else after
            peak = max(peak, resident + 4 * PIXELS * images + worst)
    return peak + peak // 32


CASES = [
    (1, {}),
    (1, {"micro_batches": 3, "optimizer": "sgd", "epochs": 2}),
    (1, {"precision": "bf16", "micro_batches": 2, "proximal": 0.1}),
    (2, {"micro_batches": 3, "precision": "bf16"}),
    (2, {"micro_batches": 4}),
    (3, {"micro_batches": 4}),
    (3, {"micro_batches": 2, "checkpointing": True, "optimizer": "sgd", "bits_up": 4}),
    (4, {"precision": "bf16", "epochs": 2, "bits_up": 8, "bits_down": 8, "micro_batches": 5}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slots,options", CASES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_memory_of_rounds_is_that_of_their_worst_micro_batch(kind, slots, options, seed):
    """Of clients together, each with its own examples; cut as configured, or as each is told."""
    bits = {name: options[name] for name in ("bits_up", "bits_down") if name in options}
    rest = {name: value for name, value in options.items() if name not in bits}
    arch = ARCHITECTURES[kind]
    costs = replace(cost_model(arch, slots, batch_size=6, **rest), **bits)
    schedules = [schedule_of(arch, slots, number) for number in range(3 * seed, 3 * seed + 3)]
    examples, parts = [[(1, 11, 23), (3, 2, 4)], [(5, 12, 7), (1, 4, 3)], [(6, 14, 9), (2, 5, 1)]][
        seed
    ]
    ranks = np.stack([s.ranks for s in schedules]) if arch.rank else None
    operations = np.stack([s.operations for s in schedules])
    for counts in (None, parts):
        told = None if counts is None else np.array(counts)
        found = costs.memories(operations, np.array(examples), ranks, told).tolist()
        cases = zip(schedules, examples, counts or (None,) * 3, strict=True)
        assert found == [peak_of_round(costs, *case) for case in cases]
    assert costs.memory(schedules[0], examples[0]) == peak_of_round(
        costs, schedules[0], examples[0]
    )


def test_one_client_of_many_may_be_cut():
    """Where some run a batch whole: the smaller last batch of the other still counts."""
    operations = np.zeros((5, 2, 3), dtype=np.int8)
    operations[:, -1, 0], operations[1] = Operation.FORWARD_ONLY, Operation.FULL
    costs, schedule = cost_model(UNEVEN, 5, batch_size=11), Schedule(operations)
    both = np.stack([operations] * 2)
    found = costs.memories(both, np.array([32, 32]), None, np.array([1, 6])).tolist()
    assert found == [peak_of_round(costs, schedule, 32, parts) for parts in (1, 6)]


def test_before_the_first_step_there_is_no_state_of_an_optimiser():
    """By hand: one head of block 1, of 24 columns and 3 * 8 + 8 + 2 * 12 rows, with 3 * 8 + 12
    biases; what the block shares, and what is of no block."""
    operations = np.zeros((1, 1, 2, 3), dtype=np.int8)
    operations[0, 0, 1, 0] = Operation.FULL
    head = 24 * (24 + 8 + 12 + 12) + 24 + 12
    shared = 2 * (2 * 24) + 24 + 24 + 2 * 24  # two norms, biases of products out, two scales
    final = 2 * 24 + 24 * 5 + 5
    embedding = 24 * (16 + 1 + 17 + 1)  # of patches and their bias, places, and the class token
    ranks = np.zeros((1, 2, 3), dtype=np.int64)
    for optimizer, moments in (("adamw", 2), ("sgd", 1)):
        of_round = cost_model(UNEVEN, optimizer=optimizer).round_memory
        for later, copies in ((False, 1), (True, 1 + moments)):
            found = of_round.resident(operations, ranks, moments=later)
            expected = (1 + copies) * (head + shared + final) + embedding
            assert found.tolist() == [4 * expected]
            assert of_round.copies(later) == copies
        assert of_round.resident(operations, ranks).tolist() == found.tolist()
    assert cost_model(UNEVEN, proximal=0.1).round_memory.copies(False) == 2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_resident_is_each_parameter_that_is_there_and_copies_of_what_trains(kind):
    arch = ARCHITECTURES[kind]
    for bits in ((32, 32), (8, 32), (4, 8)):
        costs = replace(cost_model(arch, 2, optimizer="sgd"), bits_up=bits[0], bits_down=bits[1])
        for seed in range(4):
            schedule = schedule_of(arch, 2, seed)
            operations = schedule.operations[None]
            ranks = costs.ranks(
                operations, None if schedule.ranks is None else schedule.ranks[None]
            )
            found = [
                costs.round_memory.resident(operations, ranks, moments).item()
                for moments in (False, True)
            ]
            assert found == [held(arch, schedule, copies, *bits) for copies in (1, 2)]


def test_the_first_batch_and_the_largest_later_one():
    for epochs, extremes in ((1, [(5, 0), (8, 0), (8, 1), (8, 8)]), (2, [(5, 5)] + [(8, 8)] * 3)):
        of_round = cost_model(UNEVEN, batch_size=8, epochs=epochs).round_memory
        assert [of_round.batch_extremes(count) for count in (5, 8, 9, 30)] == extremes


def test_compensation_is_resident():
    costs = cost_model(UNEVEN)
    compensated = replace(costs, compensated=True, calibrating=True)
    operations = all_of(UNEVEN).operations.copy()
    operations[0, 0, 1] = Operation.SHORTCUT
    ranks = np.zeros((1, 2, 3), dtype=np.int64)
    more, plain = (
        model.round_memory.resident(operations[None], ranks) for model in (compensated, costs)
    )
    # What is skipped once in two branches of a block, and means of 5 heads: 11 hidden units less.
    elements = 2 * 17 * 24 + 17 * (5 * 8 + 2 * 34 - 11)
    assert (more - plain).tolist() == [4 * elements]


def test_examples_of_slots_and_the_slots_that_run():
    assert sizes_of_slots(np.array([0, 2, 7, 9]), 3).tolist() == [
        slot_sizes(batch, 3) for batch in (0, 2, 7, 9)
    ]
    operations = np.zeros((2, 3, 2, 3), dtype=np.int8)
    operations[0, 1, 1, 2] = operations[1, 2, 0, 0] = Operation.FORWARD_ONLY
    assert active_slots(operations).tolist() == [[False, True, False], [False, False, True]]


def test_memory_of_an_example_is_worked_out_once_for_as_many_schedules_as_are_kept(monkeypatch):
    monkeypatch.setattr(round_memory, "MOST_KNOWN", 4)
    costs, worked_out = cost_model(UNEVEN), []
    tables = [schedule_of(UNEVEN, 1, seed).operations for seed in range(4)]
    expected = [costs.peak_bytes(Schedule(table), [1]) for table in tables]
    assert len(set(expected)) > 2
    whole = RoundMemory.micro_batches

    def noted(self, operations, sizes, ranks):
        worked_out.append(len(operations))
        return whole(self, operations, sizes, ranks)

    monkeypatch.setattr(RoundMemory, "micro_batches", noted)
    for asked, new in (((0, 1, 0), [2]), ((1,), []), ((2, 0), [1]), ((3, 0), [2]), ((0,), [])):
        worked_out.clear()
        operations = np.stack([tables[index] for index in asked])
        ranks = np.zeros((len(asked), 2, 3), dtype=np.int64)
        found = costs.round_memory.in_one_slot(operations, np.ones(len(asked), dtype=int), ranks)
        assert found.tolist() == [expected[index] for index in asked]
        assert worked_out == new  # the fifth at once would be too many: all others are dropped


def test_under_lora_the_same_operations_at_other_ranks_take_other_memory():
    costs = cost_model(ARCHITECTURES["LoRA"])
    operations = all_of(costs.arch).operations[None]
    low, high = np.ones((1, 2, 3), dtype=np.int64), np.full((1, 2, 3), 4)
    assert costs.memories(operations, np.array([8]), low) < costs.memories(
        operations, np.array([8]), high
    )


def test_fewer_tokens_take_less_but_all_are_embedded():
    costs = cost_model(UNEVEN)
    fewer = costs.under(ExecutionPolicy(tokens=9))
    assert (fewer.activations.stream, fewer.activations.embedded) == (4 * 9 * 24, 4 * 17 * 24)
