"""Write the tables of docs/robust.md from the results of the sweep beside it.

    python experiments/attacks/tables.py FOLDER ...  # keep the results of finished sweeps, too

A table stands between ``<!-- attacks: NAME -->`` and ``<!-- /attacks -->``.
"""

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "robust.md"
KEPT = HERE / "results.json"
PLACE = re.compile(r"(<!-- attacks: (\w+) -->\n).*?(<!-- /attacks -->)", re.DOTALL)
RULES = ("mean", "trimmed-mean", "median", "mean-around-median")
ATTACKS = ("sign-flip", "gaussian", "inner-product", "alie", "min-max", "label-flip")
SETTINGS = ("hostile-share", "hostile-attack", "aggregation", "partitioner-args",
            "train-examples", "coupling", "least-clients")  # fmt: skip
UNEVEN, EVEN = "alpha = 0.5", "alpha = 100.0"


def keep(folders: Sequence[Path]) -> None:
    """Keep accuracy by setting and seed, and where it is from.

    Args:
        folders: Of finished sweeps, all of one commit.
    """
    found: dict[tuple[str, ...], dict[str, float]] = {}
    commits = set()
    for folder in folders:
        with folder.joinpath("results.csv").open(encoding="utf-8") as file:
            trials = list(csv.DictReader(file))
        if unfinished := [trial["trial"] for trial in trials if trial["status"] != "finished"]:
            raise SystemExit(f"{len(unfinished)} trials of {folder} unfinished: {unfinished[0]}")
        for trial in trials:
            setting = tuple(trial[name] for name in SETTINGS)
            found.setdefault(setting, {})[trial["seed"]] = round(float(trial["accuracy"]), 6)
        versions = folder.glob("trials/*/versions.json")
        commits |= {json.loads(file.read_text())["commit"] for file in versions}
    if len(commits) != 1:
        raise SystemExit(f"the trials are of {len(commits)} commits: {', '.join(sorted(commits))}")
    rows = [dict(zip(SETTINGS, s, strict=True)) | {"accuracy": a} for s, a in found.items()]
    source = {"commit": commits.pop(), "command": "d2ft sweep experiments/attacks/sweep.toml"}
    KEPT.write_text(json.dumps(source | {"results": rows}, indent=1) + "\n")


def cell(rows: Sequence[Mapping[str, Any]], **setting: str) -> str:
    """Return mean, least and most of a setting's accuracy over seeds, in per cent."""
    wanted = {name.replace("_", "-"): value for name, value in setting.items()}
    (found,) = [row for row in rows if all(_same(row[n], v) for n, v in wanted.items())]
    values = [100 * value for value in found["accuracy"].values()]
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def attacked(rows: Sequence[Mapping[str, Any]], alpha: str) -> str:
    """Return accuracy by attack and rule, of clients that differ as ``alpha`` says."""
    plain = {"partitioner_args": alpha, "coupling": "none", "train_examples": "0"}

    def line(name: str, share: str, attack: str) -> list[str]:
        cells = [
            cell(rows, hostile_share=share, hostile_attack=attack, aggregation=rule, **plain)
            for rule in RULES
        ]
        spread = plain | {"coupling": "spread"}
        return [name, *cells, cell(rows, hostile_share=share, hostile_attack=attack,
                                   aggregation="trimmed-mean", **spread)]  # fmt: skip

    heads = ["attack", *RULES, "trimmed-mean, `spread`, `least-clients = 5`"]
    lines = [line("nobody", "0.0", ATTACKS[0])]
    return table(heads, lines + [line(f"`{attack}`", "0.2", attack) for attack in ATTACKS])


def few(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy by rule where clients have few examples, with and without flipped labels."""
    setting = {"partitioner_args": UNEVEN, "train_examples": "300", "hostile_attack": "label-flip"}
    lines = [
        [name, *(cell(rows, hostile_share=share, aggregation=rule, **setting) for rule in RULES)]
        for name, share in (("nobody", "0.0"), ("`label-flip`", "0.2"))
    ]
    return table(["attack", *RULES], lines)


def written(text: str) -> str:
    """Return a page with its tables written anew."""
    kept = json.loads(KEPT.read_text())
    rows = kept["results"]
    made = {
        "uneven": lambda: attacked(rows, UNEVEN),
        "even": lambda: attacked(rows, EVEN),
        "few": lambda: few(rows),
        "source": lambda: f"*`{kept['command']}` at {kept['commit'][:7]}.*\n",
    }
    return PLACE.sub(lambda place: place[1] + made[place[2]]() + place[3], text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep([Path(folder) for folder in sys.argv[1:]])
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
