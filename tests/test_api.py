"""The public API: what ``import d2ft_fl`` offers, when it is loaded, and that it works."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import d2ft_fl
from d2ft_fl import api
from d2ft_fl.rounds.context import Round

ROOT = Path(__file__).parents[1]


def loaded_by(statement):
    """Modules that are loaded after a statement in a new process."""
    code = f"{statement}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout))


def test_importing_it_loads_nothing_heavy():
    heavy = {"numpy", "torch", "numba", "timm", "flwr", "ray", "pandas", "matplotlib"}
    assert not heavy & loaded_by("import d2ft_fl; dir(d2ft_fl)")


def test_workers_do_not_load_compiled_code():
    """Every worker process imports the client trainer and its tuning, and compiles nothing."""
    assert "numba" not in loaded_by("import d2ft_fl.client.trainer, d2ft_fl.clients.full")


def test_what_is_shown_in_a_terminal_loads_no_charts():
    """Units and labels are the reports', whose pages take Plotly and pandas."""
    shown = loaded_by("import d2ft_fl.server.console, d2ft_fl.cli.bench_tables")
    assert not {"plotly", "pandas", "matplotlib", "timm", "datasets"} & shown


def test_every_name_is_there_and_listed():
    for name in d2ft_fl.__all__:
        assert getattr(d2ft_fl, name) is getattr(api, name)
    assert set(d2ft_fl.__all__) <= set(dir(d2ft_fl))
    functions = {"run", "plan", "load_run"}
    assert set(api._HOMES) | functions == set(d2ft_fl.__all__)


def test_type_checkers_see_what_is_imported():
    """The imports for them and the table for everyone else name the same homes."""
    tree = ast.parse(Path(api.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name))
    seen = {
        alias.asname or alias.name: (line.module, alias.name)
        for line in block.body
        for alias in line.names
    }
    assert seen == api._HOMES


def test_a_name_that_is_not_there_is_no_attribute():
    with pytest.raises(AttributeError, match="'d2ft_fl' has no attribute 'Rounds'"):
        _ = d2ft_fl.Rounds


def test_older_imports_of_strategies_work():
    from d2ft_fl import rounds

    assert rounds.Round is Round
    assert rounds.Assignment is d2ft_fl.Assignment
    with pytest.raises(AttributeError, match="no attribute 'Plans'"):
        _ = rounds.Plans


def test_a_run_is_planned_made_and_read(quick):
    config = quick(rounds=1, strategy="caff")
    planned = d2ft_fl.plan(config)
    assert len(planned.rounds[0].clients) == 4
    lines = []
    summary = d2ft_fl.run(config, progress=lines.append, report=False)
    found = d2ft_fl.load_run(summary["folder"])
    assert found.status == "finished"
    assert found.config["strategy"] == "caff"
    assert found.rounds["accuracy"].tolist() == [lines[0]["accuracy"]] == [summary["accuracy"]]


def test_options_are_checked_first(quick):
    for function in (d2ft_fl.run, d2ft_fl.plan):
        with pytest.raises(d2ft_fl.ConfigError, match="rounds = 0 must be 1 or more"):
            function(quick(rounds=0))


def samples():
    """The Python code of README, the tutorial and all other documents for users."""
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for code in re.findall(r"^```python.*\n((?s:.*?))^```", document.read_text(), re.M):
            yield pytest.param(ast.parse(code), id=f"{document.name}: {code[:30]!r}")


@pytest.mark.parametrize("code", samples())
def test_samples_use_the_public_api_only(code):
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "d2ft_fl":
            assert node.module == "d2ft_fl"
            assert {alias.name for alias in node.names} <= set(d2ft_fl.__all__)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "d2ft_fl" or node.attr in d2ft_fl.__all__


def test_strategies_load_without_data_sets_and_model_libraries():
    """They take seconds to import, and no strategy needs any of them."""
    code = "from d2ft_fl.rounds.strategies import builtin_strategies; builtin_strategies()"
    heavy = {"datasets", "flwr_datasets", "torchvision", "timm", "peft", "pandas", "flwr", "ray"}
    assert not heavy & set(loaded_by(code))
