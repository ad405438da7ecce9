"""What each budget costs each strategy: tables, a picture, and how good the prediction was.

    python experiments/accuracy/compare.py FOLDER... [--picture FILE.png] [--spent FILE.png]

reads the folders of finished or running sweeps of this directory, of one job. Differences are in
points of accuracy, paired by seed, with 95 % intervals (Student's t). Settings can have different
seeds: accuracies and what was used are means over their own, whereas they are ordered, correlated
and drawn beside predictions as they would be on the reference's.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from scipy.stats import spearmanr

from d2ft_fl.config.choices import PLAIN_BITS
from d2ft_fl.planning.importance import prior
from d2ft_fl.planning.utility import Utility
from d2ft_fl.report.run_folder import RunFolder
from d2ft_fl.report.statistics import Interval, differences
from d2ft_fl.report.sweep_folder import SweepFolder

REFERENCE = "fedavg"  # without limits
OURS = "d2ft"
FURTHEST = -30  # points; what is behind by more is drawn there
RESOURCES = ("flops", "memory", "bytes_up")
SPENT = {  # by column of a run's rounds
    "cum_flops": "FLOPs",
    "cum_bytes_up": "bytes up",
    "cum_seconds": "simulated seconds",
}
NOT_SETTINGS = ("seed", "run-folder", "budgets", "resume")


class Setting:
    """Runs that differ in nothing but their seed."""

    def __init__(self, key: tuple[str, str], runs: dict[int, RunFolder]):
        self.runs = runs
        self.budgets, self.label = key
        self.lora = any(run.config["tuning"] == "lora" for run in runs.values())

    @property
    def accuracy(self) -> dict[str, float]:
        """Seed -> per cent of the primary metric, which is accuracy in all of these sweeps."""
        totals = {str(seed): run.totals for seed, run in self.runs.items()}
        return {seed: 100 * t["metrics"][t["task"]["primary"]] for seed, t in totals.items()}

    def share(self, resource: str) -> float:
        """What was used of training everything, on average."""
        shares = [run.totals["resources"][resource]["share"] for run in self.runs.values()]
        return float(np.mean(shares))

    def seconds(self) -> float:
        """Simulated, on average."""
        return float(np.mean([run.totals["round_seconds"] for run in self.runs.values()]))

    def measured(self, column: str) -> np.ndarray:
        """Return a column of rounds in which the model was evaluated, mean over runs.

        Args:
            column: Of a run's rounds.

        Returns:
            float64 [points].
        """
        values = [
            run.rounds.loc[run.metrics[run.spec.primary].notna(), column]
            for run in self.runs.values()
        ]
        return np.mean(values, axis=0, dtype=float)

    def beside(self, reference: "Setting") -> float:
        """Accuracy on the reference's seeds: theirs, and the mean difference on common seeds."""
        found = Interval.of(differences(self.accuracy, reference.accuracy)).mean
        return float(np.mean(list(reference.accuracy.values())) + found)

    def utility(self, local: dict[int, dict[int, int]]) -> float:
        """Predicted from the plans that runs left, the mean over rounds, with the prior for scores.

        Args:
            local: Seed -> client -> how many examples it has.
        """
        rounds = [
            _utility(run, file, local[seed])
            for seed, run in self.runs.items()
            for file in sorted(run.folder.joinpath("plans").iterdir())
        ]
        return float(np.mean(rounds))


def named(run: RunFolder) -> tuple[str, str]:
    """Under which budgets a run is, and what else tells it from others."""
    c = run.config
    lora = c["tuning"] == "lora"
    momentum = c["server-momentum"] if c["server-optimizer"] == "fedavgm" else 0
    said = [
        c["strategy"],
        f"{c['lora-init']} {c['lora-rank']}" * lora,
        f"{c['slots']} slots" * (c["slots"] > 1),
        f"{c['upload-bits']} bits up" * (c["upload-bits"] < PLAIN_BITS),
        f"{c['download-bits']} down" * (c["download-bits"] < PLAIN_BITS),
        f"server momentum {momentum}" * bool(momentum),
        f"server step {c['server-lr']}" * (c["server-lr"] != 1),
    ]
    return Path(c["budgets"]).stem, ", ".join(filter(None, said))


