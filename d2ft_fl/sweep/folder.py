"""A sweep's folder, the truth about its trials: whatever ends the process, what is here holds.

sweep.toml               the sweep as it was asked for, resolved
trials.json              every trial: id, settings, status, reason
trials/ID/               a run folder each (``recorder.py``), with error.txt where it failed
results.parquet, results.csv   a row a trial
report.html              the page
starts.log               a line for every start of a trial: when, and which
sweep.lock               held while a process works here

A trial's status is in its folder's ``status.json``, which is written first when a trial starts and
last when it has ended, everything else being safe on the disk by then; ``trials.json`` repeats it.
Only the process that holds the lock writes here, workers send it their files. So a worker that
outlives its sweep can spoil nothing, and no worker needs to see this folder.
"""

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2ft_fl.errors import ConfigError
from d2ft_fl.records.run_folder import read_rows
from d2ft_fl.sweep.remote import Changes, Outcome
from d2ft_fl.sweep.trials import Trial
from d2ft_fl.util.files import put_in_place, sync, unlock
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.toml import dump_toml

SCRATCH = "d2ft-sweep-"


@dataclass(frozen=True)
class State:
    """How a trial stands: waiting, running, finished, stopped (early), failed, or refused."""

    status: str = "waiting"
    reason: str = ""


class SweepFolder:
    """One sweep's folder."""

    def __init__(self, path: Path):
        self.path = path

    def trial(self, id: str) -> Path:
        """Return a trial's run folder."""
        return self.path / "trials" / id

    @contextmanager
    def locked(self) -> Iterator[Path]:
        """Work here alone; yields a folder for what does not outlast this process.

        The lock goes with the process, however it ends. What it leaves behind elsewhere is named
        in the lock's file, for the next one to remove.

        Raises:
            ConfigError: When another process works here, or the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.path.joinpath("sweep.lock").open("a+")
        except OSError as error:
            raise ConfigError(
                f"sweep folder {str(self.path)!r} cannot be written to: {error.strerror}"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another d2ft sweep is at work in {str(self.path)!r}; wait until it is done, "
                    "or name another folder by --output"
                ) from None
            except OSError as error:
                raise ConfigError(
                    f"sweep folder {str(self.path)!r} cannot be locked ({error.strerror}); name a "
                    "folder on a local disk by --output"
                ) from None
            lock.seek(0)
            if (left := Path(lock.read().strip())).name.startswith(SCRATCH):
                shutil.rmtree(left, ignore_errors=True)
            scratch = tempfile.mkdtemp(prefix=SCRATCH)
            lock.truncate(0)
            lock.write(scratch)
            lock.flush()
            try:
                yield Path(scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                lock.truncate(0)
                unlock(lock.fileno())

    # -- what is there -----------------------------------------------------------------------

    def state(self, id: str) -> State:
        """Read how a trial stands; one that did not come to its end is waiting."""
        try:
            entries = json.loads(self.trial(id).joinpath("status.json").read_text())
            state = State(str(entries["status"]), str(entries["reason"]))
        except (OSError, ValueError, KeyError, TypeError):
            return State()
        return State() if state.status in ("waiting", "running") else state

    def rows(self, id: str) -> list[dict[str, Any]]:
        """Return the rounds that a trial has on record, as today's runs write them."""
        return read_rows(self.trial(id))

    # -- what becomes of a trial ---------------------------------------------------------------

    def clear(self, id: str) -> None:
        """Forget a trial."""
        shutil.rmtree(self.trial(id), ignore_errors=True)

    def begin(self, trial: Trial) -> None:
        """Start a trial's folder anew."""
        self.clear(trial.id)
        _write_json(self._made(trial) / "status.json", {"status": "running", "reason": ""})
        with self.path.joinpath("starts.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {trial.id}\n")

    def _made(self, trial: Trial) -> Path:
        """Make a trial's folder, with its configuration in it."""
        folder = self.trial(trial.id)
        folder.mkdir(parents=True, exist_ok=True)
        entries = trial.config.to_mapping() | {"run-folder": str(folder)}
        folder.joinpath("config.toml").write_text(dump_toml(entries), encoding="utf-8")
        return folder

    def write(self, id: str, changes: Changes) -> None:
        """Write what a worker has sent of a trial's files."""
        folder = self.trial(id)
        for name, (offset, content) in changes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(content)

    def end(self, trial: Trial, outcome: Outcome) -> None:
        """Make a trial's end known, once all that it left is safe."""
        folder = self._made(trial)
        if outcome.status == "finished":  # it was somewhere else when it wrote this
            path = folder / "summary.json"
            summary = json.loads(path.read_text()) | {"folder": str(folder)}
            path.write_text(write_json(summary, indent=2) + "\n")
        if outcome.traceback:
            folder.joinpath("error.txt").write_text(outcome.traceback)
        for path in (folder.parent, *folder.rglob("*")):
            sync(path)
        state = {"status": outcome.status, "reason": outcome.reason}
        _write_json(folder / "status.json", state)

    def write_trials(self, trials: Sequence[Trial], states: Mapping[str, State]) -> None:
        """Write the list of trials."""
        rows = [
            {
                "trial": trial.id,
                "settings": dict(trial.settings),
                "status": states[trial.id].status,
                "reason": states[trial.id].reason,
            }
            for trial in trials
        ]
        _write_json(self.path / "trials.json", rows)


def _write_json(path: Path, value: Any) -> None:
    """Write a file so that it is the old one or the new one whenever the machine stops."""
    part = path.with_name(path.name + ".part")
    part.write_text(write_json(value, indent=1) + "\n")
    put_in_place(part, path)
