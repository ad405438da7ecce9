"""The whole comparison of accuracies under budgets again: sweeps, then tables and pictures.

    python experiments/accuracy/rerun.py digits --output FOLDER
    python experiments/accuracy/rerun.py cifar10 --output FOLDER \\
        --set dataset=FOLDER --set pretrained=FILE [--all] [--set device=cuda --set image-size=224]

It goes on where it was stopped. More budgets and options with --all, or where there is a GPU.
"""

import argparse
import sys
from pathlib import Path

import compare
import torch

from d2ft_fl.cli import app

HERE = Path(__file__).parent
SWEEPS = {"digits": ["digits"], "cifar10": ["cifar10"]}
MORE = {"digits": [], "cifar10": ["cifar10_all", "cifar10_batch16", "options"]}
SOME_FAILED = 1  # trials of a sweep; CAFF, where its forward pass fits no budget


def main() -> None:
    """Run what is missing of the sweeps, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=SWEEPS)
    parser.add_argument("--output", type=Path, required=True, help="for sweeps and pictures")
    parser.add_argument("--all", action="store_true", help="a night on two cores, not an hour")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    given = parser.parse_args()
    more = MORE[given.job] if given.all or torch.cuda.is_available() else []
    options = [part for pair in given.pairs for part in ("--set", pair)]
    folders = []
    for name in SWEEPS[given.job] + more:
        folders.append(given.output / name)
        sweep = ["sweep", str(HERE / f"{name}.toml"), "--output", str(folders[-1])]
        code = app([*sweep, *options], standalone_mode=False)
        if code not in (0, SOME_FAILED):
            sys.exit(code)
    compare.compare(folders, given.output / "accuracy.png", given.output / "spent.png")


if __name__ == "__main__":
    main()
