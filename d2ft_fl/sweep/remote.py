"""A trial in a worker process: an ordinary run on the in-process back end.

It writes its run folder wherever the worker is, and what is new in there goes along with every
report: whoever drives the sweep may be on another machine. A run writes lines to the end of
``.jsonl`` files and everything else anew.
"""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, D2FTError
from d2ft_fl.records.metrics import primary_of
from d2ft_fl.rounds.checks import checked

Changes = dict[str, tuple[int, bytes]]  # by path in the run folder: from which byte on, and what
Report = Callable[[dict[str, Any]], None]
ROUND, METRIC, CHANGES, OUTCOME = "round", "metric", "changes", "outcome"
MODELS = (".safetensors", "model.json")
OWN = ("config.toml", "status.json")  # of the folder that the sweep keeps


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        status: finished, stopped, failed or refused.
        reason: One line, but for finished.
        traceback: Of what went wrong in a way that nobody foresaw.
        seconds: From its start in the worker.
    """

    status: str
    reason: str = ""
    traceback: str = ""
    seconds: float = 0.0


@dataclass
class Files:
    """The files of a run folder, and what of them was sent already.

    Attributes:
        models: Whether to send models and adapters too, at the end.
    """

    folder: Path
    models: bool = False
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes, time of change

    def changes(self, end: bool = False) -> Changes:
        """Return what is new since the last call; models, which change every round, at the end."""
        changes: Changes = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if name in OWN or (_is_model(name) and not (self.models and end)):
                continue
            status = path.stat()
            now = status.st_size, status.st_mtime_ns
            before = self._sent.get(name)
            if now == before:
                continue
            offset = before[0] if before and path.suffix == ".jsonl" else 0
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(now[0] - offset)
            changes[name], self._sent[name] = (offset, content), now
        return changes


def _is_model(name: str) -> bool:
    return name.endswith(MODELS) and not name.startswith("plans/")


def run_trial(config: RunConfig, progress: Report) -> Outcome:
    """Check and run a configuration; what goes wrong is the outcome."""
    from d2ft_fl.runtime.in_process import run_local

    started = time.perf_counter()
    outcome = Outcome("finished")
    try:
        run_local(checked(config), progress, report=False)
    except ConfigError as error:
        outcome = Outcome("refused", str(error))
    except Exception as error:  # the boundary: a trial that fails does not stop the others
        known = isinstance(error, D2FTError)
        text = (str(error).strip() or "no message").splitlines()[0]
        reason = text if known else f"{type(error).__name__}: {text}"
        outcome = Outcome("failed", reason, traceback.format_exc())
    return replace(outcome, seconds=time.perf_counter() - started)


def trainable(settings: Mapping[str, Any]) -> None:
    """Run a trial; Ray Tune calls this in a worker, in a folder of the worker's own.

    The last round is reported with the outcome, so that nobody stops a trial that has run them all.

    Args:
        settings: The trial's ``id``, ``options`` of the run, ``start``, where the command was
            started (plug-ins lie there, and files that they read), ``path``, where it imports from,
            ``models``, whether to keep them.
    """
    from ray import tune

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        sys.path.extend(path for path in settings["path"] if path not in sys.path)
        if os.path.isdir(settings["start"]):
            os.chdir(settings["start"])
        files = Files(Path(scratch) / settings["id"], settings["models"])  # trackers show its name
        config = RunConfig.from_mapping(settings["options"])
        # A trial that is left begins again: nothing of its folder comes back before its end.
        config = replace(config, run_folder=str(files.folder), checkpoint_every=0)
        last: dict[str, Any] = {}

        def progress(row: dict[str, Any]) -> None:
            if (metric := primary_of(row)) is None:
                return
            last.update({ROUND: row["round"], METRIC: metric})
            if row["round"] < config.rounds:
                tune.report({**last, CHANGES: files.changes()})

        outcome = run_trial(config, progress)
        end = {OUTCOME: asdict(outcome), CHANGES: files.changes(end=True)}
        tune.report({**last, **end, "done": True})
