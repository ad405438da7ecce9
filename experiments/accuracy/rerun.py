"""The whole comparison of accuracies under budgets again: sweeps, then tables and pictures.

    python experiments/accuracy/rerun.py digits --output FOLDER
    python experiments/accuracy/rerun.py cifar10 --output FOLDER \\
        --set dataset=FOLDER --set pretrained=FILE [--all] [--set device=cuda]

It goes on where it was stopped. More budgets and options with --all, or on a GPU. At 224 pixels
(--set image-size=224) the figure of memory in budgets/memory_40_lora.toml is too low.
"""

import argparse
import sys
from pathlib import Path

import compare

from d2ft_fl.cli.main import app
from d2ft_fl.report.sweep_folder import SweepFolder
from d2ft_fl.sweep.command import FAILED

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))  # where options.toml finds warm_up.py, wherever this starts
SWEEPS = {"digits": [["digits"]], "cifar10": [["cifar10"]]}  # what is compared with each other
ALL = SWEEPS | {"cifar10": [["cifar10", "cifar10_all"], ["cifar10_batch16"], ["options"]]}
ON_GPU = "device=cuda"


def run(name: str, output: Path, pairs: list[str]) -> tuple[Path, int]:
    """Run what is left of a sweep: its folder, and the exit code; unless it got to its end, end."""
    folder = output / name
    options = [part for pair in pairs for part in ("--set", pair)]
    sweep = ["sweep", str(HERE / f"{name}.toml"), "--output", str(folder), *options]
    code = app(sweep, standalone_mode=False)
    if code not in (0, FAILED):
        sys.exit(code)
    if any(t.status not in ("finished", "failed") for t in SweepFolder.read(folder).trials):
        sys.exit(code or FAILED)  # it has said why
    return folder, code


def main() -> None:
    """Run what is missing of the sweeps, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=SWEEPS)
    parser.add_argument("--output", type=Path, required=True, help="for sweeps and pictures")
    parser.add_argument("--all", action="store_true", help="a night on two cores, not two hours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    given = parser.parse_args()
    sweeps = ALL if given.all or ON_GPU in given.pairs else SWEEPS
    worst = 0
    for together in sweeps[given.job]:
        done = [run(name, given.output, given.pairs) for name in together]
        worst = max(worst, *(code for _, code in done))
        picture, spent = (given.output / f"{together[0]}{kind}.png" for kind in ("", "_spent"))
        compare.compare([folder for folder, _ in done], picture, spent)
    sys.exit(worst)


if __name__ == "__main__":
    main()
