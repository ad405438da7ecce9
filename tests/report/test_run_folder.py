import json

import numpy as np
import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.report.run import run_html
from d2ft_fl.report.run_folder import PlanFile, RunFolder, limits_of
from d2ft_fl.subnets.schedule import Operation
from tests.report.made_up import USED, client_row, round_row, simple_run, sits_out, write_run


def test_what_is_spent_adds_up_over_clients_and_rounds(tmp_path):
    """Two clients of 300 FLOPs, 40 bytes up, 150 down in each of three rounds of two seconds."""
    run = RunFolder.read(simple_run(tmp_path, (0.3, 0.5, 0.4)))
    assert run.rounds["cum_flops"].tolist() == [600, 1200, 1800]
    assert run.rounds["cum_bytes_up"].tolist() == [80, 160, 240]
    assert run.rounds["cum_bytes_down"].tolist() == [300, 600, 900]
    assert run.rounds["cum_seconds"].tolist() == [2, 4, 6]
    assert run.rounds["flops_share"].tolist() == [0.3] * 3
    assert run.totals["accuracy"] == 0.4
    assert run.totals["best_accuracy"] == 0.5
    assert run.totals["resources"]["bytes_up"] == {
        "used": 240.0, "full": 600, "share": 0.4, "worst": 0.8,
    }  # fmt: skip


def test_budgets_are_used_over_allowed(tmp_path):
    rows = [client_row(1, 0, deadline=4.0), client_row(1, 1, allowed=dict.fromkeys(USED))]
    run = RunFolder.read(write_run(tmp_path, [(round_row(1, 0.5, rows), rows)]))
    first, second = run.clients.to_dict("records")
    assert (first["flops_share"], first["memory_share"], first["bytes_up_share"]) == (0.5, 0.5, 0.8)
    assert first["deadline_share"] == 0.5
    assert np.isnan(
        [first["bytes_down_share"], second["flops_share"], second["deadline_share"]]
    ).all()
    assert limits_of(run.clients) == ["flops", "memory", "bytes_up", "deadline"]


def test_a_round_without_anyone_counts_as_nothing(tmp_path):
    """Later, budgets may come back."""
    working, resting = [client_row(1, 0)], [sits_out(2, 0)]
    rounds = [(round_row(1, 0.5, working), working), (round_row(2, 0.5, resting), resting)]
    run = RunFolder.read(write_run(tmp_path, rounds))
    assert run.rounds["cum_flops"].tolist() == [300, 300]
    assert np.isnan(run.rounds["train_loss"].iloc[1])
    assert run.clients["worked"].tolist() == [True, False]
    assert np.isnan(run.clients["flops_share"].iloc[1])


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    """Clients are written before their round is."""
    simple_run(tmp_path, (0.3, 0.5), status="running")
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text(lines[0] + lines[1][:40])
    run = RunFolder.read(tmp_path)
    assert len(run.lines) == 1
    assert run.clients["round"].unique().tolist() == [1]
    assert not run.finished


def test_operations_are_counted_by_client():
    """Two clients of two slots: subnet 0 FULL with both, subnet 1 with one in one slot."""
    full, forward, skip = Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT
    schedules = np.array([[[[full, full]], [[full, forward]]], [[[full, skip]], [[skip, skip]]]])
    ranks = np.array([[[2, 8]], [[4, 8]]])
    plan = PlanFile(np.arange(2), schedules, ranks)
    assert plan.counts(full).tolist() == [[2, 1]]
    assert plan.counts(forward).tolist() == [[0, 1]]
    assert plan.counts(skip).tolist() == [[1, 1]]
    assert plan.mean_ranks().tolist() == [[3.0, 8.0]]


def damage(folder, name, text):
    path = folder / name
    path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("rounds.jsonl", "no\n", "rounds.jsonl' is not JSON in line 1"),
        ("rounds.jsonl", "[]\n", "rounds.jsonl' holds no object in line 1"),
        ("rounds.jsonl", "{}\n", "rounds.jsonl' lacks something a round has"),
        ("rounds.jsonl", "", "has no finished round yet (finished)"),
        ("clients.jsonl", None, "clients.jsonl' cannot be read"),
        ("clients.jsonl", "", "clients.jsonl' has no line of round 1"),
        ("clients.jsonl", '{"round": 1}\n', "clients.jsonl' lacks something a client has"),
        ("config.toml", None, "config.toml'"),
        ("config.toml", "= 3", "config.toml' is not TOML"),
        ("summary.json", "{", "summary.json' is not JSON"),
        ("summary.json", "[]", "summary.json' holds no dict"),
        ("plans/round-001.safetensors", None, "round-001.safetensors' cannot be read"),
        ("plans/round-001.safetensors", "x", "round-001.safetensors' cannot be read"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, name, text, message):
    damage(simple_run(tmp_path), name, text)
    with pytest.raises(ConfigError) as caught:
        run_html(RunFolder.read(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_failed_at_once_says_why(tmp_path):
    simple_run(tmp_path, status="failed", reason="every client sits out round 1")
    (tmp_path / "rounds.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no finished round yet \(failed: every client sits out"):
        RunFolder.read(tmp_path)


def test_a_client_keeps_its_first_device(tmp_path):
    rows = [[client_row(1, 0)], [client_row(2, 0, device="other")]]
    run = RunFolder.read(
        write_run(tmp_path, [(round_row(n, 0.5, own), own) for n, own in enumerate(rows, 1)])
    )
    assert run.clients["device"].tolist() == ["phone", "phone"]


def test_numbers_that_are_none_are_read(tmp_path):
    """A diverged loss is written as NaN, which JSON of Python reads."""
    simple_run(tmp_path)
    text = (tmp_path / "rounds.jsonl").read_text()
    line = json.loads(text.splitlines()[0]) | {"loss": float("nan")}
    (tmp_path / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    assert np.isnan(RunFolder.read(tmp_path).rounds["loss"].iloc[0])