def _utility(run: RunFolder, file: Path, examples: dict[int, int]) -> float:
    """Of one round, clients weighted by their examples."""
    plan = safetensors.numpy.load_file(file)
    operations, clients = plan["schedules"], plan["clients"]
    number = int(file.stem.split("-")[-1])
    told = {row["client"]: row for row in _clients(run.folder) if row["round"] == number}
    rows = [told[client] for client in clients.tolist()]
    own = np.array([row["examples"] for row in rows])
    local = np.array([examples[client] for client in clients.tolist()])
    bits = [(_bits(run, row, "up"), _bits(run, row, "down")) for row in rows]
    scores = prior(*operations.shape[2:])
    return Utility(scores, scores).mean_of(operations, local, own, bits)


def _bits(run: RunFolder, row: dict[str, Any], direction: str) -> int:
    """In which a client's numbers travel up, or down."""
    policy = row["policy"] if "policy" in row else row["way"]  # as older runs call it
    return int(policy[f"bits_{direction}"] or run.config[f"{direction}load-bits"])


@lru_cache
def _clients(folder: Path) -> list[dict[str, Any]]:
    """The lines of clients.jsonl."""
    return [json.loads(line) for line in folder.joinpath("clients.jsonl").open()]


def examples(reference: Setting) -> dict[int, dict[int, int]]:
    """Seed -> client -> how many examples it has: the reference trains on all."""
    return {
        seed: {row["client"]: row["examples"] for row in _clients(run.folder)}
        for seed, run in reference.runs.items()
    }


def settings(folders: list[Path]) -> list[Setting]:
    """The settings of sweeps that finished with at least one seed.

    What else differs from the first of a name comes behind it.
    """
    found: defaultdict[tuple[str, str], dict[int, RunFolder]] = defaultdict(dict)
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in folders:
        for trial in SweepFolder.read(folder).trials:
            if trial.finished and trial.run:
                budgets, label = named(trial.run)
                config = {k: v for k, v in trial.run.config.items() if k not in NOT_SETTINGS}
                usual = first.setdefault((budgets, label), config)
                others = [f"{k} {v}" for k, v in config.items() if usual.get(k) != v]
                key = budgets, ", ".join([label, *others])
                found[key].setdefault(int(trial.run.config["seed"]), trial.run)
    return [Setting(key, runs) for key, runs in found.items()]


def spelled(i: Interval) -> str:
    """A difference and its interval."""
    if np.isnan(i.mean):
        return ""
    return f"{i.mean:+.1f}" + ("" if i.half is None else f" ± {i.half:.1f}")


def table(budget: str, own: list[Setting], reference: Setting) -> str:
    """One budget's settings, the best first, beside the reference and d2ft."""
    ours = next((s for s in own if s.label == OURS), None)
    lines = [
        f"### {budget}",
        "",
        "| setting | accuracy | to full tuning | d2ft ahead by | FLOPs | memory | bytes up | "
        "simulated | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for s in sorted(own, key=lambda s: -s.beside(reference)):
        to_full, ahead = "", ""
        if s is not reference:
            to_full = spelled(Interval.of(differences(s.accuracy, reference.accuracy)))
        if ours is not None and s is not ours:
            ahead = spelled(Interval.of(differences(ours.accuracy, s.accuracy)))
        shares = " | ".join(f"{s.share(r):.0%}" for r in RESOURCES)
        lines.append(
            f"| {s.label} | {np.mean(list(s.accuracy.values())):.1f} | "
            f"{to_full} | {ahead} | "
            f"{shares} | {s.seconds():.0f} s | {len(s.runs)} |"
        )
    return "\n".join(lines)


def predicted(found: list[Setting], reference: Setting) -> list[tuple[Setting, float]]:
    """Settings of full tuning with seeds that the reference has, and their predicted utility."""
    local = examples(reference)
    able = [s for s in found if not s.lora and s.runs.keys() <= local.keys()]
    return [(s, s.utility(local)) for s in able]


def hues(budgets: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """A color for each budget, the same in all pictures."""
    import matplotlib.pyplot as plt

    names = sorted(budgets)
    shades = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names)))
    return dict(zip(names, map(tuple, shades), strict=True))


