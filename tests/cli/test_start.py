"""What commands load: those that only list things do without what takes seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

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
