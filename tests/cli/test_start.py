"""How commands start: what they load, and what they check before anything is compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.planning import solver_process

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch", "torchvision", "timm", "numba", "llvmlite", "flwr", "flwr_datasets", "datasets", "ray",
    "pandas", "sklearn", "matplotlib", "plotly", "transformers", "peft",
)  # fmt: skip


def loaded_by(*arguments):
    """Return what a command prints, and which heavy modules it has loaded then."""
    code = (
        "import sys; from d2ft_fl.cli.main import app\n"
        f"try: app({list(arguments)!r})\n"
        "except SystemExit: pass\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    output, _, loaded = ended.stdout.partition("loaded:")
    return output + ended.stderr, loaded.split()


@pytest.mark.parametrize(
    "arguments,word",
    [
        (("--help",), "certificates"),
        (("run", "--help"), "--backend"),
        (("options",), "batch-size"),
        (("options", "lr"), "lr = 5e-4"),
        (("strategies",), "fedrolex"),
        (("strategies", "fewer-tokens"), "PatchDropout"),
        (("strategies", "--json"), '"keeps": ["flops", "deadline"]'),
        (("strategies", "best"), "use one of d2ft"),
        (("budgets", "devices"), "workstation"),
        (("bench", "--help"), "planner"),
    ],
)
def test_what_lists_things_loads_nothing_heavy(arguments, word):
    output, loaded = loaded_by(*arguments)
    assert word in output
    assert loaded == []


@pytest.mark.parametrize(
    "pair,words",
    [
        ("lr=-1", "lr = -1"),
        ("strategy=best", "use one of d2ft"),
        ("slots=99", "slots = 99 is more than"),
        ("model=resnet50", "'resnet50' is not supported"),
        ("dataset=/nowhere", "'/nowhere' is not a folder"),
        ("pretrained=/nowhere", "'/nowhere' does not exist"),
        ("model=vit_tiny_patch16_224", "'bundled' belongs to"),
    ],
)
@pytest.mark.parametrize("backend", ["local", "flower"])
def test_options_are_refused_before_anything_is_compiled(monkeypatch, pair, words, backend):
    def compiling(coupled):
        raise AssertionError("compiles")

    monkeypatch.setattr(solver_process, "compiling", compiling)
    said = CliRunner().invoke(app, ["run", "--backend", backend, "--set", pair])
    assert said.exit_code == 2
    assert words in said.stderr
    assert said.stderr.count("\n") == 1
