"""Seconds of rounds, against hand arithmetic and against FLOPs where those must tell."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.costs.machine_speed import MachineSpeed, standard
from d2ft_fl.costs.seconds import FEATURES
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import all_of, build, cost_model, random_schedule

ARCH = build()[1]  # 3 blocks of 4 heads, 17 tokens, width 24
RATE = 1e9
FLAT = replace(  # multiplies and attends at one speed, and all else takes no time
    standard(),
    products=((RATE,) * 30,) * 3,
    attention=((RATE,) * 8,) * 2,
    **{name: float(index < 3) for index, name in enumerate(FEATURES)},
    message=0.0,
)


def only(name):
    """A machine on which nothing takes time but one feature, a second each."""
    return replace(FLAT, **{feature: float(feature == name) for feature in FEATURES})


def seconds(schedule, examples, machine, **options):
    costs = replace(cost_model(ARCH, schedule.slots, **options), machine=machine)
    return costs.work(schedule.operations[None], np.array([examples]))[0] / machine.peak


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_on_a_machine_of_one_speed_time_is_flops_over_speed(slots, seed, checkpointing, parts):
    schedule = random_schedule(ARCH, slots, seed)
    options = {"batch_size": 8, "checkpointing": checkpointing, "micro_batches": parts}
    flops = cost_model(ARCH, slots, **options).flops(schedule, 21)
    assert seconds(schedule, 21, FLAT, **options) == pytest.approx(flops / RATE, rel=1e-6)


@pytest.mark.parametrize(
    "feature,expected",
    [
        ("passes", 3 * 2),  # 21 examples: batches of 8, 8, 5, each in two passes
        ("step", 3),
        ("branch", 3 * 2 * 6),  # 2 branches of 3 blocks
        ("mixed", 0),
        ("silent", 0),
        ("group", 0),
        ("start", 3 + 1),
        ("coded", 0),
    ],
)
def test_what_a_round_of_everything_consists_of(feature, expected):
    options = {"batch_size": 8, "micro_batches": 2}
    found = seconds(all_of(ARCH), 21, only(feature), **options)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_last_batch_of_one_example_is_a_pass_and_a_step():
    for feature in ("passes", "step"):
        assert seconds(all_of(ARCH), 17, only(feature), batch_size=8) == pytest.approx(3)


@pytest.mark.parametrize("epochs", [1, 3])
def test_changes_are_quantized_and_an_optimiser_made_once_a_round(epochs):
    rows = [[0, 0, 0, 0], [3, 1, 0, 0], [2, 3, 3, 0]]
    schedule = Schedule(np.array([rows], dtype=np.int8))
    numbers = 3 * (4 * 6 * 24 + 2 * 24 * 24)  # of 3 heads: 6 of 24 columns each, 24 hidden units
    for feature, expected in (("start", 2 + 1), ("coded", numbers)):
        costs = cost_model(ARCH, 1, epochs=epochs)
        costs = replace(costs, machine=only(feature), bits_up=8)
        work = costs.work(schedule.operations[None], np.array([21]))[0]
        assert work / costs.machine.peak == pytest.approx(expected)


@pytest.mark.parametrize(
    "rows,feature,expected",
    [
        # Nothing trains below block 1: there FROZEN is FORWARD_ONLY, and its branches are silent.
        ([[2, 2, 2, 2], [3, 2, 1, 0], [3, 3, 3, 3]], "silent", 2),
        ([[2, 2, 2, 2], [3, 2, 1, 0], [3, 3, 3, 3]], "branch", 4),
        ([[2, 2, 2, 2], [3, 2, 1, 0], [3, 3, 3, 3]], "mixed", 2),
        ([[2, 2, 2, 2], [3, 2, 1, 0], [3, 3, 3, 3]], "group", 2),
        ([[0, 0, 0, 0], [3, 2, 2, 0], [3, 0, 0, 0]], "branch", 4),
        ([[0, 0, 0, 0], [3, 2, 2, 0], [3, 0, 0, 0]], "mixed", 2),  # FULL beside FROZEN: one group
        ([[0, 0, 0, 0], [3, 2, 2, 0], [3, 0, 0, 0]], "group", 0),
    ],
)
def test_branches_and_groups_of_one_pass(rows, feature, expected):
    schedule = Schedule(np.array([rows], dtype=np.int8))
    assert seconds(schedule, 8, only(feature), batch_size=8) == pytest.approx(expected)


def test_neighbouring_slots_that_do_the_same_are_one_run():
    same, other = all_of(ARCH, slots=2).operations, all_of(ARCH, slots=2).operations.copy()
    other[1, 0] = Operation.SHORTCUT, Operation.FULL, Operation.FULL, Operation.FULL
    for operations, branches in ((same, 6), (other, 8)):
        found = seconds(Schedule(operations), 8, only("branch"), batch_size=8)
        assert found == pytest.approx(branches)


def test_epochs_and_whole_batches_add_up():
    for machine in (standard(), standard("fp32", 2)):
        once = 2 * machine.message + (1 + ARCH.blocks) * machine.start
        one = seconds(all_of(ARCH), 8, machine, batch_size=8) - once
        four = seconds(all_of(ARCH), 32, machine, batch_size=8) - once
        twice = seconds(all_of(ARCH), 8, machine, batch_size=8, epochs=2) - once
        assert four == pytest.approx(4 * one, rel=1e-6)
        assert twice == pytest.approx(2 * one, rel=1e-6)


def test_small_passes_take_longer_at_equal_flops():
    whole = seconds(all_of(ARCH), 64, standard(), batch_size=16)
    parts = [
        seconds(all_of(ARCH), 64, standard(), batch_size=16, micro_batches=count)
        for count in (2, 4, 16)
    ]
    assert [whole, *parts] == sorted([whole, *parts])


def test_a_rate_between_two_that_were_measured_is_between_them():
    machine = replace(standard(), products=(tuple(float(1 + i) for i in range(30)),) * 3)
    # rows 16 and 64, widths 32 and 64: 1, 2 and 7, 8 FLOP/s
    at = machine.product_seconds(0, np.array([16, 64, 32, 1, 1e9]), np.array([32, 64, 32, 1, 1e9]))
    assert at == pytest.approx([1, 1 / 8, 7**-0.5, 1, 1 / 30])


def test_the_bundled_curves_are_complete_and_say_where_they_are_from():
    for precision in ("fp32", "bf16"):
        for threads in (1, 2):
            curve = standard(precision, threads)
            assert (curve.precision, curve.threads) == (precision, threads)
            assert "torch" in curve.source
            assert MachineSpeed.from_json(curve.to_json(), "x") == curve


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (64.0, 16.0)},
        {"products": ((1.0,) * 29,) * 3},
        {"products": ((0.0,) * 30,) * 3},
        {"branch": -1.0},
        {"unknown": 1},
    ],
)
def test_a_wrong_curve_is_refused_in_one_line(change):
    with pytest.raises(ConfigError, match=r"^curve is not .*measure it again$"):
        MachineSpeed.from_json(standard().to_json() | change, "curve")
