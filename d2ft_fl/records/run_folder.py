"""The run folder: made, claimed, locked, read."""

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from d2ft_fl.config.run_config import RunConfig, resolve_path
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.records.metrics import with_metrics
from d2ft_fl.util.files import read_lines, unlock
from d2ft_fl.util.strict_json import write_json

Progress = Callable[[dict[str, Any]], None]  # is called with each round's line


def claim_folder(config: RunConfig) -> Path:
    """Make a run's folder, private to the user, and return its absolute path.

    It is a new one under the user's data folder, unless ``run-folder`` names one; a run that is
    resumed keeps its own. The status of the run is then ``starting``.

    Raises:
        ConfigError: When it cannot be written to, or holds a run already, or none to resume.
        RunError: When another process is at work on it.
    """
    try:
        if config.resume:
            folder = _folder_of(config)
        elif not config.run_folder:
            folder = _new_folder(config)
        else:
            folder = resolve_path(config.run_folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.joinpath("rounds.jsonl").exists():
                raise ConfigError(
                    f"run-folder = {str(folder)!r} already holds a run; name another folder, or go "
                    f"on with that run: d2ft run --resume {str(folder)!r}"
                )
        with only_one(folder):
            done = stands(read_status(folder)) == "finished"
            write_status(folder, "starting", before="finished" if done else None)
    except OSError as error:
        where = config.run_folder or config.resume or error.filename
        raise ConfigError(
            f"run-folder = {where!r} cannot be written to: {error.strerror}"
        ) from None
    return folder


def _folder_of(config: RunConfig) -> Path:
    """Return the folder of the run to resume."""
    folder = resolve_path(config.resume)
    if config.run_folder and resolve_path(config.run_folder) != folder:
        raise ConfigError(
            f"resume = {config.resume!r} goes on in its own folder: leave run-folder empty"
        )
    if not folder.joinpath("config.toml").is_file():
        raise ConfigError(f"resume = {config.resume!r} holds no run: there is no config.toml in it")
    rows = read_rows(folder)
    if stands(read_status(folder)) == "finished" and len(rows) >= config.rounds:
        raise ConfigError(
            f"resume = {config.resume!r} has finished all of rounds = {len(rows)}; set more rounds "
            "to go on"
        )
    return folder


def note_failure(folder: Path, reason: str) -> None:
    """Write that a run failed, unless another process is at work on it or has finished it."""
    with contextlib.suppress(OSError, RunError), only_one(folder):
        entries = read_status(folder)
        if entries.get("status") in ("starting", "running", None):
            write_status(folder, "failed", reason, entries.get("before"))


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a run's folder, as long as this process lives.

    Raises:
        RunError: When another process holds it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(_in_the_way(folder)) from None
        try:
            yield
        finally:
            unlock(held)
    finally:
        os.close(held)


def _in_the_way(folder: Path) -> str:
    """Say who is at work on a run's folder; where that cannot be known (not Linux), that one is."""
    holders, status = set(), folder.stat()
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or closed by now
            if os.path.samestat(handle.stat(), status):
                holders.add(int(handle.parts[2]))
    numbers = " ".join(map(str, sorted(holders - {os.getpid()})))
    who, how = (f" ({numbers})", f": kill {numbers}") if numbers else ("", "")
    return f"another process{who} is at work on {str(folder)!r}; stop it first{how}"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rounds of a run as today's runs write them, up to the first broken line."""
    return [with_metrics(line) for line in read_lines(folder / "rounds.jsonl")]


def read_status(folder: Path) -> dict[str, Any]:
    """Read what :func:`write_status` wrote; empty where there is nothing."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(folder.joinpath("status.json").read_text())
    return {}


def stands(entries: Mapping[str, Any]) -> str:
    """Say how a run stands; a run that could not be resumed stands as it did before."""
    before = entries.get("before")
    begins = entries.get("status") in ("starting", "failed")
    return str(before if begins and before else entries.get("status"))


def _new_folder(config: RunConfig) -> Path:
    root = platformdirs.user_data_path("d2ft-fl", appauthor=False) / "runs"
    root.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(config.strategy).name}-seed{config.seed}"
    for attempt in itertools.count(1):
        folder = root / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            return folder
    raise AssertionError("unreachable")


def write_status(folder: Path, status: str, reason: str = "", before: str | None = None) -> None:
    """Write how a run stands.

    Args:
        folder: The run folder.
        status: ``starting``, ``running``, ``finished`` or ``failed``.
        reason: Why it failed.
        before: ``finished``, of a run that was and is started again, until its rounds go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "status.json", folder / "status.json.part"
    entries = {"status": status, "reason": reason} | ({"before": before} if before else {})
    text = write_json(entries) + "\n"
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:  # where the disk is full, there is the room that the file has
        partial.unlink(missing_ok=True)
        with path.open("r+b", buffering=0) as file:
            file.write(text.encode())
            file.truncate()
