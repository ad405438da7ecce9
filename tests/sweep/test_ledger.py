"""Whatever cuts a sweep short, what ended stays, and what did not begins anew."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2ft_fl.sweep import folder as folder_module
from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.ledger import Ledger, Nobody
from d2ft_fl.sweep.remote import Outcome
from d2ft_fl.util import files
from tests.sweep.fake_trials import TRIALS as trials
from tests.sweep.fake_trials import events


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "sweep"
    path.mkdir()
    return SweepFolder(path)


class Killed(BaseException):
    """The process is gone."""


def run_some(ledger, todo, at_once):
    """Run trials, so many at once, a step of each in turn."""
    waiting, running = list(todo), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(events(waiting.pop(0), ledger))
        for trial in list(running):
            if next(trial, StopIteration) is StopIteration:
                running.remove(trial)


def listed(folder):
    return {t["trial"]: t["status"] for t in json.loads((folder.path / "trials.json").read_text())}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=4),
    at_once=st.integers(1, 3),
)
def test_no_trial_is_lost_and_none_that_ended_runs_again(cuts, at_once, tmp_path_factory):
    """The process is cut off at any write of a status or of the list, before or after it."""
    folder = SweepFolder(tmp_path_factory.mktemp("sweep"))
    write_json, write, starts = folder_module._write_json, SweepFolder.write, Counter()
    ended = []

    def run(cut, after):
        left = [cut]

        def counted(function):
            def called(*arguments):
                left[0] -= 1
                if left[0] == 0 and not after:
                    raise Killed
                function(*arguments)
                if left[0] == 0 and after:
                    raise Killed

            return called

        with pytest.MonkeyPatch.context() as patch:
            for module in (folder_module, files):
                patch.setattr(module, "sync", lambda path: None)
            patch.setattr(folder_module, "_write_json", counted(write_json))
            patch.setattr(SweepFolder, "write", counted(write))
            ledger = Ledger(folder, trials)
            todo = ledger.open()
            assert not {trial.id for trial in todo} & set(ended)
            run_some(ledger, todo, at_once)

    for cut, after in cuts:
        try:
            run(cut, after)
        except Killed:
            ended = [t.id for t in trials if folder.state(t.id).status == "finished"]
    run(10_000, False)
    assert listed(folder) == {trial.id: "finished" for trial in trials}
    for line in folder.path.joinpath("starts.log").read_text().splitlines():
        starts[line.split()[-1]] += 1
    assert set(starts) == {trial.id for trial in trials}
    # What was not in flight at a cut was not started again.
    assert sum(starts.values()) <= len(trials) + at_once * len(cuts)
    for trial in trials:
        assert [row["round"] for row in folder.rows(trial.id)] == [1, 2, 3]


def test_a_second_start_has_nothing_left_to_do(folder):
    ledger = Ledger(folder, trials)
    run_some(ledger, ledger.open(), 2)
    assert Ledger(folder, trials).open() == []


def test_what_is_added_runs_and_what_is_taken_away_is_not_lost(folder):
    ledger = Ledger(folder, trials[:2])
    run_some(ledger, ledger.open(), 1)
    ledger = Ledger(folder, [trials[2], trials[1]])
    assert ledger.open() == [trials[2]]
    assert listed(folder) == {trials[2].id: "waiting", trials[1].id: "finished"}
    assert Ledger(folder, trials).open() == trials[2:]


def test_what_only_a_worker_refused_is_tried_again(folder):
    """The hub may have been away, or the GPU; what options alone rule out stays refused."""
    for trial in trials[:2]:
        folder.begin(trial)
        folder.end(trial, Outcome("refused", "dataset 'hub:a/b' cannot be had"))
    known = replace(trials[1], refused="slots = 12 is more than batch-size = 8")
    assert Ledger(folder, [trials[0], known]).open() == [trials[0]]


def test_what_ended_while_the_sweep_was_stopped_stays(folder):
    """Ctrl-C comes between a trial's end on the disk and in the books."""
    ledger = Ledger(folder, trials)
    ledger.open()
    for trial in trials[:2]:
        ledger.started(trial.id)
    folder.write(trials[0].id, {"summary.json": (0, b"{}")})
    folder.end(trials[0], Outcome("finished"))
    ledger.close()
    assert listed(folder)[trials[0].id] == "finished"
    assert Ledger(folder, trials).open() == trials[1:]


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_only_failures_run_again_and_only_when_asked(status, folder):
    folder.begin(trials[0])
    folder.write(trials[0].id, {"summary.json": (0, b"{}"), "error.txt": (0, b"old")})
    folder.end(trials[0], Outcome(status, "a reason"))
    assert Ledger(folder, trials[:1]).open() == []
    again = Ledger(folder, trials[:1]).open(retry_failed=True)
    assert again == (trials[:1] if status == "failed" else [])
    assert folder.trial(trials[0].id).exists() == (status != "failed")


def test_what_cannot_run_is_refused_and_not_started(folder):
    refused = replace(trials[0], refused="slots = 12 is more than batch-size = 8")
    ledger = Ledger(folder, [refused, trials[1]])
    assert ledger.open() == [trials[1]]
    assert ledger.states[refused.id] == State("refused", refused.refused)
    assert folder.state(refused.id) == State("refused", refused.refused)


def test_a_trial_in_flight_waits_again_when_the_sweep_is_stopped(folder):
    ledger = Ledger(folder, trials)
    ledger.open()
    ledger.started(trials[0].id)
    assert listed(folder)[trials[0].id] == "running"
    ledger.close()
    assert listed(folder)[trials[0].id] == "waiting"
    assert not folder.trial(trials[0].id).exists()


def test_a_trial_stopped_early_says_after_which_round(folder):
    ledger = Ledger(folder, trials)
    ledger.open()
    ledger.started(trials[0].id)
    ledger.progressed(trials[0].id, 2, 0.5, {})
    ledger.stopped(trials[0].id, 2, 3.0)
    assert folder.state(trials[0].id) == State("stopped", "after round 2 of 3, behind the others")


def test_who_watches_is_told_the_last_accuracy(folder):
    told = []

    class Watcher(Nobody):
        def ended(self, trial, outcome, accuracy):
            told.append((trial, outcome.status, accuracy))

    ledger = Ledger(folder, trials)
    ledger.watcher = Watcher()
    ledger.started(trials[0].id)
    ledger.progressed(trials[0].id, 1, 0.5, {})
    ledger.ended(trials[0].id, Outcome("failed", "x"))
    ledger.ended(trials[1].id, Outcome("failed", "x"))
    assert told == [(trials[0], "failed", 0.5), (trials[1], "failed", None)]
