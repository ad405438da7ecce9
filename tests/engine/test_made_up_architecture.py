"""Engine, planner, costs and aggregation on an architecture that no library has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MADE_UP = Path(__file__).with_name("made_up.py")
CHECKS = [
    line.removeprefix("def ").removesuffix("():")
    for line in MADE_UP.read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def found():
    """What came of the checks, run in a process that cannot import timm."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.made_up"],
        cwd=MADE_UP.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_of_a_made_up_architecture(check, found):
    assert found["checks"][check] == "", found["checks"][check]


def test_neither_timm_nor_any_adapter_of_ours_was_imported(found):
    assert found["loaded"] == []
