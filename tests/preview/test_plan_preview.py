"""Plans without training: against hand arithmetic, the plans of a run, and laws."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from d2ft_fl.budgets.budget import UNLIMITED, Amount, Budget
from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.resources import Cost
from d2ft_fl.models.build import build_adapter
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.preview import console as preview_tables
from d2ft_fl.preview import page as preview_page
from d2ft_fl.preview.plan_preview import ClientPreview, RoundPreview, follow, preview
from d2ft_fl.report import plan_figure
from d2ft_fl.rounds.checks import checked_options
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import plan_round
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.runtime import worker_memory
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import reports_of

FULL = Cost(100, 100, 100, 100, work=100)


def client(cost, operations=None, speed=None, deadline=None, flops=None, memory=None, down=None):
    """A preview of one client of a model with 1 x 2 subnets, by default one FULL."""
    budget = Budget(
        flops=flops and Amount(flops), memory=memory and Amount(memory),
        bytes_down=down and Amount(down), speed=speed, deadline=deadline,
    )  # fmt: skip
    if operations is None:
        operations = [[[Operation.FULL, Operation.SHORTCUT]]]
    schedule = Schedule(np.array(operations, dtype=np.int8))
    who = Participant(0, 8, budget, budget.capacity(FULL))
    return ClientPreview.of(who, Assignment(0, schedule, cost), FULL)


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_shares_are_used_over_allowed_and_the_highest_binds():
    found = client(Cost(50, 30, 5, 5), flops=80, memory=40)
    assert found.shares == {"flops": 0.625, "memory": 0.75}
    assert found.binding == "memory"
    assert found.operations == {"shortcut": 1, "forward_only": 0, "frozen": 0, "full": 1}


def test_a_budget_that_affords_full_fine_tuning_does_not_bind():
    found = client(Cost(50, 30, 5, 100), flops=80, down=100)
    assert found.shares == {"flops": 0.625, "bytes_down": 1.0}
    assert found.binding == "flops"


def test_a_deadline_is_a_budget():
    found = client(Cost(60, 30, 5, 5, work=60), flops=90, speed=10.0, deadline=8.0)
    assert found.seconds == 6.0
    assert found.shares["deadline"] == 0.75
    assert found.binding == "deadline"


def test_nothing_binds_where_everything_is_trained_or_nothing_is_limited():
    everything = [[[Operation.FULL, Operation.FULL]]]
    assert client(FULL, everything, flops=200).binding == "none"
    assert client(FULL, everything, flops=50).binding == "flops"  # a reference goes over
    assert client(Cost(50, 30, 5, 5)).binding == "none"


def test_who_sits_out_is_bound_by_what_allows_least():
    found = client(Cost(), [[[0, 0]]], flops=20, memory=10, speed=1.0)
    assert (found.sits_out, found.binding, found.seconds) == (True, "memory", 0.0)


def test_counts_are_means_over_slots():
    found = client(Cost(50, 30, 5, 5), [[[3, 1]], [[3, 0]]])
    assert found.operations == {"shortcut": 0.5, "forward_only": 0.5, "frozen": 0, "full": 1}


def test_workload_variance_is_of_flops_over_their_mean():
    """1 and 3 are 0.5 and 1.5 of their mean: variance 0.25. Who sits out does not count."""
    clients = [client(Cost(1)), client(Cost(3)), client(Cost(), [[[0, 0]]])]
    found = RoundPreview(1, clients, np.array([[2, 0]]), 0.0)
    assert found.workload_variance == 0.25
    assert (found.coverage, found.short_subnets) == (0.5, 1)
    assert found.share_of_full("flops") == pytest.approx(4 / 300)


@pytest.fixture(scope="module")
def config():
    return RunConfig(
        clients=5, train_examples=100, partitioner="Iid", partitioner_args="", slots=2
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(config):
    return preview(config, rounds=2)


def test_the_first_round_is_that_of_a_run(config, found):
    adapter = build_adapter(Components(config).model_spec)
    state = State(0, dict(adapter.model.named_parameters()))
    run = plan_round(Federation(Components(config), adapter.describe()), state, reports_of(config))
    first = found.rounds[0]
    assert [c.cost for c in first.clients] == [a.cost for a in run.assignments]
    assert [c.scored for c in first.clients] == [a.probes.scored for a in run.assignments]
    assert np.array_equal(first.trained, sum(a.schedule.trained.astype(int) for a in run.working))
    for c, who in zip(first.clients, run.clients, strict=True):
        allowed = dict(
            zip(("flops", "memory", "bytes_up", "bytes_down"), who.capacity, strict=True)
        )
        assert set(c.shares) == {name for name, most in allowed.items() if most < UNLIMITED}


def test_counts_add_up_and_budgets_are_kept(found):
    assert found.subnets == found.blocks * found.heads == 36
    for r in found.rounds:
        assert r.trained.sum() > 0
        for c in r.clients:
            assert sum(c.operations.values()) == pytest.approx(36)
            assert all(0 < share <= 1 for share in c.shares.values())


def test_scoring_is_charged_when_it_is_due_and_said_to_be_unknown(found):
    """score-every is 5, so the first of two rounds has a scoring pass."""
    first, second = ([c.scored for c in r.clients] for r in found.rounds)
    assert max(first) == 4
    assert second == [0] * 5
    assert any("fisher scores are measured in a run" in note for note in found.notes)


def test_an_agenda_goes_round(tmp_path):
    """One client that affords half: every third is trained in its turn, none in the same round."""
    path = tmp_path / "half.toml"
    path.write_text('[classes.half]\nbytes-up = "12 %"\n')
    config = RunConfig(
        clients=1, budgets=str(path), coupling="agenda", agenda_rounds=3,
        backward_score="uniform", forward_score="uniform",
    )  # fmt: skip
    found = preview(checked_options(config), examples=32, rounds=3)
    assert found.rounds[0].short_subnets > 0
    assert (found.covered_over_rounds > 0).all()
    assert not found.notes


def test_budgets_are_asked_for_every_round(tmp_path, monkeypatch):
    tmp_path.joinpath("falling.py").write_text(
        "def budget(client, round):\n    return {'flops': ['90 %', '30 %'][round - 1]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = preview(RunConfig(clients=1, budgets="falling:budget"), examples=16, rounds=2)
    high, low = (r.share_of_full("flops") for r in found.rounds)
    assert 0.8 < high <= 0.9
    assert 0.2 < low <= 0.3


@pytest.mark.slow
def test_compensated_shortcuts_are_charged_once_means_are_measured(config):
    """score-every is 5: round 1 measures, from round 2 on shortcuts cost their mean."""
    config = replace(config, compensation=True)
    adapter = build_adapter(Components(config).model_spec)
    federation = Federation(Components(config), adapter.describe())
    state = State(0, dict(adapter.model.named_parameters()))
    assert not federation.costs_of(state).compensated
    state = follow(federation, state, plan_round(federation, state, reports_of(config)))
    assert federation.costs_of(state).compensated
    assert len(preview(config, rounds=2).rounds[1].working) == 5


def test_a_reference_is_named_as_one():
    found = preview(RunConfig(clients=2, strategy="fedavg"), examples=16)
    assert max(found.rounds[0].clients[1].shares.values()) > 1
    assert found.rounds[0].trained.tolist() == [[2] * 6] * 6
    assert "does not look at budgets" in found.notes[0]


def test_the_table_groups_many_clients_by_device():
    found = preview(RunConfig(clients=22), examples=8)
    console = Console(width=100, record=True, file=io.StringIO())
    preview_tables.show(found, console)
    text = console.export_text()
    assert "by device class" in text
    assert "The first 5 clients" in text
    assert max(map(len, text.splitlines()[:20])) <= 100
    for device, count in (("workstation", 6), ("laptop", 6), ("phone", 5), ("board", 5)):
        line = next(line for line in text.splitlines() if line.startswith(device))
        assert line.split()[1:3] == [str(count), "mean"]


@pytest.mark.parametrize("most,width", [(1000, 100), (10**6, 100), (9, 60)])
def test_the_map_fits_and_says_its_numbers_without_colour(most, width):
    counts = np.arange(12 * 16).reshape(12, 16) * most // (12 * 16 - 1)
    lines = preview_tables.heat_map(counts, most, "clients", width).plain.splitlines()
    assert max(map(len, lines[1:])) <= width
    assert lines[2].split()[:2] == ["0", "0"]
    last = "100" if most == 10**6 else str(most)
    assert lines[13].split()[0::16] == ["11", last]


def test_the_page_holds_everything_and_needs_nothing():
    found = preview(RunConfig(clients=23), examples=8)
    text = "".join(preview_page.page(found))
    assert "http" not in text
    assert "<script" not in text
    assert "<svg" in text
    assert "prefers-color-scheme: dark" in text
    for number in range(23):
        assert f'<td class="word">{number}</td>' in text
    assert text.count("</tr>") == 1 + 23
    assert "model = &quot;vit_glyphs&quot;" in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
def test_every_output_is_written(found, tmp_path, suffix):
    path = tmp_path / f"plan{suffix}"
    plan_figure.check_output(path, preview_page.SUFFIXES)
    preview_page.write(found, path)
    assert path.stat().st_size > 5000


def test_the_command_prints_tables_and_writes_a_picture(tmp_path):
    path = tmp_path / "plan.png"
    result = plan("--clients", "3", "--examples", "16", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "workload variance" in result.output
    assert "clients of 3 that train each subnet" in result.output
    assert path.exists()


def test_the_command_prints_json_and_nothing_else():
    result = plan("--clients", "3", "--examples", "16", "--rounds", "2", "--json")
    found = json.loads(result.output)
    assert (found["subnets"], found["blocks"], found["heads"]) == (36, 6, 6)
    assert [r["round"] for r in found["rounds"]] == [1, 2]
    assert np.shape(found["covered_over_rounds"]) == (6, 6)
    first = found["rounds"][0]
    assert [c["client"] for c in first["clients"]] == [0, 1, 2]
    assert first["short_subnets"] == sum(n == 0 for row in first["trained"] for n in row)
    assert first["coverage"] == pytest.approx(1 - first["short_subnets"] / 36)


def test_what_a_worker_process_takes_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(worker_memory, "worker_memory", lambda: 450_000_000)
    path = tmp_path / "mine.toml"
    path.write_text(
        "[classes.a]\nmemory = '1 GiB'\nmemory-of = 'process'\nmemory-base = '500 MB'\n"
        "[classes.b]\nmemory = '40 %'\n"
    )
    arguments = ["--examples", "20", "--clients", "2", "--budgets", str(path)]
    said = " ".join(plan(*arguments).output.split())
    assert "a worker process takes 450 MB before any model" in said
    assert "1 of 2 clients have a memory budget of their process, of which 500 MB" in said
    printed = json.loads(plan(*arguments, "--json").output)
    assert printed["worker_memory"] == 450_000_000
    left = 2**30 - 500_000_000
    first = printed["rounds"][0]["clients"][0]
    assert first["shares"]["memory"] == pytest.approx(first["cost"]["memory"] / left)


def test_shortcuts_win_over_set():
    result = plan("--set", "clients=9", "--clients", "2", "--examples", "16", "--json")
    assert len(json.loads(result.output)["rounds"][0]["clients"]) == 2


def test_where_everybody_sits_out_the_command_says_so(tmp_path):
    path = tmp_path / "none.toml"
    path.write_text("[classes.none]\nflops = 1\n")
    result = plan("--budgets", str(path), "--examples", "16", "--clients", "2")
    assert result.exit_code == 0
    assert "every client sits out round 1" in result.output
    assert "0% of 36 subnets trained, 36 by nobody" in result.output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--rounds", "0"], "--rounds 0 must be 1 or more"),
        (["--examples", "0"], "--examples 0 must be 1 or more"),
        (["--clients", "0"], "clients = 0 must be 1 or more"),
        (["--clients", "5000"], "clients = 5000 is more than the 1078 training examples"),
        (["--budgets", "nope"], "budgets = 'nope'; use"),
        (["--model", "resnet18"], "model 'resnet18' is not supported"),
        (["--model", "vit_tiny_patch16_224"], "use 'hub', 'none' or the path"),
        (["--output", "plan.jpg"], "must end in .png, .svg, .pdf, .html"),
        (["--output", "nowhere/plan.png"], "there is no folder 'nowhere'"),
        (["--set", "slots=99"], "slots = 99 is more than batch-size"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, message):
    result = plan(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("d2ft: ")
    assert message in result.output
    assert result.output.count("\n") == 1


def test_what_a_strategy_raises_is_one_line(tmp_path, monkeypatch):
    tmp_path.joinpath("broken").mkdir()
    tmp_path.joinpath("broken", "plan.py").write_text(
        "def schedule(round):\n    raise ValueError('no\\nidea')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = plan("--set", "strategy=broken.plan", "--examples", "8")
    assert result.exit_code == 1
    assert result.output == "d2ft: strategy 'broken.plan' raised ValueError in round 1: no\n"


def test_ranks_are_shown_where_there_is_a_choice(tmp_path):
    budgets = tmp_path / "budgets.toml"
    budgets.write_text('mix = ["all"]\n[classes.all]\nbytes-up = "30 %"\n')
    options = ("tuning=lora", "lora-aggregation=stack", f"budgets={budgets}")
    arguments = [x for option in options for x in ("--set", option)]
    page = tmp_path / "plan.html"
    alone = plan(*arguments, "--json")
    done = plan(*arguments, "--set", "lora-ranks=2, 4", "--output", str(page))
    chosen = plan(*arguments, "--set", "lora-ranks=2, 4", "--json")
    assert {c["rank"] for c in json.loads(alone.stdout)["rounds"][0]["clients"]} == {None}
    assert all(2 <= c["rank"] <= 8 for c in json.loads(chosen.stdout)["rounds"][0]["clients"])
    assert "rank" in next(x for x in done.stdout.splitlines() if "client" in x and "device" in x)
    assert "<th" in page.read_text()
    assert ">rank<" in page.read_text()
