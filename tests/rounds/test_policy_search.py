"""Which way clients go under budgets, against what each budget leaves to choose."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.budgets.kept_speeds import keep, kept, software
from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy
from d2ft_fl.costs.machine_speed import standard
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.engine.trainer import Stepper
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.planning.planner import Planner
from d2ft_fl.planning.utility import Utility, of_batch
from d2ft_fl.rounds.context import Round, plan_round
from d2ft_fl.rounds.policy_choice import TOLERANCE, fastest
from d2ft_fl.rounds.policy_search import PASSING, Search
from d2ft_fl.runtime.in_process import run_local
from tests.strategies.test_strategies import ARCH, FORWARD, FULL, SKIP, round_of

QUIET = {"backward_score": "uniform", "forward_score": "uniform", "exploration": 0.0}


def planned(budget, **options):
    """The one client's assignment, and the plan that it is of."""
    found = plan_round(*round_of("d2ft", [budget], **{**QUIET, **options}))
    return found.assignments[0], found


def test_without_budgets_everything_trains_as_configured():
    a, _ = planned({})
    assert (a.schedule.operations == FULL).all()
    assert a.examples == 20
    assert a.policy == ExecutionPolicy(in_turn=True)


def test_memory_that_suffices_in_smaller_passes_loses_nothing_and_no_time():
    """The baseline `accumulate` trains all in the fewest passes: nothing chosen is slower."""
    (other,) = plan_round(*round_of("accumulate", [{"memory": "60 %"}])).assignments
    a, plan = planned({"memory": "60 %"})
    assert a.examples == 20
    assert other.policy.micro_batches > 1
    assert a.cost.work <= other.cost.work
    uniform = np.ones((ARCH.blocks, ARCH.heads))
    judge = Utility(uniform, uniform)
    assert worth_of(judge, a, plan) >= worth_of(judge, other, plan) - TOLERANCE


@pytest.mark.parametrize("share,bits", [("100 %", None), ("40 %", 8), ("28 %", 4)])
def test_bytes_up_are_saved_by_bits_first(share, bits):
    a, _ = planned({"bytes-up": share})
    assert (a.policy.bits_up, a.policy.bits_down) == (bits, None)
    assert (a.schedule.operations == FULL).all()


@pytest.mark.parametrize("share,expected", [(1.0, 1.0), (0.25, 2**0.5), (0.1, 1.5)])
def test_the_server_steps_further_along_what_few_examples_changed(share, expected):
    a, _ = planned({"flops": f"{100 * share} %"}, examples=1000)
    assert a.policy.step == pytest.approx(min(1.5, (a.examples / 1000) ** -0.25))
    assert a.policy.weight == pytest.approx(1000 / a.examples)  # all that it has counts
    assert a.policy.step == pytest.approx(expected, rel=0.12)  # a few heads less, for more examples


@pytest.mark.parametrize(
    "batch,share,slots,smaller",
    [(4, 100, 1, False), (4, 25, 1, True), (16, 25, 1, True), (4, 25, 4, False)],
)
def test_fewer_examples_come_in_smaller_batches(batch, share, slots, smaller):
    """As many more steps as it takes for all but a little of what they are worth."""
    a, _ = planned({"flops": f"{share} %"}, examples=1000, batch_size=batch, slots=slots)
    assert bool(a.policy.batch) == smaller
    assert a.policy.micro_batches is None
    if smaller:
        trained = a.examples / 1000
        assert of_batch(a.policy.batch, batch, trained) >= 1 - TOLERANCE
        assert of_batch(a.policy.batch + 1, batch, trained) < 1 - TOLERANCE + 1e-3
    fixed, _ = planned(
        {"flops": f"{share} %"},
        examples=1000,
        batch_size=batch,
        slots=slots,
        policy_batch=False,
    )
    assert fixed.policy.batch is None


