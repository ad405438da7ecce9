"""What each strategy schedules, on made-up clients."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from d2ft_fl.budgets.budget import LIMITS, UNLIMITED, Budget
from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes, round_cost
from d2ft_fl.costs.resources import RESOURCES, Cost
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.rounds.checks import checked
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import ExecutionPolicy, Participant, Round, plan_round
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.rounds.strategies import (
    STRATEGIES,
    builtin_strategies,
    declared_strategy,
    load_strategy,
    strategy_of,
)
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.strategies import fedavg
from d2ft_fl.subnets.schedule import Operation
from tests.conftest import build, weights_of

MODEL, ARCH = build(depth=4)
WEIGHTS = weights_of(MODEL)
FULL, FROZEN, FORWARD, SKIP = 3, 2, 1, 0


def round_of(strategy, budgets, number=1, examples=20, **options):
    """A round of clients with these budgets, mappings as in a file."""
    config = RunConfig(**{"strategy": strategy, "batch_size": 8, "rounds": 8, **options})
    federation = Federation(Components(config), ARCH)
    state = State(number - 1, WEIGHTS)
    reports = [Report(c, examples, Budget.from_mapping(b)) for c, b in enumerate(budgets)]
    return federation, state, reports


def scheduled(strategy, budgets, number=1, examples=20, **options):
    """Operations [slots, blocks, heads] of each client."""
    plan = plan_round(*round_of(strategy, budgets, number, examples, **options))
    return [a.schedule.operations for a in plan.assignments]


def rows_of(strategy, budgets, number=1, **options):
    """Operations of single slots as lists of layers."""
    return [o[0].tolist() for o in scheduled(strategy, budgets, number, **options)]


def layer(*operations):
    return list(operations)


@given(
    st.sampled_from([name for name in STRATEGIES if name != "fedavg"]),
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "flops": st.integers(0, 120).map("{} %".format),
                "memory": st.integers(0, 120).map("{} %".format),
                "bytes-up": st.integers(0, 120).map("{} %".format),
                "bytes-down": st.integers(0, 120).map("{} %".format),
                "deadline": st.floats(0.01, 2).map("{} s".format),
            },
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 8),
    st.fixed_dictionaries(
        {},
        optional={
            "slots": st.sampled_from([1, 3]),
            "rounds": st.integers(8, 13),
            "data_selection": st.just("entropy"),
            "data_share": st.sampled_from([0.5, 1.0]),
            "coupling": st.sampled_from(["spread", "agenda"]),
            "score_every": st.sampled_from([1, 3]),
        },
    ),
)
@settings(deadline=None, max_examples=150)
def test_every_strategy_keeps_the_budgets_that_it_promises(strategy, budgets, number, options):
    budgets = [{**b, "speed": "1 GFLOP/s", "bandwidth-up": "1 MB/s"} for b in budgets]
    federation, state, reports = round_of(strategy, budgets, number, **options)
    plan = plan_round(federation, state, reports)  # raises where one is broken
    for client, assignment in zip(plan.clients, plan.assignments, strict=True):
        found = round_cost(
            federation.costs_of(state, assignment.policy),
            assignment.schedule,
            assignment.examples,
            assignment.probes,
        )
        assert found == assignment.cost
        for index, resource in enumerate(RESOURCES):
            if resource in federation.keeps:
                assert getattr(found, resource) <= max(client.capacity[index], 0)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "linear-probe"])
def test_without_limits_everything_trains_in_turn(strategy):
    """Over a run: within a round not all do."""
    trained = np.zeros((ARCH.blocks, ARCH.heads), dtype=bool)
    for number in range(1, 9):
        for operations in scheduled(strategy, [{}, {}], number):
            trained |= (operations == Operation.FULL).any(axis=0)
    assert trained.all()


@pytest.mark.parametrize("strategy", [n for n in STRATEGIES if n not in ("fedavg", "accumulate")])
def test_who_affords_nothing_sits_out(strategy):
    (operations,) = scheduled(strategy, [{"flops": 0}])
    assert not operations.any()


def test_caff_trains_the_last_layers():
    whole, half, poor = rows_of("caff", [{}, {"memory": "60 %"}, {"flops": "40 %"}])
    assert whole == [layer(FULL, FULL, FULL, FULL)] * 4
    trained = half.count([FULL] * 4)
    assert 0 < trained < 4
    assert half == [[FORWARD] * 4] * (4 - trained) + [[FULL] * 4] * trained
    assert poor[0] == [FORWARD] * 4
    assert rows_of("linear-probe", [{}]) == [[[FORWARD] * 4] * 4]


def test_depth_grows_from_below():
    whole, half = rows_of("depthfl", [{}, {"flops": "52 %"}])
    assert whole == [[FULL] * 4] * 4
    assert half == [[FULL] * 4] * 2 + [[SKIP] * 4] * 2
    grown = [rows_of("progfed", [{}], number)[0] for number in (1, 3, 5, 8)]  # four stages of two
    assert grown == [[[FULL] * 4] * n + [[SKIP] * 4] * (4 - n) for n in (1, 2, 3, 4)]
    assert rows_of("progfed", [{}], 2, stage_rounds=1)[0] == grown[1]
    assert rows_of("progfed", [{"flops": "52 %"}], 8)[0] == half


def test_layers_train_in_turn_under_a_narrowed_rest():
    first, third, last = (rows_of("slt", [{}], number)[0] for number in (1, 5, 8))
    assert first == [[FULL] * 4] * 4
    assert third == [[FORWARD] * 4] * 2 + [[FULL] * 4] * 2
    assert last == [[FORWARD] * 4] * 3 + [[FULL] * 4]
    (narrow,) = rows_of("slt", [{"flops": "60 %"}], 3)
    assert narrow[:2] == [[FORWARD] * 4, [FULL] * 4]
    assert narrow[2] == narrow[3]
    width = narrow[2].count(FULL)
    assert 0 < width < 4
    assert narrow[2] == [FULL] * width + [SKIP] * (4 - width)


def test_cyclic_layers_move_on():
    only_one = {"bytes-up": "30 %"}
    one, other = rows_of("cyclic", [only_one] * 2, 1)
    assert one == [[FULL] * 4] + [[FROZEN] * 4] * 3
    assert other == [[FORWARD] * 4, [FULL] * 4, [FROZEN] * 4, [FROZEN] * 4]  # nothing below trains
    assert rows_of("cyclic", [only_one] * 2, 2)[0] == other
    assert rows_of("cyclic", [only_one], 5)[0] == one
    (cheap,) = rows_of("cyclic", [{"flops": "60 %"}])
    assert cheap[0] == [FULL] * 4
    assert 0 < cheap.count([SKIP] * 4) < 3


def test_widths_are_leading_heads_a_window_or_drawn():
    half = {"flops": "52 %"}
    assert rows_of("heterofl", [half]) == [[[FULL, FULL, SKIP, SKIP]] * 4]
    windows = [rows_of("fedrolex", [half], number)[0][0] for number in (1, 2, 4)]
    assert windows == [
        layer(FULL, FULL, SKIP, SKIP),
        layer(SKIP, FULL, FULL, SKIP),
        layer(FULL, SKIP, SKIP, FULL),
    ]
    drawn = [scheduled("federated-dropout", [half] * 3, number) for number in (1, 2)]
    assert all((o == FULL).sum(axis=2).tolist() == [[2] * 4] for one in drawn for o in one)
    assert len({o.tobytes() for one in drawn for o in one}) == 6


def test_ordered_dropout_draws_widths_up_to_the_largest():
    seen = set()
    for number in range(1, 30):
        for slot in scheduled("fjord", [{"flops": "80 %"}], number, slots=2)[0]:
            width = int((slot[0] == FULL).sum())
            assert slot.tolist() == [[FULL] * width + [SKIP] * (4 - width)] * 4
            seen.add(width)
    assert seen == {1, 2, 3}


def test_experts_are_drawn_by_slot_and_layer():
    (operations,) = scheduled("moe", [{"flops": "60 %"}], slots=4)
    counts = (operations == FULL).sum(axis=2)
    assert len(np.unique(counts)) == 1
    assert 0 < counts[0, 0] < 4
    assert len({slot.tobytes() for slot in operations}) > 1


def test_pruning_keeps_what_is_worth_most():
    federation, state, reports = round_of("pruning-magnitude", [{"flops": "50 %"}])
    plan = plan_round(federation, state, reports)
    operations = plan.assignments[0].schedule.operations[0]
    assert set(np.unique(operations)) == {SKIP, FULL}
    scores = Round(federation, state, plan.clients).scores("magnitude")
    kept = (scores * (operations == FULL)).sum()
    count = int((operations == FULL).sum())
    assert kept == pytest.approx(np.sort(scores.ravel())[-count:].sum(), rel=0.01)


@pytest.mark.parametrize("strategy,scored", [("pruning-gradient", 4), ("moe", 4), ("caff", 0)])
def test_scores_that_a_strategy_names_are_measured_and_charged(strategy, scored):
    federation, state, reports = round_of(strategy, [{}, {"flops": "30 %"}])
    plan = plan_round(federation, state, reports)
    assert plan.assignments[0].probes.scored == scored
    second = replace(state, round=1)
    assert plan_round(federation, second, reports).assignments[0].probes.scored == 0


def test_fewer_examples_are_as_many_as_compute_affords():
    federation, state, reports = round_of("fewer-examples", [{"flops": "50 %", "memory": "1 %"}])
    (assignment,) = plan_round(federation, state, reports).assignments
    assert assignment.examples == 10
    assert (assignment.schedule.operations == FULL).all()
    assert federation.costs.flops(assignment.schedule, 11) > 0.5 * federation.costs.flops(
        assignment.schedule, 20
    )
    assert federation.keeps == ("flops", "deadline")


def test_accumulation_takes_the_fewest_passes_that_fit():
    federation, state, reports = round_of("accumulate", [{}, {"memory": "60 %"}, {"memory": "5 %"}])
    plan = plan_round(federation, state, reports)
    whole, parts, nothing = plan.assignments
    assert whole.policy.micro_batches == 1
    assert parts.policy.micro_batches > 1
    assert nothing.schedule.sits_out
    fewer = Round(federation, state, plan.clients).assign(
        plan.clients[1],
        parts.schedule,
        policy=ExecutionPolicy(micro_batches=parts.policy.micro_batches // 2),
    )
    assert fewer.cost.memory > plan.clients[1].capacity[1] >= parts.cost.memory
    assert parts.cost.flops == whole.cost.flops


def test_accumulated_runs_are_fedavgs(quick, tmp_path):
    found = {}
    budgets = tmp_path / "same.toml"
    budgets.write_text('mix = ["all"]\n[classes.all]\nspeed = "1 GFLOP/s"\n')
    for strategy in ("fedavg", "accumulate"):
        match = {} if strategy == "fedavg" else {"match": "memory", "match_share": 0.7}
        config = quick(
            strategy=strategy, run_folder=str(tmp_path / strategy), budgets=str(budgets), **match
        )
        found[strategy] = run_local(checked(config))
    one, other = found.values()
    assert other["violations"] == other["faults"] == other["sat_out"] == 0
    assert other["resources"]["memory"]["share"] < 0.71 < one["resources"]["memory"]["share"]
    assert other["resources"]["flops"]["used"] == one["resources"]["flops"]["used"]
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_of_each_is_as_predicted(quick, strategy):
    config = quick(strategy=strategy, slots=2, train_examples=80, test_examples=20, rounds=1)
    summary = run_local(checked(config))
    assert summary["faults"] == 0
    assert summary["flops_as_predicted"] == summary["client_rounds"]
    broken = [limit for limit in RESOURCES if (summary["resources"][limit]["worst"] or 0) > 1]
    assert not set(broken) & set(summary["keeps"])


# -- what strategies say of themselves -----------------------------------------------------------


def test_methods_are_listed_with_their_papers():
    found = {m.name: m for m in builtin_strategies()}
    assert list(found) == list(STRATEGIES)
    assert found["d2ft"].keeps_budgets
    assert found["fedavg"].keeps == ()
    assert "2411.07826" in found["caff"].paper
    assert all(m.text for m in found.values())
    no_method = {"fewer-examples", "accumulate", "linear-probe"}
    assert {name for name, m in found.items() if not m.paper} == no_method


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_read_of_a_strategy_is_what_it_says_once_imported(name):
    declared, loaded = declared_strategy(name), load_strategy(name)
    assert replace(declared, schedule=loaded.schedule) == loaded


def test_a_strategy_that_was_only_read_can_schedule():
    federation, state, reports = round_of("fedavg", [{}])
    vars(federation.components)["strategy"] = declared_strategy("fedavg")
    assert (plan_round(federation, state, reports).assignments[0].schedule.operations == FULL).all()


def test_the_command_lists_them():
    result = CliRunner().invoke(app, ["strategies", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [m["name"] for m in found] == list(STRATEGIES)
    assert {m["name"]: m["keeps_budgets"] for m in found}["fewer-examples"] is False
    assert all({"name", "paper", "keeps_budgets"} <= set(m) for m in found)
    table = CliRunner().invoke(app, ["strategies"]).stdout
    assert "fedrolex" in table
    one = CliRunner().invoke(app, ["strategies", "slt"]).stdout
    assert "NeurIPS 2023" in one
    wrong = CliRunner().invoke(app, ["strategies", "best"])
    assert wrong.exit_code == 2
    assert "use one of d2ft" in wrong.stderr


def test_a_module_that_says_nothing_keeps_everything():
    class Plain:
        """Mine."""

        schedule = fedavg.schedule

    strategy = strategy_of(Plain, "mine")
    assert strategy.keeps == LIMITS
    assert strategy.scores is None
    assert strategy.text == "Mine."
    assert not strategy.staged


@pytest.mark.parametrize("said", [{"KEEPS": ("watts",)}, {"SCORES": ("luck",)}])
def test_budgets_and_scores_that_there_are_not_are_refused(said):
    with pytest.raises(ConfigError, match=f"names '{next(iter(said.values()))[0]}'"):
        strategy_of(type("Odd", (), {"schedule": fedavg.schedule, **said}), "mine.odd")


@pytest.mark.parametrize("examples", [-1, 21])
def test_examples_that_a_client_has_not_are_an_error(examples, monkeypatch):
    federation, state, reports = round_of("fedavg", [{}])

    def schedule(round_number):
        a = round_number.assign(round_number.clients[0], round_number.everything())
        return [replace(a, examples=examples)]

    monkeypatch.setattr(fedavg, "schedule", schedule)
    with pytest.raises(RunError, match=f"gives client 0 {examples} examples to train on, of 20"):
        plan_round(federation, state, reports)


def test_what_affords_means():
    client = Participant(0, 20, Budget(deadline=1.0, speed=10.0), np.full(4, UNLIMITED))
    assert client.affords(Cost(work=10))
    assert not client.affords(Cost(work=11))
    assert client.local == 20


def test_the_page_of_methods_is_what_the_command_prints():
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    printed = CliRunner().invoke(app, ["strategies", "--markdown"]).stdout
    assert page.read_text() == printed, "run: d2ft strategies --markdown > docs/methods.md"


@given(st.integers(1, 40), st.integers(1, 12))
def test_stages_divide_a_run_evenly(rounds, most):
    federation, state, _ = round_of("slt", [{}], rounds=rounds)
    found = [
        Round(federation, replace(state, round=number), []).stage(most) for number in range(rounds)
    ]
    (stages,) = {stages for _, stages in found}
    lengths = [sum(stage == n for stage, _ in found) for n in range(stages)]
    assert stages == min(most, rounds)
    assert found == sorted(found)
    assert sum(lengths) == rounds
    assert max(lengths) - min(lengths) <= 1 <= min(lengths)


def test_layers_share_stages_where_rounds_are_few():
    assert rows_of("slt", [{}], 1, rounds=2)[0] == [[FULL] * 4] * 4
    assert rows_of("slt", [{}], 2, rounds=2)[0] == [[FORWARD] * 4] * 2 + [[FULL] * 4] * 2
    assert rows_of("progfed", [{}], 3, rounds=3)[0] == [[FULL] * 4] * 4


def test_who_cannot_afford_a_look_at_all_examples_draws_fewer():
    """A look is a third of training: at 100 % none is needed, at 25 % none is affordable."""
    budgets = [{"flops": f"{share} %"} for share in (100, 60, 25)]
    plan = plan_round(*round_of("fewer-examples", budgets, data_selection="entropy"))
    drawn = plan_round(*round_of("fewer-examples", budgets))
    assert [a.examples for a in drawn.assignments] == [20, 12, 5]
    assert [(a.examples, a.probes.viewed) for a in plan.assignments[::2]] == [(20, 0), (5, 0)]
    chosen = plan.assignments[1]
    assert chosen.probes.viewed == 20
    assert 0 < chosen.examples < 12


def test_widths_are_drawn_also_where_selecting_is_too_dear():
    options = {"slots": 4, "data_selection": "entropy", "data_share": 0.5}
    widths = set()
    for number in range(1, 5):
        plan = plan_round(*round_of("fjord", [{"flops": "30 %"}], number, **options))
        (assignment,) = plan.assignments
        assert assignment.probes == NO_PROBES
        widths |= {int(slot.any(axis=0).sum()) for slot in assignment.schedule.operations}
    assert len(widths) > 1


@pytest.mark.parametrize("strategy", ["random", "pruning-magnitude"])
def test_baselines_of_scores_are_not_coupled(strategy):
    half = [{"flops": "50 %"}] * 4
    assert rows_of(strategy, half, coupling="spread") == rows_of(strategy, half)
    assert rows_of("d2ft", half, coupling="spread") != rows_of("d2ft", half)


def test_drawing_tries_all_that_a_client_would_train_on():
    """Of ten examples one is wanted: the look at all is too dear, one drawn is not."""
    options = {"data_selection": "entropy", "data_share": 0.1}
    plan = plan_round(*round_of("fewer-examples", [{"flops": "15 %"}], examples=10, **options))
    assert [(a.examples, a.probes.viewed) for a in plan.assignments] == [(1, 0)]
    rich = plan_round(*round_of("fewer-examples", [{"flops": "60 %"}], examples=10, **options))
    assert [(a.examples, a.probes.viewed) for a in rich.assignments] == [(1, 10)]


def test_a_strategy_may_ask_for_passes_of_its_own(quick, monkeypatch):
    """The fold takes the scores that the task asked for, whatever is configured."""
    probes = Probes(scored=2, kinds=("taylor",))

    def schedule(round_number):
        return [
            round_number.assign(c, round_number.everything(), probes=probes)
            for c in round_number.clients
        ]

    monkeypatch.setattr(fedavg, "schedule", schedule)
    summary = run_local(checked(quick(strategy="fedavg")))
    assert summary["faults"] == 0
    assert summary["scored"] == summary["client_rounds"] > 0
