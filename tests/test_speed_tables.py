"""The speed tables of README say what was measured, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "speed"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"speed_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = loaded("tables")


@pytest.mark.parametrize("page", TABLES.PAGES)
def test_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert TABLES.written(text) == text, "run python experiments/speed/tables.py"


def test_every_result_is_shown_and_says_where_it_is_from():
    shown = {
        place[2]
        for page in TABLES.PAGES
        for place in TABLES.PLACE.finditer((ROOT / page).read_text(encoding="utf-8"))
    }
    commands = loaded("measure").BENCHMARKS
    assert shown == set(TABLES.TABLES) == set(commands)
    for name in shown:
        found = TABLES.kept(name)
        assert found["command"] == f"d2ft bench {commands[name]} --json"
        assert found.keys() >= {"commit", "date", "machine"}


def test_a_table_is_replaced_where_it_stands(tmp_path, monkeypatch):
    rows = [
        {
            "schedule": "1/2 FULL, 1/2 FROZEN", "batch_size": size, "own_flop_ratio": 0.849,
            "own_time_ratio": 0.8 + size / 100, "time_ratio": 0.85, "activation_ratio": 0.876,
            "predicted_activation_ratio": 0.876, "peak_memory_ratio": 0.5,
            "predicted_peak_memory_ratio": 0.5 + size / 250, "flops_as_predicted": size == 8,
        }
        for size in (8, 4)
    ]  # fmt: skip
    found = {"command": "d2ft x", "commit": "abc", "date": "now", "machine": "one", "results": rows}
    tmp_path.joinpath("results").mkdir()
    tmp_path.joinpath("results", "step.json").write_text(json.dumps(found))
    monkeypatch.setattr(TABLES, "HERE", tmp_path)
    page = "a\n<!-- speed: step -->\nold\n<!-- /speed -->\nz\n"
    assert TABLES.written(page) == (
        "a\n<!-- speed: step -->\n"
        "| schedule | FLOPs | batch 4 | batch 8 | activations |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| 1/2 `FULL`, 1/2 `FROZEN` | 0.85 | 0.84 / 0.85 | 0.88 / 0.85 | 0.88 |\n"
        "\nFLOPs are as predicted in 1 of 2 cases; activations are predicted within 0 %, peak "
        "memory within 7 %.\n"
        "\n*`d2ft x` at abc, now: one.*\n"
        "<!-- /speed -->\nz\n"
    )
