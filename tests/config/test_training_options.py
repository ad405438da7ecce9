"""Learning rates over the rounds, and what a policy makes of the options of training."""

import math

import pytest

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
    config = RunConfig(rounds=4, lr_schedule=schedule)
    assert [config.rate_factor(number) for number in (1, 2, 3, 4)] == pytest.approx(wanted)


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
