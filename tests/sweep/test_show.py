import pytest
from rich.console import Console

from d2ft_fl.sweep import show
from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.ledger import Ledger
from d2ft_fl.sweep.remote import Outcome
from d2ft_fl.sweep.results import Setting
from d2ft_fl.sweep.show import Clock, Show, duration, setting_text
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.util import terminal
from tests.sweep.fake_trials import TRIALS
from tests.tasks.made_up import DISTANCE

ACCURACY = MetricSpec.of(ImageClassification())


@pytest.fixture
def at(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])

    def set_to(seconds):
        now[0] = 100.0 + seconds

    return set_to


def test_what_is_left_takes_as_long_as_what_is_done(at):
    clock = Clock(4)
    assert str(clock) == ""
    at(50)  # until the first worker is there
    clock.start()
    clock.part("a", 0.25)
    at(60)
    clock.part("a", 0.5)
    clock.part("b", 0.5)
    assert str(clock) == "30 s left"  # one of four in 10 s
    clock.part("a", 1.0)
    assert str(clock) == "17 s left"
    at(1000)
    for id in "bcd":
        clock.part(id, 1.0)
    assert str(clock) == ""


@pytest.mark.parametrize(
    "seconds,text",
    [(0.4, "0 s"), (99, "99 s"), (121, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_times_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_settings_are_one_line():
    settings = {"lr": 0.000836428, "slots": 4, "checkpointing": True, "strategy": "d2ft"}
    assert setting_text(settings) == "lr=0.0008364 slots=4 checkpointing=true strategy=d2ft"


def test_a_terminal_has_a_bar_with_what_runs_fails_and_is_best(monkeypatch):
    console = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr(terminal, "console", console)
    with Show(len(TRIALS), 2, ACCURACY, quiet=False) as shown:
        for trial in TRIALS[:3]:
            shown.started(trial)
        shown.progressed(TRIALS[2], 1)
        shown.ended(TRIALS[0], Outcome("finished", seconds=3.0), 0.5)
        shown.ended(TRIALS[1], Outcome("failed", "OSError: no disk", seconds=1.0), None)
        task = shown.progress.tasks[0]
        assert task.description == "1 running, 1 failed, best 50.0%"
        assert (task.completed, task.total) == (4.25, 6)  # and a round of three, and the end
        assert task.fields["count"] == "4/6"
    said = console.export_text()
    assert f"3/6 {TRIALS[0].id} lr=0.001 seed=0: accuracy 50.0%, 3 s\n" in said
    assert f"4/6 {TRIALS[1].id} lr=0.002 seed=0: failed: OSError: no disk, 1 s\n" in said


def test_a_metric_that_is_minimised_is_shown_as_a_number_and_the_least_is_best(monkeypatch, capsys):
    console = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr(terminal, "console", console)
    with Show(len(TRIALS), 0, DISTANCE, quiet=False) as shown:
        for trial, distance in zip(TRIALS, (3.0, 1.5, 2.0), strict=False):
            shown.started(trial)
            shown.ended(trial, Outcome("finished", seconds=3.0), distance)
        assert shown.progress.tasks[0].description == "0 running, best 1.500"
    show.settings_table([Setting({"lr": 1}, 2, 2, 0, 1.5, 0.25, 0.5, 3.0, 2.0)], DISTANCE)
    said = console.export_text()
    assert "lr=0.001 seed=0: distance 3.000, 3 s\n" in said
    assert "Distance after the last round, mean and deviation" in said
    assert "1.5 ± 0.25" in said


def test_long_lists_are_cut_and_say_so(capsys, tmp_path):
    best = [Setting({"lr": n}, 1, 1, 0, 1 - n / 100, None, 0.5, 3.0, 2.0) for n in range(50)]
    show.settings_table([*best, Setting({"lr": 99}, 1, 0)], ACCURACY)
    said = capsys.readouterr().out
    assert "the best 40 of 50 settings; results.csv has all trials" in said
    assert "1 of 51 settings without a finished trial" in said

    ledger = Ledger(SweepFolder(tmp_path), TRIALS * 6)
    ledger.states = {trial.id: State("failed", "no disk") for trial in TRIALS}
    show.ends(ledger)
    said = capsys.readouterr().out
    assert said.count(": no disk") == 10
    assert "failed: 14 more; trials.json has all reasons" in said
