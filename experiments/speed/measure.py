"""Measure the speed tables of README, and write them: `make speed`.

    python experiments/speed/measure.py [NAME ...]

runs the benchmarks of those names (by default all, which takes three quarters of an hour on two
quiet cores), keeps what they print under `results/`, with the commit and the machine, and has
`tables.py` write the tables and `docs/step.png` anew. Nothing else may run meanwhile.
"""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from d2ft_fl.budgets.kept_speeds import software

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BENCHMARKS = {
    "step": "step --batch-size 4 --batch-size 8 --batch-size 16 --batch-size 32 --pairs 3",
    "step_slots": "step --slots 5 --pairs 5",
    "step_mkl": "step --pairs 5 --products mkl",
    "lora": "step --tuning lora --pairs 5",
    "scale": "scale --repeats 1",
    "start": "start --repeats 1",
}


def commit() -> str:
    """Return the commit that is measured.

    Raises:
        SystemExit: When files differ from it, so that nobody could measure the same again.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "d2ft_fl")
    if changed:
        raise SystemExit(f"commit first: {changed.splitlines()[0].strip()} and more is changed")
    return _git("rev-parse", "--short", "HEAD")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(name: str) -> None:
    """Run a benchmark, and keep what it prints."""
    command = f"bench {BENCHMARKS[name]} --json"
    print(f"d2ft {command}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "d2ft_fl.cli", *command.split()], stdout=subprocess.PIPE, check=True
    )
    kept = {
        "command": f"d2ft {command}",
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{software()}, {os.cpu_count()} cores",
        "results": json.loads(done.stdout),
    }
    RESULTS.joinpath(f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def main(names: list[str]) -> None:
    """Measure some benchmarks, or all, and write the tables.

    Args:
        names: Of :data:`BENCHMARKS`.
    """
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"{unknown[0]!r} is unknown; use some of {', '.join(BENCHMARKS)}")
    commit()
    RESULTS.mkdir(exist_ok=True)
    for name in names or BENCHMARKS:
        measure(name)
    subprocess.run([sys.executable, HERE / "tables.py"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
