"""Compare two checkouts: the same jobs with the same seeds must leave the same bits.

    python tests/same_bits.py BEFORE AFTER

runs ``d2ft run --backend local`` from each, for every setting and seed below, and compares the
SHA-256 of the files of weights that are left. Exit status 1 if any differs, or a run fails. That
takes about ten minutes on two cores; ``--rounds 2`` is for a first look.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = (
    "strategy=d2ft",
    "strategy=fedavg",
    "tuning=lora lora-aggregation=product",
    "tuning=lora lora-aggregation=stack",
    "aggregation=trimmed-mean",
    "upload-bits=4",
)
SEEDS = (0, 1)


def weights_left(checkout: Path, options: list[str], folder: Path) -> dict[str, str]:
    """Run one job; file -> SHA-256 of what it leaves."""
    command = [sys.executable, "-m", "d2ft_fl.cli", "run", "--backend", "local"]
    for option in (*options, f"run-folder={folder}"):
        command += ["--set", option]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "D2FT_WEIGHTS": f"{folder}-weights"}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1]}
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> int:
    """Run and compare everything, a line a job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    different = 0
    for setting in SETTINGS:
        for seed in SEEDS:
            options = [*setting.split(" "), f"seed={seed}", f"rounds={arguments.rounds}"]
            with tempfile.TemporaryDirectory() as folder:
                found = [
                    weights_left(checkout.absolute(), options, Path(folder) / name)
                    for name, checkout in (("b", arguments.before), ("a", arguments.after))
                ]
            same = found[0] == found[1] and "failed" not in found[0]
            different += not same
            print(f"{'same bits' if same else 'DIFFERENT'}  {' '.join(options)}", flush=True)
            for file in sorted({*found[0], *found[1]}):
                marks = [hashes.get(file, "-") for hashes in found]
                print(f"    {file}: " + (marks[0][:16] if same else " | ".join(marks)), flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