@pytest.mark.parametrize("slots", [1, 2])
def test_a_smaller_batch_is_trained_and_charged_as_one(quick, tmp_path, monkeypatch, slots):
    """FLOPs exactly, memory within what was planned, and as many steps as batches."""
    steps, stepped = [], Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda *given: (steps.append(1), stepped(*given))[1])
    config = quick(rounds=2, verify_costs=True, batch_size=8, slots=slots)
    devices = tmp_path / "short.toml"
    devices.write_text('mix = ["a"]\n[classes.a]\nflops = "30 %"\nmemory = "60 %"\n')
    run_local(replace(config, budgets=str(devices)), report=False)
    lines = (Path(config.run_folder) / "clients.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert not row["fault"]
        assert 3 < row["policy"]["batch"] < 8
        assert row["used"]["flops"] == row["predicted"]["flops"]
        assert row["used"]["memory"] <= row["predicted"]["memory"]
    assert len(steps) == sum(math.ceil(row["examples"] / row["policy"]["batch"]) for row in rows)


def test_looking_at_examples_comes_in_the_batches_of_training(quick, monkeypatch):
    """What a look at all examples holds is what was planned, whatever the batch."""

    def schedule(round_number):
        everything = round_number.everything()
        return [
            round_number.assign(c, everything, policy=ExecutionPolicy(batch=2))
            for c in round_number.clients
        ]

    monkeypatch.setattr("d2ft_fl.strategies.fedavg.schedule", schedule)
    config = quick(strategy="fedavg", rounds=1, verify_costs=True, batch_size=32)
    config = replace(config, data_share=0.5, data_selection="entropy")
    run_local(config, report=False)
    lines = (Path(config.run_folder) / "clients.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert not row["fault"]
        assert row["viewed"]
        assert row["used"]["flops"] == row["predicted"]["flops"]
        assert row["used"]["memory"] <= row["predicted"]["memory"]


def test_bytes_down_are_saved_by_bits_both_ways_and_nothing_is_skipped():
    a, _ = planned({"bytes-down": "50 %"})
    assert (a.policy.bits_up, a.policy.bits_down) == (8, 8)
    assert (a.schedule.operations == FULL).all()


def test_few_bytes_down_can_need_fewer_heads_besides():
    a, _ = planned({"bytes-down": "35 %"})
    assert a.policy.bits_down == 8
    assert 0 < (a.schedule.operations == SKIP).sum() < a.schedule.operations.size / 2


def test_compute_is_spent_on_examples_to_the_last():
    a, plan = planned({"flops": "50 %"}, examples=200)
    assert 0 < a.examples < 200
    assert not (a.schedule.operations == SKIP).any()
    probes = (a.schedule.operations[0] > FORWARD).all(axis=1).astype(int)
    assert (np.diff(probes) >= 0).all()  # cut only below all that trains
    federation, state, _ = round_of("d2ft", [{"flops": "50 %"}], examples=200, **QUIET)
    (client,) = plan.clients
    more = Round(federation, state, [client]).assign(
        client, a.schedule, a.examples + 1, a.policy, a.probes
    )
    assert not client.affords(more.cost)


@pytest.mark.parametrize("memory,up", [("100 %", "30 %"), ("105 %", "40 %")])
def test_memory_for_where_a_coded_change_began_is_found_in_smaller_passes(memory, up):
    a, plan = planned({"memory": memory, "bytes-up": up}, batch_size=4)
    assert a.policy.bits_up in (8, 4)
    uniform = np.ones((ARCH.blocks, ARCH.heads))
    assert worth_of(Utility(uniform, uniform), a, plan) >= 0.993 - 2 * TOLERANCE


@pytest.mark.parametrize(
    "slow,bits", [("up", (8, None)), ("down", (8, 8)), ("neither", (None, None))]
)
def test_a_deadline_is_met_in_no_fewer_bits_than_it_takes(slow, bits):
    budget = {"speed": "100 GFLOP/s", "deadline": "1 s"}
    if slow != "neither":
        budget[f"bandwidth-{slow}"] = "0.8 Mbit/s"  # everything takes 1.3 s
    a, plan = planned(budget)
    assert (a.policy.bits_up, a.policy.bits_down) == bits
    assert plan.clients[0].on_time(a.cost)


def test_a_deadline_is_kept_by_fewer_examples_and_bits():
    a, plan = planned(
        {"speed": "1 GFLOP/s", "bandwidth-up": "1 Mbit/s", "deadline": "10 s"}, examples=200
    )
    assert not a.schedule.sits_out
    assert a.policy.bits_up in (8, 4)
    assert plan.clients[0].on_time(a.cost)


def test_a_budget_that_affords_nothing_sits_out():
    a, _ = planned({"memory": "1 KiB"})
    assert a.schedule.sits_out


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "flops": st.integers(3, 100).map("{} %".format),
            "memory": st.integers(10, 100).map("{} %".format),
            "bytes-up": st.integers(1, 100).map("{} %".format),
            "bytes-down": st.integers(10, 100).map("{} %".format),
        },
    ),
    st.integers(0, 1000),
)
def test_no_plain_plan_is_worth_more(budget, seed):
    """What the knapsack finds for the configured way is among what is searched."""
    federation, state, reports = round_of("d2ft", [budget], **QUIET)
    round = Round(federation, state, federation.participants(reports, state))
    scores = np.random.default_rng(seed).random((ARCH.blocks, ARCH.heads)) + 0.1
    judge = Utility(scores, scores)
    (found,) = Search(round, scores, scores, scores).best()
    best = worth_of(judge, found, round)
    for weights in (PASSING, (1.0, 0.0)):
        planner = federation.planner_under(state, DEFAULT_POLICY, *weights)
        (plain,) = planner.plan(round.clients, scores, scores, round.number)
        plain_worth = worth_of(judge, plain, round)
        # Smaller passes and fewer bits are not worth quite the same as more memory and bytes.
        assert best >= plain_worth * 0.99 - 1e-9
    over = found.cost.vector() > round.clients[0].capacity
    assert not over.any(), [r for r, o in zip(RESOURCES, over, strict=True) if o]


