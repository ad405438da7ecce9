"""What a worker process takes is measured in one, and a device's budget holds for its process."""

import os
from pathlib import Path

import psutil
import pytest

from d2ft_fl.budgets.process_memory import FIRST_STEP, kept_worker_memory
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.records.run_folder import claim_folder
from d2ft_fl.runtime import worker_memory
from d2ft_fl.runtime.in_process import WorkerProcessPool
from d2ft_fl.runtime.worker_pool import WorkerPool
from d2ft_fl.server import run
from d2ft_fl.util.files import read_lines

MIB = 2**20


def highest(pid):
    """The most memory that a process has had: bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))


def worker_of(me):
    """The worker process, a child of the fork server that is a child of this process."""
    return max(
        (p for p in psutil.Process(me).children(recursive=True) if p.ppid() != me),
        key=lambda p: p.create_time(),
    )


def test_a_worker_says_what_it_has_before_any_model(quick):
    with WorkerPool(quick().to_mapping(), 1) as pool:
        said = pool.resident(60.0)
        assert said == pytest.approx(worker_of(os.getpid()).memory_info().rss, rel=0.05)
        assert 150 * MIB < said < 2**31  # PyTorch is there, and no more
        pool.reports([0], 1, 60.0)
        assert pool.resident(60.0) > said  # the model and the data


def test_it_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path))
    calls = []
    monkeypatch.setattr(WorkerPool, "resident", lambda *_: calls.append(1) or 300 * MIB)
    assert worker_memory.worker_memory() == worker_memory.worker_memory() == 300 * MIB
    assert len(calls) == 1
    assert kept_worker_memory() == 300 * MIB
    assert worker_memory.measure() == 300 * MIB  # anew
    assert len(calls) == 2


def test_a_device_reports_its_process_and_a_simulation_does_not(quick, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[classes.a]\nmemory = '2 GiB'\n")
    options = quick(budgets=str(path), transport="message").to_mapping()
    found = []
    for on_device in (False, True):
        with WorkerPool(options, 1, on_device=on_device) as pool:
            found.append(pool.reports([0], 1, 60.0)[0][2])
            taken = pool.resident(60.0)
    assert found[0] == {"memory": 2.0**31, "device": "a"}
    assert found[1]["memory_of"] == "process"
    # The model's messages are small here.
    assert taken <= found[1]["memory_base"] <= taken + FIRST_STEP + 48 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("left", [160, 500])
def test_a_device_s_process_keeps_its_memory_budget(tmp_path, left):
    """Rounds of a model of 88 MB, whose messages come and go, with so much left for tensors."""
    path, folder = tmp_path / "mine.toml", tmp_path / "run"
    with WorkerPool(RunConfig().to_mapping(), 1) as pool:
        base = pool.resident(60.0)
    # The model and data take about 104 MiB, three copies of a message 247, the first step 128.
    memory = base + (480 + left) * MIB
    path.write_text(f"[classes.a]\nmemory = {memory}\n")
    config = RunConfig.from_mapping(
        {
            "budgets": str(path), "transport": "message", "model": "vit_small_patch16_224",
            "pretrained": "none", "image-size": 96, "clients": 2, "rounds": 3,
            "train-examples": 80, "test-examples": 10, "run-folder": str(folder),
            "backward-score": "magnitude", "forward-score": "magnitude",
        }
    )  # fmt: skip
    claim_folder(config)
    tops = []
    with WorkerPool(config.to_mapping(), 1, on_device=True) as pool:
        clients = WorkerProcessPool(config, pool)
        run.run(
            config, clients, lambda row: tops.append(highest(worker_of(os.getpid()).pid)), False
        )
        clients.close()
    lines = read_lines(folder / "clients.jsonl")
    used = max(line["used"]["memory"] for line in lines if line["used"])
    print(f"budget {memory / MIB:.0f}, had {max(tops) / MIB:.0f}, tensors {used / MIB:.0f} MiB")
    assert all(line["fault"] is None for line in lines)
    assert used > 0.5 * left * MIB
    assert max(tops) <= 1.01 * memory