def draw(
    found: list[Setting],
    reference: Setting,
    worths: list[tuple[Setting, float]],
    path: Path,
) -> None:
    """Predicted utility and measured accuracy; and what each budget costs, with intervals."""
    import matplotlib.pyplot as plt

    own: defaultdict[str, list[Setting]] = defaultdict(list)
    for s in found:
        if s is not reference:
            own[s.budgets].append(s)
    groups = {b: sorted(own[b], key=lambda s: -s.beside(reference)) for b in sorted(own)}
    rows = [(b, s) for b, group in groups.items() for s in group]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.2 * len(rows) + 1.5), width_ratios=[1, 1], layout="constrained"
    )
    colors = hues(groups)
    for y, (budget, s) in enumerate(reversed(rows)):
        i = Interval.of(differences(s.accuracy, reference.accuracy))
        marker = "D" if s.label == OURS else "o"
        if i.mean < FURTHEST:
            left.plot(FURTHEST, y, "<", color=colors[budget])
        else:
            left.errorbar(i.mean, y, xerr=i.half, fmt=marker, color=colors[budget], capsize=2)
    for s, utility in worths:
        marker = "D" if s.label == OURS else "o"
        color = colors.get(s.budgets, "0.5")
        right.plot(utility, s.beside(reference), marker, color=color)
    left.set_yticks(range(len(rows)), [f"{b}: {s.label}" for b, s in reversed(rows)], fontsize=7)
    left.set_ylim(-1, len(rows))
    left.axvline(0, color="0.5", linewidth=1)
    left.set_xlabel("points of accuracy to full tuning without limits")
    left.set_xlim(left=max(FURTHEST - 1, left.get_xlim()[0]))
    right.set_box_aspect(1)
    right.set_xlabel("predicted utility")
    right.set_ylabel("accuracy, %")
    figure.savefig(path, dpi=110)


def draw_spent(found: list[Setting], reference: Setting, path: Path) -> None:
    """Accuracy over what was spent, as shares of what the reference spent.

    A line a setting, with a point at its end; the point alone where accuracy was measured once.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    colors = hues({s.budgets for s in found if s is not reference})
    figure, panels = plt.subplots(1, len(SPENT), figsize=(13, 5), sharey=True, layout="constrained")
    for panel, (column, title) in zip(panels, SPENT.items(), strict=True):
        whole = reference.measured(column)[-1]
        if not whole:  # budgets without speeds
            continue
        for s in found:
            color = "black" if s is reference else colors[s.budgets]
            x, y = s.measured(column) / whole, 100 * s.measured("accuracy")
            panel.plot(x, y, color=color, linewidth=1)
            panel.plot(x[-1:], y[-1:], "D" if s.label == OURS else "o", color=color)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlabel(f"{title}, % of full tuning's")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    keys = [("full tuning", "o", "black"), *((b, "o", c) for b, c in colors.items())]
    keys.append((OURS, "D", "0.5"))
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=b) for b, m, c in keys]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=110)


def compare(folders: list[Path], picture: Path | None, spent: Path | None) -> None:
    """Print the tables of sweeps, and draw them where paths are given."""
    found = settings(folders)
    reference = next((s for s in found if s.label == REFERENCE and s.budgets == "none"), None)
    if reference is None:
        where = ", ".join(map(str, folders))
        sys.exit(f"there is no finished trial of {REFERENCE} without limits in {where} yet")
    groups: defaultdict[str, list[Setting]] = defaultdict(list)
    for s in found:
        groups[s.budgets].append(s)
    for budget, own in groups.items():
        print(table(budget, own, reference), end="\n\n")
    worths = predicted(found, reference)
    if len({utility for _, utility in worths}) > 2:
        accuracy = [s.beside(reference) for s, _ in worths]
        rho = float(spearmanr([utility for _, utility in worths], accuracy).statistic)
        print(
            f"Spearman's correlation of predicted utility and accuracy: {rho:.2f} ({len(worths)})"
        )
    if picture:
        draw(found, reference, worths, picture)
    if spent:
        draw_spent(found, reference, spent)


def main() -> None:
    """Compare what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="of sweeps of one job")
    parser.add_argument("--picture", type=Path, help="what each budget costs")
    parser.add_argument("--spent", type=Path, metavar="PICTURE", help="accuracy over costs")
    given = parser.parse_args()
    compare(given.folders, given.picture, given.spent)


if __name__ == "__main__":
    main()
