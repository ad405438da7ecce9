"""Imports between packages: the contracts of pyproject.toml hold, and break where they should."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("d2ft_fl", "strategies", "clients")


def lint(folder):
    """What the contracts say of the packages in a folder."""
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def circles(graph):
    """Groups of modules that import each other, in any number of steps."""
    below = {module: graph.find_upstream_modules(module) for module in graph.modules}
    groups = {frozenset({m, *(n for n in below[m] if m in below[n])}) for m in below}
    return {group for group in groups if len(group) > 1}


@pytest.fixture
def checkout(tmp_path):
    for name in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_are_kept():
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout
    assert "Contracts: 4 kept, 0 broken." in found.stdout


def test_layers_are_all_packages_of_the_folder():
    """One that is no layer would be free to import everything."""
    (contract,) = (
        c
        for c in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
            "contracts"
        ]
        if c["type"] == "layers"
    )
    layers = {name for line in contract["layers"] for name in line.split(" | ")}
    files = {p.stem for p in (ROOT / "d2ft_fl").glob("*.py")} - {"__init__"}
    folders = {p.parent.name for p in (ROOT / "d2ft_fl").glob("*/__init__.py")}
    assert layers == files | folders


@pytest.mark.parametrize(
    "file,line,broken",
    [
        (
            "d2ft_fl/engine/meter.py",
            "import d2ft_fl.models.build",
            "A package imports only those below it",
        ),
        (
            "d2ft_fl/wire/blob.py",
            "if TYPE_CHECKING: from d2ft_fl.rounds.plan import Plan",
            "A package imports only those below it",
        ),
        (
            "d2ft_fl/budgets/budget.py",
            "def late(): import d2ft_fl.budgets.traces",
            "No circle between the modules of a package",
        ),
        (
            "d2ft_fl/engine/meter.py",
            "import timm.layers",
            "Only models and benchmarks import timm",
        ),
        (
            "strategies/caff.py",
            "from d2ft_fl.rounds.context import Round",
            "Strategies and clients import the public API only",
        ),
        (
            "clients/full.py",
            "from d2ft_fl import api",
            "Strategies and clients import the public API only",
        ),
    ],
)
def test_a_planted_import_breaks_its_contract(checkout, file, line, broken):
    path = checkout / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    found = lint(checkout)
    assert found.returncode == 1
    assert f"{broken} BROKEN" in found.stdout


def test_no_modules_import_each_other():
    """Inside packages too, at run time or for type checkers."""
    assert not circles(grimp.build_graph(*PACKAGES, cache_dir=None))


def test_circles_are_found():
    graph = grimp.ImportGraph()
    for importer, imported in [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]:
        for module in (importer, imported):
            graph.add_module(module)
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == {frozenset("abc")}
