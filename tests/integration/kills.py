"""Kill runs at moments drawn by a seed: nothing may be left, and each goes on as if never killed.

    python tests/integration/kills.py --back-end local|workers|flower --times 20

kills ``d2ft run`` (SIGKILL) somewhere between its start and its end, as an unkilled run took. Some
seconds later no process, temporary folder or shared memory of it may be there; ``--resume``, or the
same command where the kill came before there was anything to resume, must then give the unkilled
run's weights to the bit. A line a kill; exit status 1 where anything was left or differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from d2ft_fl.records.run_folder import read_status
from d2ft_fl.util import scratch

ROOT = Path(__file__).parents[2]
BACK_ENDS = {
    "local": ["--backend", "local"],
    "workers": ["--backend", "local", "--workers", "2"],
    "flower": ["--backend", "flower"],
}
OPTIONS = {
    "rounds": 6,
    "clients": 4,
    "train-examples": 160,
    "test-examples": 60,
    "aggregation": "trimmed-mean",  # which keeps updates on disk
}
MARK = "D2FT_TEST_MARK"
PATIENCE = 15.0  # seconds for what was started to be gone
MEMORY = Path("/dev/shm")
TEMPORARY = Path("/tmp")
OURS = (*scratch.PREFIXES, scratch.FLOWER, scratch.UNFINISHED)


@dataclass
class Kills:
    """Runs of one back end, in a folder.

    Attributes:
        back_end: One of :data:`BACK_ENDS`.
        folder: Of runs, and of everything that they write: temporary files, caches.
    """

    back_end: str
    folder: Path

    def __post_init__(self) -> None:
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.before: set[Path] = set()

    def start(self, run: Path) -> subprocess.Popen:
        """Start a run, or go on with it where it can be resumed."""
        if run.joinpath("config.toml").exists():
            options = ["--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)
            pairs = {**OPTIONS, "run-folder": run}
            options = [x for k, v in pairs.items() for x in ("--set", f"{k}={v}")]
        environment = {
            **os.environ,
            MARK: str(self.folder),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "D2FT_WEIGHTS": str(self.folder / "weights"),
        }
        environment.pop("RAY_TMPDIR", None)  # Ray then writes below TMPDIR
        return subprocess.Popen(
            [sys.executable, "-m", "d2ft_fl.cli", "run", *BACK_ENDS[self.back_end], *options],
            env=environment, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def finish(self, run: Path) -> str:
        """Carry a run out, unless it is done; return what it said where it failed."""
        if read_status(run).get("status") == "finished":
            return ""
        process = self.start(run)
        try:
            _, said = process.communicate()
        finally:
            process.kill()  # Ctrl-C
        return said.strip() if process.returncode else ""

    def kill(self, run: Path, seconds: float) -> float:
        """Kill a run after so many seconds; return those until nothing was left (-1: never)."""
        process = self.start(run)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        while left := self.left():
            if time.monotonic() > start + PATIENCE:
                print("left:", *left, sep="\n  ", flush=True)
                return -1.0
            time.sleep(0.1)
        return time.monotonic() - start

    def left(self) -> list[str]:
        """Return processes that carry the mark, and files for temporary use, that are there."""
        found = [str(path) for path in self._files() - self.before]
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder):
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:150]}")
            except (psutil.Error, OSError):
                continue
        return found

    def _files(self) -> set[Path]:
        """Return what lies in shared memory and, of this project, in ``/tmp``, whoever's it is.

        What is locked is of a process that lives, which ours would be found as.
        """
        found = {*self.temporary.iterdir(), *MEMORY.iterdir()}
        found |= {path for prefix in OURS for path in TEMPORARY.glob(f"{prefix}*")}
        return {path for path in found if not path.is_dir() or not scratch.is_locked(path)}

    def settle(self) -> None:
        """Take what is there now for what every run leaves, such as caches of libraries."""
        self.before = self._files()


def weights(run: Path) -> bytes:
    """Return what a run learnt."""
    return run.joinpath("model.safetensors").read_bytes()


def main() -> int:
    """Kill and resume, and print a line a kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--back-end", choices=BACK_ENDS, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, bad = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        kills = Kills(arguments.back_end, Path(folder))
        whole = kills.folder / "whole"
        if said := kills.finish(whole):
            print(said)
            return 1
        start = time.monotonic()
        reference = weights(whole)
        shutil.rmtree(whole)
        if said := kills.finish(whole):  # everything is compiled and cached by now
            print(said)
            return 1
        took = time.monotonic() - start
        kills.settle()
        print(f"{arguments.back_end}: unkilled {took:.1f} s", flush=True)
        for number in range(1, arguments.times + 1):
            run = kills.folder / f"run-{number}"
            moment = draw.uniform(0.0, took)
            gone = kills.kill(run, moment)
            rounds = run.joinpath("rounds.jsonl")
            had = rounds.read_text().count("\n") if rounds.exists() else 0
            said = kills.finish(run)
            same = not said and weights(run) == reference
            after = kills.left()
            bad += not (gone >= 0 and same and not after)
            left = f"nothing left after {gone:.1f} s" if gone >= 0 else "LEFT BEHIND"
            went_on = "same weights" if same else f"DIFFERS {said}"
            print(
                f"{number:3}: killed after {moment:4.1f} s, {had} rounds on record; {left}; "
                f"{went_on}{f'; LEFT {after}' if after else ''}",
                flush=True,
            )
            shutil.rmtree(run, ignore_errors=True)
    print(f"{arguments.times - bad} of {arguments.times} kills left nothing and went on to the bit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
