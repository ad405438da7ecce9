"""Cost models under policies, and what they keep of what they have worked out."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy
from d2ft_fl.costs import cost_model as module
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.machine_speed import standard
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import all_of, build, cost_model, training_options
from tests.costs.by_parameters import (
    ADAPTED,
    ARCHITECTURES,
    UNEVEN,
    schedule_of,
    sent_down,
    sent_up,
)
from tests.costs.test_round_seconds import MACHINE

SLOW = replace(MACHINE, passes=1.0)


def test_a_policy_changes_what_it_names_alone():
    costs = cost_model(UNEVEN, 2, batch_size=8, epochs=2)
    assert costs.under(DEFAULT_POLICY) is costs
    policy = ExecutionPolicy(
        micro_batches=3, checkpointing=True, tokens=9, bits_up=4, bits_down=8, batch=2
    )
    under = costs.under(policy)
    options = replace(costs.options, micro_batches=3, checkpointing=True, batch_size=2)
    assert under == replace(costs, options=options, tokens=9, bits_up=4, bits_down=8)
    assert costs.under(ExecutionPolicy(micro_batches=2)) == replace(
        costs, options=replace(costs.options, micro_batches=2)
    )
    quantized = replace(costs, bits_up=8, bits_down=8)
    assert quantized.under(ExecutionPolicy(batch=4)).bits_up == 8
    assert quantized.under(ExecutionPolicy(bits_up=4)).bits_down == 8


def test_tokens_are_more_than_the_prefix_and_no_more_than_all():
    """A class token and 16 patches: 2 to 17."""
    costs = cost_model(UNEVEN)
    for tokens in (2, 17):
        under = costs.under(ExecutionPolicy(tokens=tokens))
        assert under.tokens == under.seen.tokens == tokens
        assert under.seen == replace(UNEVEN, tokens=tokens)
    assert costs.seen is UNEVEN
    for tokens in (1, 18):
        with pytest.raises(ConfigError, match=rf"^tokens = {tokens} .* must be 2 to 17$"):
            costs.under(ExecutionPolicy(tokens=tokens))


@pytest.mark.parametrize("which", ["compensated", "calibrating"])
def test_compensation_needs_all_tokens(which):
    costs = replace(cost_model(UNEVEN), **{which: True})
    assert costs.under(ExecutionPolicy(tokens=17)).tokens == 17
    assert costs.under(ExecutionPolicy(batch=4)).tokens == 0
    with pytest.raises(ConfigError, match=r"cannot go with tokens = 16$"):
        costs.under(ExecutionPolicy(tokens=16))
    arch = build(global_pool="avg", class_token=False)[1]
    without_prefix = replace(cost_model(arch), **{which: True})
    with pytest.raises(ConfigError, match=r"cannot go with tokens = 1$"):
        without_prefix.under(ExecutionPolicy(tokens=1))


def test_a_batch_has_an_example_for_each_slot():
    costs = cost_model(UNEVEN, 3)
    assert costs.under(ExecutionPolicy(batch=3)).options.batch_size == 3
    with pytest.raises(ConfigError, match="a batch of 2 has no example for each of 3 slots"):
        costs.under(ExecutionPolicy(batch=2))
    with pytest.raises(ConfigError, match="bits"):
        costs.under(ExecutionPolicy(bits_up=5))


def test_the_plain_model_is_of_whole_batches_of_whole_examples():
    costs = CostModel(
        UNEVEN, training_options(checkpointing=True, micro_batches=4, epochs=2), 3, "cuda",
        True, True, 9, 8, 8, MACHINE,
    )  # fmt: skip
    options = replace(costs.options, checkpointing=False, micro_batches=1)
    assert costs.plain() == CostModel(UNEVEN, options, 1, "cuda", machine=MACHINE)
    assert costs.unquantized() == replace(costs, bits_up=32, bits_down=32)
    assert costs.uncompensated == replace(costs, compensated=False)
    assert costs.uncompensated.uncompensated is costs.uncompensated
    assert costs.everything().operations.tolist() == [[[3] * 3] * 2] * 3


def test_what_100_percent_is():
    """Everything on as many examples, in whole batches; it comes down whole, for all slots."""
    costs = cost_model(ADAPTED, 3, batch_size=8, checkpointing=True, micro_batches=3, epochs=2)
    costs = replace(costs, bits_up=8, bits_down=8, tokens=9, compensated=True, machine=MACHINE)
    plain = replace(cost_model(ADAPTED, batch_size=8, epochs=2), machine=MACHINE)
    everything = all_of(ADAPTED)
    expected = replace(
        plain.cost(everything, 21), bytes_down=sent_down(ADAPTED, all_of(ADAPTED, slots=3), 32)
    )
    assert costs.full_cost(21) == expected
    assert costs.full_cost(21) is costs.full_cost(21) is not costs.full_cost(22)
    assert costs.full_cost(0) == Cost()


def test_attention_is_fused_where_the_engine_fuses_it(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "fused_attention", lambda *args: asked.append(args) or False)
    _, arch = build(num_heads=2, attn_drop_rate=0.25)
    costs = CostModel(arch, training_options(), 1, "cuda")
    assert not costs.fused
    assert not costs.round_flops.fused
    assert asked == [("cuda", 12, 0.25)] * 2


def test_seconds_are_counted_on_the_machine_that_is_given():
    costs = cost_model(UNEVEN, precision="bf16")
    assert costs.round_seconds.machine == standard("bf16")
    assert costs.on(None) is costs
    assert costs.on(MACHINE) == replace(costs, machine=MACHINE)
    assert costs.on(MACHINE).round_seconds.machine is MACHINE
    assert costs.on(MACHINE).on(replace(MACHINE)).machine is MACHINE
    assert costs.on(MACHINE).on(SLOW).machine is SLOW


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_cost_is_its_parts(kind):
    arch = ARCHITECTURES[kind]
    costs = replace(cost_model(arch, 3, batch_size=8), machine=MACHINE)
    schedule = schedule_of(arch, 3, 2)
    operations, count = schedule.operations[None], np.array([21])
    ranks = None if schedule.ranks is None else schedule.ranks[None]
    cost = costs.cost(schedule, 21)
    assert cost == Cost(
        costs.flops(schedule, 21),
        costs.memory(schedule, 21),
        sent_up(arch, schedule, 32),
        sent_down(arch, schedule, 32),
        int(costs.work(operations, count, ranks)[0]),
    )
    assert costs.cost(schedule, 21, timed=False) == replace(cost, work=0)
    assert costs.cost(schedule, 21) is cost  # worked out once
    has = np.array([[1, 0, 0], [0, 1, 1]]) > 0
    down = sent_down(arch, schedule, 32, has)
    assert costs.cost(schedule, 21, has) == replace(cost, bytes_down=down)
    assert costs.cost(schedule, 20) != cost
    assert costs.cost(schedule, 0) == Cost()
    other = Schedule(schedule.operations[:, ::-1].copy(), schedule.ranks)
    assert costs.cost(other, 21).flops == costs.flops(other, 21)
    if arch.rank:
        all_ranks = Schedule(schedule.operations)
        assert costs.cost(all_ranks, 21).bytes_up == sent_up(arch, all_ranks, 32)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_costs_of_many_are_those_of_each(kind, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    arch = ARCHITECTURES[kind]
    costs = cost_model(arch, 3, batch_size=8)
    schedules = [schedule_of(arch, 3, seed) for seed in range(4)]
    schedules.append(replace(schedules[0], operations=0 * schedules[0].operations))
    examples = [5, 0, 9, 8, 3]
    operations = np.stack([s.operations for s in schedules])
    ranks = np.stack([s.ranks for s in schedules]) if arch.rank else None
    has = np.random.default_rng(0).integers(0, 2, (5, 2, 3)) > 0
    for cached in (None, has):
        found = costs.costs(operations, np.array(examples), cached, ranks)
        assert found.dtype == np.int64
        for index, row in enumerate(found.tolist()):
            cost = costs.cost(
                schedules[index], examples[index], None if cached is None else has[index]
            )
            assert row == cost.vector().tolist()
            assert any(row) == (examples[index] > 0 and not schedules[index].sits_out)


def test_as_many_costs_are_kept_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(module, "MOST_KNOWN", 2)
    costs, worked_out = cost_model(UNEVEN), []

    def of(key):
        return costs.known(key, lambda: worked_out.append(key) or Cost(flops=key))

    assert [of(key).flops for key in (1, 2, 1, 2, 3, 3, 1)] == [1, 2, 1, 2, 3, 3, 1]
    assert worked_out == [1, 2, 3, 1]  # the third dropped both others


def test_micro_batches_of_a_schedule_leave_out_slots_that_run_nothing():
    operations = np.zeros((3, 2, 3), dtype=np.int8)
    operations[0, 0, 0] = operations[2, 1, 1] = Operation.FORWARD_ONLY
    costs = cost_model(UNEVEN, 3, micro_batches=2)
    assert costs.micro_batches(Schedule(operations), 12) == [[4, 0, 0], [0, 0, 4]]
    assert costs.slot_totals(20) == [6 + 2, 5 + 1, 5 + 1]  # of a batch of 16, and of one of 4


def test_what_is_saved_is_that_of_branches_and_of_the_outer_part():
    costs = cost_model(UNEVEN, 2, precision="bf16")
    schedule = schedule_of(UNEVEN, 2, 2)
    sizes, none = [3, 2], np.zeros((1, 2, 3), dtype=np.int64)
    parts = costs.round_memory.micro_batches(schedule.operations[None], np.array([sizes]), none)
    outer, classifier = costs.activations.outer, 2 * 24 * 5  # its weight in bfloat16
    saved = int(parts.saved.sum()) + 5 * (outer + 4 * 5) + classifier  # with 5 scores
    assert costs.saved_bytes(schedule, sizes) == saved
    assert costs.peak_bytes(schedule, sizes) == parts.peak()[0]
