"""The tables of docs/robust.md say what the sweep of attacks found, and nothing else."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tables():
    path = ROOT / "experiments" / "attacks" / "tables.py"
    spec = importlib.util.spec_from_file_location("attack_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results():
    text = (ROOT / "docs" / "robust.md").read_text(encoding="utf-8")
    assert tables().written(text) == text, "run python experiments/attacks/tables.py"


def test_a_cell_is_the_mean_over_seeds_with_the_least_and_the_most():
    rows = [{"aggregation": "mean", "hostile-share": "0.20", "accuracy": {"0": 0.5, "1": 0.7}}]
    assert tables().cell(rows, aggregation="mean", hostile_share="0.2") == "60.0 (50.0 to 70.0)"
