"""Beside an epsilon stands nothing that clients sent, nor who was drawn: one file has that."""

import json
import logging
from pathlib import Path

import pytest

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import RunError
from d2ft_fl.records.run_folder import note_failure
from d2ft_fl.report.run_folder import RunFolder
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime import in_process
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.server import console
from d2ft_fl.trackers import scalars
from d2ft_fl.util.files import read_lines
from tests.aggregation.test_privacy import PRIVATE

# Of the noisy model, and of planning, which is of all clients.
MAY_DIFFER = {"metrics", "accuracy", "loss", "plan_seconds"}
HEARD: list[dict] = []


class Tracker:
    """Keeps what it hears."""

    def __init__(self, config, folder):
        HEARD.clear()

    def round(self, row):
        HEARD.append(row)

    def finish(self, summary):
        HEARD.append(summary)

    def fail(self, reason):
        HEARD.append({"reason": reason})


@pytest.fixture
def private(tmp_path, monkeypatch):
    """Runs with noise; with a seed of noise (who is drawn), and clients that do not answer."""

    def run(name, noise_seed, gone=(), **options):
        train = in_process.InProcessPool.train

        def some(self, work):
            for client, reply in train(self, work):
                if client not in gone:
                    yield client, reply

        entries = {
            **PRIVATE, "rounds": 2, "clients": 6, "sample-clients": 3, "test-examples": 40,
            "train-examples": 120, "noise-seed": noise_seed, "backward-score": "uniform",
            "forward-score": "uniform", "run-folder": str(tmp_path / name), **options,
            "trackers": "tests.server.test_private_record:Tracker",
        }  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(in_process.InProcessPool, "train", some)
            return run_local(checked(RunConfig.from_mapping(entries))), tmp_path / name

    return run


def public(row):
    return {key: value for key, value in row.items() if key not in MAY_DIFFER}


def test_the_record_does_not_depend_on_who_was_drawn_or_answered(private):
    (summary, one), heard = private("one", 1), list(HEARD)
    other_summary, two = private("two", 2, gone=(0, 1, 2, 3))
    measured = [[line["measured"] for line in read_lines(f / "private.jsonl")] for f in (one, two)]
    assert measured[0] != measured[1]  # others were drawn, and some failed
    assert sum(len(row["faults"]) for row in measured[1]) > 0
    rows = [[public(row) for row in read_lines(f / "rounds.jsonl")] for f in (one, two)]
    assert rows[0] == rows[1]
    assert [public(row) for row in heard[:2]] == rows[0]
    for name in ("clients.jsonl", "plans/round-001.safetensors", "plans/round-002.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert summary["resources"] == other_summary["resources"]
    assert summary["faults"] is summary["flops_as_predicted"] is None
    keys = set(scalars(heard[0])) | set(scalars(heard[-1]))
    assert not {key for key in keys if "train_loss" in key or "clock" in key}
    assert (one / "private.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_private_file_has_what_was_measured(private):
    _, folder = private("run", 1)
    first, second = read_lines(folder / "private.jsonl")
    rows = read_lines(folder / "rounds.jsonl")
    assert [first["round"], second["round"]] == [1, 2]
    for line, row in zip((first, second), rows, strict=True):
        worked = [client for client in line["clients"] if client["used"]]
        assert all(client["train_loss"] > 0 for client in worked)
        assert line["measured"]["worked"] == len(worked)
        assert line["measured"]["flops_as_predicted"] == len(worked)
        assert line["measured"]["wall_seconds"] > 0
        assert line["measured"]["epsilon"] == row["epsilon"]
        assert row["worked"] == row["clients"] == 3.0  # expected: half of six


def test_expected_totals_are_those_of_all_plans_times_the_chance(private):
    summary, folder = private("run", 1)
    lines = read_lines(folder / "clients.jsonl")
    assert len(lines) == 2 * 6
    flops = sum(line["used"]["flops"] for line in lines)
    assert summary["resources"]["flops"]["used"] == pytest.approx(flops / 2)
    assert summary["client_rounds"] == 6.0
    rows = read_lines(folder / "rounds.jsonl")  # everybody works: shares are as of the mean client
    share = sum(r["flops"]["used_mean"] for r in rows) / sum(r["flops"]["full_mean"] for r in rows)
    assert summary["resources"]["flops"]["share"] == pytest.approx(share)


def test_page_and_terminal_say_what_they_show(private, capsys):
    summary, folder = private("run", 1)
    page = (folder / "report.html").read_text()
    assert "only in private.jsonl" in page
    assert "train loss" not in page
    assert "faults</" not in page
    console.summary(summary)
    said = " ".join(capsys.readouterr().out.split())
    assert "private.jsonl has that" in said
    assert "0 faults" not in said
    assert RunFolder.read(folder).planned


def test_a_failure_does_not_tell_who_answered(private, caplog, tmp_path):
    with caplog.at_level(logging.WARNING), pytest.raises(RunError) as raised:
        private("run", 1, gone=range(6), **{"min-replies": 2})
    assert "client" not in str(raised.value).replace("clients answered", "")
    assert "min-replies = 2" in str(raised.value)
    assert HEARD[-1]["reason"] == f"RunError: {raised.value}"
    assert "clients answered in round 1" in caplog.text  # the operator's log says how many
    note_failure(tmp_path / "run", str(raised.value))
    assert "no answer" not in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]


def test_a_resumed_run_keeps_its_private_lines_and_its_time(private):
    _, folder = private("run", 1)
    before = read_lines(folder / "private.jsonl")
    again, _ = private("run", 1, **{"run-folder": "", "resume": str(folder), "rounds": 3})
    lines = read_lines(folder / "private.jsonl")
    assert lines[:2] == before
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert (folder / "private.jsonl").stat().st_mode & 0o777 == 0o600
    assert again["wall_seconds"] > sum(line["measured"]["wall_seconds"] for line in before)


def test_runs_without_noise_have_no_private_file(quick):
    config = quick(rounds=1)
    run_local(config)
    folder = Path(config.run_folder)
    assert not RunFolder.read(folder).planned
    assert not (folder / "private.jsonl").exists()
    assert not (folder / "releases.jsonl").exists()