@pytest.mark.parametrize(
    "budget",
    [
        {"flops": "60 %", "memory": "50 %"},
        {"flops": "15 %", "bytes-up": "20 %"},
        {"flops": "40 %", "bytes-up": "30 %", "bytes-down": "40 %"},
    ],
)
def test_what_can_not_win_is_not_planned_which_changes_nothing(budget, monkeypatch):
    counted, plan = [], Planner.plan

    def counting(self, clients, *args, **options):
        counted.append(len(clients))
        return plan(self, clients, *args, **options)

    monkeypatch.setattr(Planner, "plan", counting)
    some, _ = planned(budget, examples=200)
    few = sum(counted)
    monkeypatch.setattr(Search, "_may_win", lambda *_: True)
    every, _ = planned(budget, examples=200)
    assert (some.schedule.operations == every.schedule.operations).all()
    assert (some.policy, some.examples, some.cost) == (every.policy, every.examples, every.cost)
    assert few < sum(counted) - few


def worth_of(judge, a, round_number, examples=20):
    if a.schedule.sits_out:
        return 0.0
    count = round_number.clients[0].examples if a.examples is None else a.examples
    operations = a.schedule.operations[None]
    ranks = np.ones((1, ARCH.blocks, ARCH.heads))
    bits = a.policy.bits_up or 32, a.policy.bits_down or 32
    return float(judge.of(operations, ranks, np.array([count / examples]), [bits])[0])


def test_clients_that_chose_their_bits_send_and_get_what_was_planned(quick, tmp_path):
    config = quick(rounds=2, budgets="", verify_costs=True)
    devices = tmp_path / "narrow.toml"
    devices.write_text(
        'mix = ["a", "b"]\n[classes.a]\nbytes-down = "50 %"\n[classes.b]\nbytes-up = "30 %"\n'
    )
    run_local(replace(config, budgets=str(devices)), report=False)
    folder = Path(config.run_folder)
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    assert {(row["policy"]["bits_up"], row["policy"]["bits_down"]) for row in rows} >= {(8, 8)}
    for row in rows:
        assert not row["fault"]
        for policy in ("bytes_up", "bytes_down"):
            assert 0 <= row["predicted"][policy] - row["used"][policy] <= 16_000
            assert row["allowed"][policy] is None or row["used"][policy] <= row["allowed"][policy]


def test_a_batch_has_an_example_for_each_slot():
    federation, state, _ = round_of("d2ft", [{}], **QUIET, batch_size=4, slots=4)
    with pytest.raises(ConfigError, match="a batch of 3 has no example for each of 4 slots"):
        federation.costs_of(state, ExecutionPolicy(batch=3))


