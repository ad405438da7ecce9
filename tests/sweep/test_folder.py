import json
import os
import signal
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.sweep.folder import SCRATCH, State, SweepFolder
from d2ft_fl.sweep.remote import Outcome
from tests.sweep.fake_trials import TRIALS as trials


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "sweep"
    path.mkdir()
    return SweepFolder(path)


def test_a_trial_leaves_an_ordinary_run_folder(folder):
    trial = trials[0]
    folder.begin(trial)
    assert folder.state(trial.id) == State()  # as long as it has not ended
    folder.write(trial.id, {"rounds.jsonl": (0, b'{"round": 1}\n'), "plans/a.bin": (0, b"\0\1")})
    folder.write(trial.id, {"rounds.jsonl": (13, b'{"round": 2}\n')})
    folder.write(trial.id, {"summary.json": (0, b'{"accuracy": 0.5, "folder": "/there"}')})
    folder.end(trial, Outcome("finished"))
    path = folder.trial(trial.id)
    assert folder.state(trial.id) == State("finished")
    assert [row["round"] for row in folder.rows(trial.id)] == [1, 2]
    assert path.joinpath("plans", "a.bin").read_bytes() == b"\0\1"
    assert json.loads(path.joinpath("summary.json").read_text()) == {
        "accuracy": 0.5, "folder": str(path)
    }  # fmt: skip
    options = tomllib.loads(path.joinpath("config.toml").read_text())
    assert options == replace(trial.config, run_folder=str(path)).to_mapping()


def test_a_new_start_forgets_what_was_there_and_is_counted(folder):
    trial = trials[0]
    for _ in range(2):
        folder.begin(trial)
        folder.write(trial.id, {"rounds.jsonl": (0, b'{"round": 1}\n')})
    folder.begin(trial)
    assert folder.rows(trial.id) == []
    starts = folder.path.joinpath("starts.log").read_text().splitlines()
    assert [line.split()[-1] for line in starts] == [trial.id] * 3


def test_a_failure_keeps_its_reason_and_its_traceback(folder):
    folder.begin(trials[0])
    folder.end(trials[0], Outcome("failed", "OSError: no disk", "Traceback ...\nOSError: no disk"))
    assert folder.state(trials[0].id) == State("failed", "OSError: no disk")
    assert "Traceback" in folder.trial(trials[0].id).joinpath("error.txt").read_text()


def test_a_trial_that_never_started_can_end(folder):
    folder.end(trials[0], Outcome("refused", "slots = 12 is more"))
    assert folder.state(trials[0].id) == State("refused", "slots = 12 is more")
    assert folder.trial(trials[0].id).joinpath("config.toml").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"status": "running", "reason": ""}', "3"])
def test_a_status_that_says_nothing_means_that_the_trial_waits(text, folder):
    folder.begin(trials[0])
    folder.trial(trials[0].id).joinpath("status.json").write_text(text)
    assert folder.state(trials[0].id) == State()


def test_rounds_are_read_up_to_a_line_that_is_broken(folder):
    folder.begin(trials[0])
    folder.write(trials[0].id, {"rounds.jsonl": (0, b'{"round": 1}\n{"rou')})
    assert [row["round"] for row in folder.rows(trials[0].id)] == [1]


def test_the_list_of_trials_is_as_agreed(folder):
    states = {trial.id: State() for trial in trials}
    states[trials[1].id] = State("failed", "no disk")
    folder.write_trials(trials, states)
    listed = json.loads(folder.path.joinpath("trials.json").read_text())
    assert [entry["trial"] for entry in listed] == [trial.id for trial in trials]
    assert listed[1] == {
        "trial": trials[1].id, "settings": {"lr": 2e-3, "seed": 0}, "status": "failed",
        "reason": "no disk",
    }  # fmt: skip


def test_two_processes_do_not_work_in_one_folder(folder):
    locked, is_locked = os.pipe()
    other = os.fork()
    if other == 0:
        with folder.locked():
            os.write(is_locked, b"x")
            signal.pause()
    os.read(locked, 1)
    with pytest.raises(ConfigError, match="another d2ft sweep is at work in"), folder.locked():
        pass
    scratch = Path(folder.path.joinpath("sweep.lock").read_text())
    assert scratch.is_dir()
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    with folder.locked():  # the lock died with it, and what it left is removed
        assert not scratch.exists()


def test_what_does_not_outlast_the_process_is_gone_after(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folder.locked() as scratch:
        assert scratch.name.startswith(SCRATCH)
        scratch.joinpath("more").mkdir()
    assert not scratch.exists()


def test_a_lock_names_nothing_else_to_remove(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    folder.path.joinpath("sweep.lock").write_text(str(precious))
    with folder.locked():
        assert precious.is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to"):
        SweepFolder(tmp_path / "x").locked().__enter__()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    tmp_path.joinpath("file").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot be written to"),
        SweepFolder(tmp_path / "file").locked(),
    ):
        pass
