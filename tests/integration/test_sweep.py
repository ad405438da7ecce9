"""Real processes: `d2ft sweep` as a user starts it, on Ray, killed and started again."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import timm

BIN = Path(sys.executable).parent
SWEEP = """
[base]
rounds = 2
clients = 3
train-examples = 120
test-examples = 100

[grid]
strategy = ["d2ft", "random", "mine.broken", "mine.last_blocks"]
"""
BROKEN = """
def schedule(round):
    raise ZeroDivisionError("no heads")
"""
LAST_BLOCKS = """
import numpy as np

SCORES = ()


def schedule(round):
    blocks, heads = round.shape
    depth = np.repeat(np.arange(1.0, blocks + 1)[:, None], heads, axis=1)
    return round.plan(depth, np.ones(round.shape))
"""


def left_behind(mark):
    """Processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("D2FT_TEST_MARK") == mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def wait_until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert true()


def statuses(folder):
    try:
        return {
            t["settings"]["strategy"]: t["status"]
            for t in json.loads((folder / "trials.json").read_text())
        }
    except OSError:
        return {}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tmp_path):
    """A trial that fails does not stop the rest; plug-ins lie where the command is started."""
    start, folder = tmp_path / "start", tmp_path / "out"
    start.joinpath("mine").mkdir(parents=True)
    start.joinpath("mine", "__init__.py").write_text("")
    start.joinpath("mine", "broken.py").write_text(BROKEN)
    start.joinpath("mine", "last_blocks.py").write_text(LAST_BLOCKS)
    start.joinpath("sweep.toml").write_text(SWEEP)
    command = [BIN / "d2ft", "sweep", "sweep.toml", "--at-once", "1", "--output", folder]
    environment = {**os.environ, "D2FT_TEST_MARK": str(tmp_path)}
    kept_by_ray = list(Path.home().glob("ray_results/*"))
    log = tmp_path / "first.log"
    with log.open("w") as output:
        first = subprocess.Popen(
            command, env=environment, cwd=start, stdout=output, stderr=subprocess.STDOUT
        )
    wait_until(lambda: "finished" in statuses(folder).values() or first.poll() is not None, 200)
    assert first.poll() is None, log.read_text()
    first.kill()
    first.wait()
    before = [name for name, status in statuses(folder).items() if status == "finished"]
    starts = folder.joinpath("starts.log").read_text().splitlines()
    wait_until(lambda: left_behind(str(tmp_path)) == [], 30)

    second = subprocess.run(
        command, env=environment, cwd=start, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert second.returncode == 1, second.stdout + second.stderr
    assert second.stderr == ""
    assert statuses(folder) == {
        "d2ft": "finished", "random": "finished", "mine.broken": "failed",
        "mine.last_blocks": "finished",
    }  # fmt: skip
    (broken,) = (folder / "trials").glob("mine.broken-*")
    reason = "strategy 'mine.broken' raised ZeroDivisionError in round 1: no heads"
    assert f"failed: {broken.name} strategy=mine.broken: {reason}" in second.stdout
    assert "Traceback" in broken.joinpath("error.txt").read_text()

    # What had ended was not started again, and what was in flight when it was killed, once more.
    again = folder.joinpath("starts.log").read_text().splitlines()[len(starts) :]
    started = [line.split()[-1].split("-seed")[0] for line in again]
    assert len(started) == len(set(started)) == 4 - len(before)
    assert not set(started) & set(before)
    assert len(starts) <= len(before) + 1

    table = folder.joinpath("results.csv").read_text().splitlines()
    assert len(table) == 5
    for summary in folder.glob("trials/*/summary.json"):
        rounds = summary.with_name("rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in rounds] == [1, 2]
        assert json.loads(summary.read_text())["folder"] == str(summary.parent)
    assert not list(folder.glob("trials/*/*.safetensors"))
    wait_until(lambda: left_behind(str(tmp_path)) == [], 30)
    assert {path.name for path in start.iterdir()} == {"mine", "sweep.toml"}
    assert list(Path.home().glob("ray_results/*")) == kept_by_ray


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The address of two Ray nodes of one core each, started somewhere else."""
    from ray.cluster_utils import Cluster

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with monkeypatch.context() as patch, tempfile.TemporaryDirectory() as short:
        patch.chdir(elsewhere)
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": short}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add_node(num_cpus=1)
        yield made.address
        made.shutdown()


@pytest.mark.slow
def test_results_come_back_from_a_cluster_with_the_models_that_are_kept(tmp_path, cluster):
    """Started where the plug-in lies, which the nodes get; one trial after the other on each."""
    start, folder = tmp_path / "start", tmp_path / "out"
    start.joinpath("mine").mkdir(parents=True)
    start.joinpath("mine", "__init__.py").write_text("")
    start.joinpath("mine", "last_blocks.py").write_text(LAST_BLOCKS)
    names = '["d2ft", "random", "mine.last_blocks"]'
    text = SWEEP[: SWEEP.index("strategy")] + f"strategy = {names}\n[run]\nkeep-models = true\n"
    start.joinpath("sweep.toml").write_text(text)
    ended = subprocess.run(
        [BIN / "d2ft", "sweep", "sweep.toml", "--address", cluster, "--output", folder],
        cwd=start, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert set(statuses(folder).values()) == {"finished"}
    for trial in (folder / "trials").iterdir():
        model = timm.create_model(**json.loads(trial.joinpath("model.json").read_text()))
        model.load_state_dict(safetensors.torch.load_file(trial / "model.safetensors"))
    assert not list((tmp_path / "elsewhere").iterdir())
