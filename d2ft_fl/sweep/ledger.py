"""Keeps the books while a sweep runs: what trials report goes to the folder and to who watches."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.remote import Changes, Outcome
from d2ft_fl.sweep.trials import Trial


class Watcher(Protocol):
    """Somebody who watches a sweep."""

    def started(self, trial: Trial) -> None:
        """A worker began with a trial."""

    def progressed(self, trial: Trial, round_number: int) -> None:
        """A trial has finished a round."""

    def ended(self, trial: Trial, outcome: Outcome, accuracy: float | None) -> None:
        """A trial has come to its end, with this accuracy after its last round."""


class Nobody:
    """Does not watch."""

    def started(self, trial: Trial) -> None:
        """Nothing."""

    def progressed(self, trial: Trial, round_number: int) -> None:
        """Nothing."""

    def ended(self, trial: Trial, outcome: Outcome, accuracy: float | None) -> None:
        """Nothing."""


class Ledger:
    """The trials of a sweep and how they stand.

    Attributes:
        trials: All of them, in order.
        states: By id.
        watcher: Is told what happens.
    """

    def __init__(self, folder: SweepFolder, trials: Sequence[Trial]):
        self.folder, self.trials = folder, list(trials)
        self.watcher: Watcher = Nobody()
        self.states = {trial.id: folder.state(trial.id) for trial in trials}
        self._by_id = {trial.id: trial for trial in trials}
        self._accuracy: dict[str, float | None] = {}

    def open(self, retry_failed: bool = False) -> list[Trial]:
        """Begin, or go on; returns the trials that are left to run.

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
        """A worker begins with a trial."""
        self.folder.begin(self._by_id[id])
        self._set(id, State("running"))
        self.watcher.started(self._by_id[id])

    def progressed(self, id: str, round_number: int, accuracy: float, changes: Changes) -> None:
        """A trial has finished a round, and left this in its folder."""
        self.folder.write(id, changes)
        self._accuracy[id] = accuracy
        self.watcher.progressed(self._by_id[id], round_number)

    def ended(
        self,
        id: str,
        outcome: Outcome,
        accuracy: float | None = None,
        changes: Changes | None = None,
    ) -> None:
        """A trial has come to its end."""
        trial = self._by_id[id]
        self.folder.write(id, changes or {})
        self.folder.end(trial, outcome)
        self._set(id, State(outcome.status, outcome.reason))
        known = accuracy if accuracy is not None else self._accuracy.get(id)
        self.watcher.ended(trial, outcome, known)

    def stopped(self, id: str, round_number: int, seconds: float) -> None:
        """A trial was stopped early."""
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
        """How many trials stand so."""
        return sum(state.status in statuses for state in self.states.values())

    def _set(self, id: str, state: State) -> None:
        self.states[id] = state
        self._write()

    def _write(self) -> None:
        self.folder.write_trials(self.trials, self.states)
