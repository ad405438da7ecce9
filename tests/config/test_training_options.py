"""Learning rates over the rounds, and what a policy makes of the options of training."""

import math
from dataclasses import asdict

import pytest

from d2ft_fl.config.choices import DOWNLOAD_BITS, PLAIN_BITS, UPLOAD_BITS
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import ExecutionPolicy, TrainingOptions


@pytest.mark.parametrize(
    "schedule,wanted",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_rates_of_four_rounds(schedule, wanted):
    config = RunConfig(rounds=4, lr_schedule=schedule, lr=3.0)
    factors = [config.rate_factor(number) for number in (1, 2, 3, 4)]
    assert factors == pytest.approx(wanted)
    options = TrainingOptions.of(config)
    assert [options.at(factor).lr for factor in factors] == pytest.approx([3 * w for w in wanted])


def test_a_policys_rate_is_of_all_but_the_classifier():
    options = TrainingOptions.of(RunConfig(lr=3.0, head_lr=5.0, lora_lr=7.0))
    at = options.at(0.5, 0.1)
    assert (at.lr, at.head_lr, at.lora_lr) == pytest.approx((0.15, 2.5, 0.35))
    plain = options.at(0.5)
    assert (plain.lr, plain.head_lr, plain.lora_lr) == (1.5, 2.5, 3.5)


def test_a_policy_replaces_what_it_names_and_nothing_else():
    options = TrainingOptions.of(RunConfig(batch_size=16, micro_batches=2, checkpointing=True))
    assert options.under(ExecutionPolicy()) == options
    found = options.under(ExecutionPolicy(batch=4, micro_batches=1, checkpointing=False))
    assert (found.batch_size, found.micro_batches, found.checkpointing) == (4, 1, False)
    assert found.lr == options.lr


def test_without_what_trades_time_for_memory_all_else_stays():
    options = TrainingOptions.of(RunConfig(micro_batches=3, checkpointing=True, batch_size=5))
    assert options.plain() == TrainingOptions.of(RunConfig(batch_size=5))
    plain = options.plain()
    assert (plain.micro_batches, plain.checkpointing) == (1, False)


def test_a_policy_is_as_configured_unless_it_says_otherwise():
    counts = {"in_turn": False, "rate": 1.0, "weight": 1.0, "step": 1.0}
    costs = ("micro_batches", "checkpointing", "tokens", "bits_up", "bits_down", "batch")
    assert asdict(ExecutionPolicy()) == counts | dict.fromkeys(costs)
    policy = ExecutionPolicy(
        2, True, 9, 8, 8, in_turn=True, rate=0.5, weight=3.0, step=4.0, batch=5
    )
    priced = {"micro_batches": 2, "checkpointing": True, "tokens": 9, "bits_up": 8, "bits_down": 8}
    assert asdict(policy.priced) == counts | priced | {"batch": 5}


def test_numbers_travel_in_few_bits_or_as_they_are():
    assert (UPLOAD_BITS, DOWNLOAD_BITS, PLAIN_BITS) == ((32, 8, 4), (32, 8), 32)
    for up, down in ((4, 8), (8, 32), (32, 32)):
        policy = ExecutionPolicy(bits_up=up, bits_down=down)
        assert policy.priced == policy