@pytest.mark.parametrize("wrong", [{"step": 2.5}, {"step": float("nan")}, {"weight": 0.0}])
def test_strategies_cannot_have_a_change_count_for_anything(monkeypatch, wrong):
    def schedule(round_number):
        return [
            replace(round_number.sit_out(c), policy=ExecutionPolicy(**wrong))
            for c in round_number.clients
        ]

    monkeypatch.setattr("d2ft_fl.strategies.d2ft.schedule", schedule)
    (name,) = wrong
    with pytest.raises(RunError, match=f"gives client 0 a {name} of .* must be above 0"):
        planned({})


def test_with_three_operations_skipping_is_left_to_tight_budgets():
    a, _ = planned({"flops": "60 %"})
    assert not (a.schedule.operations == SKIP).any()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.1, 100.0)), min_size=1, max_size=12),
)
def test_the_fastest_is_taken_of_what_is_worth_about_the_most(candidates):
    utilities, seconds = zip(*candidates, strict=True)
    chosen = fastest(utilities, seconds)
    assert utilities[chosen] >= max(utilities) - 0.005
    for utility, time in candidates:
        assert time >= seconds[chosen] or utility < max(utilities) - 0.005


@pytest.mark.parametrize("speed", [None, "1 GFLOP/s", "100 GFLOP/s"])
def test_passes_are_as_large_as_memory_allows_what_is_worth_about_the_most(speed):
    """Against training everything in every number of passes, one by one."""
    budget = {"memory": "70 %"} | ({"speed": speed} if speed else {})
    a, plan = planned(budget, batch_size=8, examples=40)
    federation, state, _ = round_of("d2ft", [budget], **QUIET, batch_size=8, examples=40)
    (client,) = plan.clients
    tried = Round(federation, state, [client])
    uniform = np.ones((ARCH.blocks, ARCH.heads))
    judge = Utility(uniform, uniform)
    for passes in range(1, 9):
        policy = ExecutionPolicy(micro_batches=passes)
        other = tried.assign(client, tried.everything(), policy=policy)
        if client.affords(other.cost):
            slower = other.cost.work >= a.cost.work
            assert slower or worth_of(judge, other, tried, 40) < worth_of(judge, a, tried, 40)


@pytest.mark.parametrize("batch", [10, 24, 20, 48])
@pytest.mark.parametrize("share", [85, 70, 55, 40])
def test_any_batch_size_is_cut_into_fewer_passes_until_there_are_none(batch, share):
    """Sizes are powers of two, which need not divide it."""
    a, _ = planned({"memory": f"{share} %"}, examples=100, batch_size=batch)
    assert a.policy.micro_batches
    assert not a.schedule.sits_out


@settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 1.5), st.sampled_from(["", "20 %", "60 %"]), st.booleans())
def test_no_policy_breaks_a_deadline(share, memory, slow):
    rates = {"speed": "2 GFLOP/s"} | ({"bandwidth-up": "1 Mbit/s"} if slow else {})
    _, whole = planned(rates, examples=40)
    limit = share * whole.clients[0].budget.seconds(whole.assignments[0].cost)
    a, plan = planned(
        rates | {"deadline": f"{limit} s"} | ({"memory": memory} if memory else {}), examples=40
    )
    assert plan.clients[0].budget.seconds(a.cost) <= limit


def test_what_was_measured_here_changes_no_plan_and_no_clock(monkeypatch, tmp_path):
    budget = {"memory": "60 %", "flops": "60 %", "speed": "10 GFLOP/s", "deadline": "20 s"}
    before, _ = planned(budget)
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path))
    slow = replace(standard(), passes=9.0, branch=1.0, source=f"{software()}, today")
    keep(slow)
    after, plan = planned(budget)
    assert kept("cpu", "fp32", 1) == slow
    assert (after.schedule.operations == before.schedule.operations).all()
    assert (after.policy, after.cost) == (before.policy, before.cost)
    federation, state, _ = round_of("d2ft", [budget], **QUIET)
    assert federation.seconds_here(state, plan.working)[0] > 9.0  # this is what it does change
