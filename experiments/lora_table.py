"""Full fine-tuning, LoRA and FeDeRA under three budgets: accuracy, FLOPs and bytes as a table.

    python experiments/lora_table.py --dataset FOLDER --pretrained FILE --output FOLDER

runs {full, LoRA, FeDeRA} x {fedavg, d2ft at 60 % compute, d2ft at 50 % bytes} for every seed and
Dirichlet parameter with the configuration beside this file, one `d2ft run` each; a run that is
there already is not repeated. Budgets are shares of training everything in the same way.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# Learning rates of the factors: the best of three tried each, by accuracy after three rounds.
TUNINGS = {
    "full": {},
    "LoRA": {"tuning": "lora", "lora-lr": 8e-3},
    "FeDeRA": {"tuning": "lora", "lora-init": "federa", "lora-lr": 1e-3},
}
COMPUTE, BYTES = "60 % compute", "50 % bytes"
BUDGETS = {
    COMPUTE: 'mix = ["all"]\n[classes.all]\nflops = "60 %"\n',
    BYTES: 'mix = ["all"]\n[classes.all]\nbytes-up = "50 %"\nbytes-down = "50 %"\n',
}
SCHEMES = {
    "fedavg": {"strategy": "fedavg"},
    f"d2ft, {COMPUTE}": {"strategy": "d2ft", "budgets": COMPUTE},
    f"d2ft, {BYTES}": {"strategy": "d2ft", "budgets": BYTES},
}


def run(folder: Path, options: dict[str, object]) -> None:
    """One run, unless it is there."""
    if folder.joinpath("summary.json").exists():
        return
    pairs = [f"--set={key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "d2ft_fl.cli", "run", "--backend", "local"]
    command += ["--config", str(HERE / "cifar10_vit_tiny.toml"), f"--set=run-folder={folder}"]
    done = subprocess.run(command + pairs, capture_output=True, text=True, check=False)
    print(folder.name, "done" if done.returncode == 0 else done.stderr[-500:], flush=True)


def row(folders: list[Path]) -> str:
    """Means over runs: accuracy and its deviation, TFLOPs, megabytes up and down, and the error."""
    finals, totals, errors = [], [], []
    for folder in folders:
        lines = [json.loads(line) for line in folder.joinpath("rounds.jsonl").open()]
        finals.append(100 * lines[-1]["accuracy"])
        keys = ("flops", "bytes_up", "bytes_down")
        totals.append(
            [sum(line[key]["used_mean"] * line["worked"] for line in lines) for key in keys]
        )
        errors += [line["aggregation_error"] for line in lines if line.get("aggregation_error")]
    flops, up, down = np.mean(totals, axis=0)
    error = f"{np.mean(errors):.2f}" if errors else ""
    spread = np.std(finals, ddof=1) if len(finals) > 1 else 0.0
    return (
        f"{np.mean(finals):.1f} ± {spread:.1f} | {flops / 1e12:.2f} | {up / 1e6:.1f} | "
        f"{down / 1e6:.1f} | {error}"
    )


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=1)
    given = parser.parse_args()
    output = given.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    for name, text in BUDGETS.items():
        output.joinpath(f"{name}.toml").write_text(text)

    def folder(alpha: float, tuning: str, scheme: str, seed: int) -> Path:
        return output / f"{tuning} {scheme} alpha {alpha} seed {seed}"

    grid = list(product(range(given.seeds), given.alphas, TUNINGS, SCHEMES))
    with ThreadPoolExecutor(given.at_once) as pool:
        for seed, alpha, tuning, scheme in grid:
            options = {
                "dataset": given.dataset,
                "pretrained": given.pretrained,
                "rounds": given.rounds,
                "seed": seed,
                "partitioner-args": f"alpha = {alpha}",
                **TUNINGS[tuning],
                **SCHEMES[scheme],
            }
            if "budgets" in options:
                options["budgets"] = str(output / f"{options['budgets']}.toml")
            pool.submit(run, folder(alpha, tuning, scheme, seed), options)
    print("| Dirichlet | tuning | scheme | accuracy | TFLOP | MB up | MB down | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for alpha, tuning, scheme in product(given.alphas, TUNINGS, SCHEMES):
        own = [folder(alpha, tuning, scheme, seed) for seed in range(given.seeds)]
        own = [path for path in own if path.joinpath("summary.json").exists()]
        if own:
            print(f"| {alpha} | {tuning} | {scheme} | {row(own)} |")


if __name__ == "__main__":
    main()
