"""The guard of a command: ends it, and all that it started, with whoever asked for it.

Flower's SuperLink starts processes that start others, in sessions of their own: no signal reaches
all of them, and they outlive each other. So the SuperLink is started as

    python -m d2ft_fl.runtime.guard LIFELINE LOCK FOLDER COMMAND ...

with file descriptors of a lifeline and of the lock of the command's folder. The guard is the parent
of what loses its own (on Linux), imports little, and ends, when the command does or the lifeline,
with all of the family gone and the folder deleted.

A guard can be killed, too. What then lives on is found by its environment, in which
:data:`HOME` is the folder: :func:`end_family` and :func:`left_behind`.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from d2ft_fl.util import lifeline as lifelines
from d2ft_fl.util import scratch
from d2ft_fl.util.scratch import Scratch

HOME = "FLWR_HOME"  # environment variable of every process of a family: its folder
OPTIONS = "run.toml"  # in there: the options of the run
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0  # for processes to end by themselves, where whoever asked for them lives
KILL_SECONDS = 5.0  # for killed ones to be gone, and those that they started meanwhile
PR_SET_CHILD_SUBREAPER = 36


def start(
    home: Scratch, command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> "Guarded":
    """Start a command in its folder, under a guard that deletes this in the end.

    Args:
        home: The folder, which is the guard's from now on.
        command: What to start.
        log: Where it prints.
        environment: Its variables, with the folder as :data:`HOME`.
    """
    reader, writer = lifelines.new()
    arguments = [str(reader), str(home.lock), str(home.path), *command]
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            pass_fds=(reader, home.lock),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=home.path,
            start_new_session=True,  # Ctrl-C is for this process, which stops it
        )
    os.close(reader)
    return Guarded(process, home, writer)


@dataclass(frozen=True)
class Guarded:
    """A command under a guard, as whoever asked for it sees it.

    Attributes:
        process: The guard, which ends when the command does.
        home: The command's folder.
        lifeline: Its writing end.
    """

    process: subprocess.Popen
    home: Scratch
    lifeline: int

    def end(self) -> None:
        """End the command with all that it started, and delete its folder."""
        lifelines.cut(self.lifeline)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2 * (GRACE_SECONDS + KILL_SECONDS))
        if self.home.path.exists():  # the guard was killed
            end_family(self.home.path, GRACE_SECONDS)
        self.home.delete()


# -- families ------------------------------------------------------------------------------------


def family(home: Path) -> set[psutil.Process]:
    """Return the processes that belong to a folder, but for this one.

    They have it in their environment, or descend from one that has: some of Ray's write their title
    over their environment. Orphans of a guard's family are its children.
    """
    members = {p for p in psutil.process_iter() if home_of(p) == str(home)}
    own = psutil.Process()
    if os.environ.get(HOME) == str(home):
        members.add(own)
    for member in list(members):
        with suppress(psutil.NoSuchProcess):
            members.update(member.children(recursive=True))
    return members - {own}


def home_of(process: psutil.Process) -> str | None:
    """Return the folder of the family that a process belongs to."""
    try:
        return process.environ().get(HOME)
    except (psutil.Error, OSError):
        return None


def end_family(home: Path, grace: float = 0.0) -> None:
    """End every process that belongs to a folder, orphans included.

    Args:
        home: The folder.
        grace: Seconds for them to end by themselves, before they are killed.
    """
    told: set[psutil.Process] = set()
    for end, seconds in ((psutil.Process.terminate, grace), (psutil.Process.kill, KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (left := family(home)):
            for member in left if end is psutil.Process.kill else left - told:
                with suppress(psutil.NoSuchProcess):
                    end(member)
            told |= left
            psutil.wait_procs(left, timeout=min(POLL_SECONDS, deadline - time.monotonic()))


@dataclass(frozen=True)
class Left:
    """A family that lives on though its guard and whoever asked for it are gone.

    Attributes:
        home: Its folder.
        run_folder: Of the run that it carries out; None where that cannot be read.
        processes: Its members.
    """

    home: Path
    run_folder: Path | None
    processes: set[psutil.Process]


def left_behind() -> list[Left]:
    """Return the families of this user that live on; delete the folders of those that do not."""
    homes = {Path(home) for p in psutil.process_iter() if (home := home_of(p))}
    lost = {home for home in homes if home.name.startswith(scratch.FLOWER)}
    lost = {home for home in lost if not scratch.is_locked(home)}
    for folder in scratch.found([scratch.FLOWER]):
        if folder not in lost:
            scratch.delete_unless_locked(folder)
    found = [Left(home, _run_folder(home), family(home)) for home in sorted(lost)]
    return [left for left in found if left.processes]


def _run_folder(home: Path) -> Path | None:
    try:
        return Path(tomllib.loads(home.joinpath(OPTIONS).read_text())["run-folder"])
    except (OSError, ValueError, KeyError):
        return None


# -- the process ---------------------------------------------------------------------------------


def main() -> int:
    """Start the command, wait until it ends or the lifeline does, and end the rest."""
    reader, _, folder, *command = sys.argv[1:]
    _adopt_orphans()
    process = subprocess.Popen(command)
    code, calmly = _wait(process, int(reader))
    home = Path(folder)
    end_family(home, GRACE_SECONDS if calmly else 0.0)
    scratch.delete(home)
    scratch.prune()
    return code


def _adopt_orphans() -> None:
    """Be the parent of every descendant whose parent ends; nothing but on Linux."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait(process: subprocess.Popen, lifeline: int) -> tuple[int, bool]:
    """Return how the command ended, and whether there is time for the others to."""
    ends: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(signal.SIGTERM))
    while not ends:
        if select.select([lifeline], [], [], POLL_SECONDS)[0]:
            return 0, os.read(lifeline, 1) == lifelines.CALMLY
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == process.pid:
                    process.returncode = os.waitstatus_to_exitcode(ended[1])
                    return process.returncode, True
    return -ends[0], True


if __name__ == "__main__":
    sys.exit(main())
