"""Guards: what a command started ends with it, and its temporary files go, though it be killed.

A guard is a process that is started as

    python -m d2ft_fl.runtime.guard PARENT LIFELINE LOCK FOLDER [COMMAND ...]

with the number of the process that starts it, and file descriptors of a lifeline and of the lock of
a folder. It imports little, and waits for the end of its command, if it has one, or of the
lifeline. Then it ends all processes that belong to the folder, and deletes that.

A process belongs to the folder that one of :data:`HOMES` in its environment names. Flower's
SuperLink has one: it starts processes that start others, in sessions of their own, so that no
signal reaches all of them, and they outlive each other. On Linux its guard is also the parent of
those that lose theirs. The folder of :func:`temporary_files` is another. A guard can be killed,
too; what then lives on is what :func:`left_behind` returns.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from d2ft_fl.util import lifeline as lifelines
from d2ft_fl.util import scratch
from d2ft_fl.util.scratch import Scratch

HOME = "FLWR_HOME"  # environment variable: the folder of a SuperLink
HOMES = (HOME, "TMPDIR")
OPTIONS = "run.toml"  # in there: the options of the run
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0  # for processes to end by themselves, where whoever asked for them lives
KILL_SECONDS = 5.0  # for killed ones to be gone, and those that they started meanwhile
PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def temporary_files() -> Iterator[None]:
    """Have all that this process and those that it starts write for temporary use deleted."""
    own = Scratch.make(scratch.new_path(scratch.RUN))
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    guarded = start(own, [], Path(os.devnull), os.environ | path)
    try:
        with scratch.instead(own.path):
            yield
    finally:
        own.delete()
        guarded.let_go()


def start(
    home: Scratch, command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> "Guarded":
    """Start a command in its folder, under a guard that deletes this in the end.

    Args:
        home: The folder, which is the guard's from now on.
        command: What to start; nothing for this process.
        log: Where it prints.
        environment: Its variables, with the folder as :data:`HOME`.
    """
    reader, writer = lifelines.new()
    arguments = [str(os.getpid()), str(reader), str(home.lock), str(home.path), *command]
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
    """A guard, as whoever asked for it sees it.

    Attributes:
        process: Its process, which ends when its command does.
        home: Its folder.
        lifeline: Its writing end.
    """

    process: subprocess.Popen
    home: Scratch
    lifeline: int

    def let_go(self) -> None:
        """Have the guard end what belongs to its folder, and end itself; wait for it."""
        lifelines.cut(self.lifeline)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2 * (GRACE_SECONDS + KILL_SECONDS))

    def end(self) -> None:
        """Do the same even where the guard was killed."""
        self.let_go()
        if self.home.path.exists():  # the guard was killed
            end_family(self.home.path, GRACE_SECONDS)
        self.home.delete()


# -- families ------------------------------------------------------------------------------------


def family(home: Path) -> set[psutil.Process]:
    """Return the processes that belong to a folder, but for this one.

    They have it in their environment, or descend from one that has: some of Ray's write their title
    over their environment.
    """
    own = psutil.Process()
    members = {own} | {p for p in psutil.process_iter() if str(home) in homes_of(p)}
    for member in list(members):
        with suppress(psutil.NoSuchProcess):
            members.update(member.children(recursive=True))
    return {member for member in members - {own} if _lives(member)}


def _lives(process: psutil.Process) -> bool:
    """Tell whether a process runs: one that has ended is there until its parent asks how."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def homes_of(process: psutil.Process) -> set[str]:
    """Return the folders that a process belongs to."""
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return set()
    return {environment[name] for name in HOMES if name in environment}


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
    homes = {Path(home) for p in psutil.process_iter() for home in homes_of(p)}
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
    parent, reader, _, folder, *command = sys.argv[1:]
    _adopt_orphans()
    process = subprocess.Popen(command) if command else None
    home = Path(folder)
    code, calmly = _wait(process, int(reader))
    if not calmly:
        _await(lambda: os.getppid() != int(parent))  # its locks go with it
        if not command:  # what has a guard of its own
            _await(lambda: not family(home))
    end_family(home, GRACE_SECONDS if calmly else 0.0)
    scratch.delete(home)
    scratch.prune()
    return code


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _adopt_orphans() -> None:
    """Be the parent of every descendant whose parent ends; nothing but on Linux."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait(process: subprocess.Popen | None, lifeline: int) -> tuple[int, bool]:
    """Return how the command ended, and whether there is time for the others to."""
    ends: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(signal.SIGTERM))
    while not ends:
        if select.select([lifeline], [], [], POLL_SECONDS)[0]:
            return 0, os.read(lifeline, 1) == lifelines.CALMLY
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if process and ended[0] == process.pid:
                    process.returncode = os.waitstatus_to_exitcode(ended[1])
                    return process.returncode, True
    return -ends[0], True


if __name__ == "__main__":
    sys.exit(main())
