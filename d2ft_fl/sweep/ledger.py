"""What trials report while a sweep runs goes to its folder and to whoever watches."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.remote import Changes, Outcome
from d2ft_fl.sweep.trials import Trial


class Watcher(Protocol):
    """Whoever is told how a sweep goes on."""

    def started(self, trial: Trial) -> None:
        """Hear that a worker began with a trial."""

    def progressed(self, trial: Trial, round_number: int) -> None:
        """Hear that a trial has finished a round."""

    def ended(self, trial: Trial, outcome: Outcome, metric: float | None) -> None:
        """Hear that a trial has ended.

        Args:
            trial: The trial.
            outcome: How it ended.
            metric: The primary metric after the last round that was evaluated; None for none.
        """


class Nobody:
    """A watcher that does nothing."""

    def started(self, trial: Trial) -> None:
        """Do nothing."""

    def progressed(self, trial: Trial, round_number: int) -> None:
        """Do nothing."""

    def ended(self, trial: Trial, outcome: Outcome, metric: float | None) -> None:
        """Do nothing."""


class Ledger:
    """The trials of a sweep and how they stand.

    Attributes:
        folder: The sweep's folder.
        trials: All of them, in order.
        states: By id.
        watcher: Is told what happens.
    """

    def __init__(self, folder: SweepFolder, trials: Sequence[Trial]):
        self.folder, self.trials = folder, list(trials)
        self.watcher: Watcher = Nobody()
        self.states = {trial.id: folder.state(trial.id) for trial in trials}
        self._by_id = {trial.id: trial for trial in trials}
        self._metric: dict[str, float | None] = {}

    def open(self, retry_failed: bool = False) -> list[Trial]:
        """Begin or continue the sweep; returns the trials that are left to run.

        Trials that never came to an end are forgotten and begin anew; what is known not to run is
        refused.
        """
        for trial in self.trials:
            state = self.states[trial.id]
            # What only a worker refused may have been for what is not there today: hub, disk, GPU.
            again = state.status == "refused" and not trial.refused
            if again or (state.status == "failed" and retry_failed):
                self.states[trial.id] = state = State()
            if state.status != "waiting":
                continue
            self.folder.clear(trial.id)
            if trial.refused:
                self.states[trial.id] = State("refused", trial.refused)
                self.folder.end(trial, Outcome("refused", trial.refused))
        self._write()
        return [trial for trial in self.trials if self.states[trial.id].status == "waiting"]

    def started(self, id: str) -> None:
        """Take down that a worker begins with a trial."""
        self.folder.begin(self._by_id[id])
        self._set(id, State("running"))
        self.watcher.started(self._by_id[id])

    def progressed(self, id: str, round_number: int, metric: float, changes: Changes) -> None:
        """Take down that a trial has finished a round.

        Args:
            id: Of the trial.
            round_number: Of the round.
            metric: The primary metric after it.
            changes: What the round left in the trial's folder.
        """
        self.folder.write(id, changes)
        self._metric[id] = metric
        self.watcher.progressed(self._by_id[id], round_number)

    def ended(
        self,
        id: str,
        outcome: Outcome,
        metric: float | None = None,
        changes: Changes | None = None,
    ) -> None:
        """Take down that a trial has ended.

        Args:
            id: Of the trial.
            outcome: How it ended.
            metric: The primary metric after the last round; None if only earlier rounds have one.
            changes: What the trial left in its folder since its last report.
        """
        trial = self._by_id[id]
        self.folder.write(id, changes or {})
        self.folder.end(trial, outcome)
        self._set(id, State(outcome.status, outcome.reason))
        last = metric if metric is not None else self._metric.get(id)
        self.watcher.ended(trial, outcome, last)

    def stopped(self, id: str, round_number: int, seconds: float) -> None:
        """Take down that a trial was stopped early."""
        rounds = self._by_id[id].config.rounds
        reason = f"after round {round_number} of {rounds}, behind the others"
        self.ended(id, Outcome("stopped", reason, seconds=seconds))

    def close(self) -> None:
        """Forget what is still running, as this process ends."""
        running = [id for id, state in self.states.items() if state.status == "running"]
        for id in running:
            self.states[id] = self.folder.state(id)  # it may have ended, and nobody been told yet
            if self.states[id].status == "waiting":
                self.folder.clear(id)
        if running:
            with suppress(OSError):  # which is why it ends, perhaps
                self._write()

    def count(self, *statuses: str) -> int:
        """Count the trials with one of some statuses."""
        return sum(state.status in statuses for state in self.states.values())

    def _set(self, id: str, state: State) -> None:
        self.states[id] = state
        self._write()

    def _write(self) -> None:
        self.folder.write_trials(self.trials, self.states)
