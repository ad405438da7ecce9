"""A wheel works beside a user's folders that are called ``strategies`` or ``clients``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOB = ("rounds=1", "clients=2", "train-examples=40", "test-examples=20", "strategy=fedrolex")


def call(*command, **changes):
    """Standard output of a command that has to end well."""
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, **changes
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.mark.slow
def test_a_wheel_runs_beside_folders_of_the_same_names(tmp_path):
    built, installed, mine = (tmp_path / name for name in ("built", "installed", "mine"))
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built), cwd=ROOT)
    (wheel,) = built.glob("*.whl")
    call(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-index", "--target", str(installed), str(wheel),
    )  # fmt: skip
    names = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert names == {"d2ft_fl", "bin"}

    for decoy in ("strategies/fedrolex.py", "strategies/heterofl.py", "clients/full.py"):
        path = mine / decoy
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.joinpath("__init__.py").touch()
        path.write_text("raise RuntimeError('a folder of the user was taken for the project')\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(mine), str(installed)])}
    place = {"cwd": mine, "env": os.environ | paths | {"XDG_DATA_HOME": str(tmp_path / "data")}}
    where = "import d2ft_fl.strategies.heterofl as module; print(module.__file__)"
    path = Path(call(sys.executable, "-c", where, **place).strip())
    assert path == installed / "d2ft_fl" / "strategies" / "heterofl.py"
    # In the command's process, and in a worker process that trains.
    printed = call(
        str(installed / "bin" / "d2ft"), "run", "--backend", "local", "--workers", "1", "--json",
        *(word for option in JOB for word in ("--set", option)), **place,
    )  # fmt: skip
    assert json.loads(printed)["rounds"] == 1
