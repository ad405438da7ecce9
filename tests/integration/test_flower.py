"""Real processes: the app as a user starts it, on Flower's simulation engine and Ray."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from d2ft_fl.config.sources import collect
from d2ft_fl.flower.records import pack_blobs, unpack_blobs
from d2ft_fl.flower.superlink import free_ports
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime.guard import end_family
from d2ft_fl.runtime.in_process import run_local
from tests.proxy_stand_in import asked_of_this_machine, recording_proxy

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
OPTIONS = {
    "rounds": 2,
    "clients": 5,
    "train-examples": 150,
    "test-examples": 100,
    "slots": 2,
    "score-every": 1,
}
CLOCKS = ("wall_seconds", "plan_seconds", "clock", "training_seconds", "predicted_seconds")


def environment(tmp_path, **more):
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "D2FT_TEST_MARK": str(tmp_path),
        **more,
    }


def left_behind(tmp_path):
    """Processes that carry this test's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("D2FT_TEST_MARK") == str(tmp_path):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def rows(folder):
    lines = Path(folder, "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]


def pairs(folder):
    return [f"{key}={value}" for key, value in {**OPTIONS, "run-folder": str(folder)}.items()]


def same_run(folder, reference):
    assert rows(folder) == rows(reference)
    ours = safetensors.torch.load_file(Path(folder) / "model.safetensors")
    theirs = safetensors.torch.load_file(Path(reference) / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_d2ft_run_gives_the_local_result_and_leaves_nothing_behind(tmp_path):
    """With LoRA, where weights that clients have stay where their processes find them.

    Every proxy that can be named is, and the folder for temporary files is too long for sockets.
    """
    temporary = tmp_path / ("x" * 80)
    temporary.mkdir()
    changes = ["tuning=lora", "lora-init=federa", "lora-aggregation=product", "score-every=2"]
    changes.append("trackers=tensorboard")
    local, folder = tmp_path / "local", tmp_path / "run"
    run_local(checked(collect([], [*pairs(local), *changes])))
    options = [x for pair in [*pairs(folder), *changes] for x in ("--set", pair)]
    with recording_proxy() as (variables, asked):
        variables |= {"D2FT_WEIGHTS": str(tmp_path / "weights"), "TMPDIR": str(temporary)}
        ended = subprocess.run(
            [BIN / "d2ft", "run", *options, "--supernodes", "3"],
            env=environment(tmp_path, **variables), cwd=tmp_path,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert asked_of_this_machine(asked) == []
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"run folder: {folder}" in ended.stdout.splitlines()[-1]
    assert f"report: {folder / 'report.html'}" in ended.stdout
    assert "0 budget violations" in ended.stdout
    same_run(folder, local)
    assert list((folder / "tensorboard").iterdir())
    first, second = (row["bytes_down"]["used_mean"] for row in rows(folder))
    assert second < first / 2
    assert left_behind(tmp_path) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_d2ft_run_ends_with_one_line_and_an_exit_code_when_the_run_fails(tmp_path):
    """The plug-in works when it is checked and breaks later, on one client."""
    tmp_path.joinpath("moody.py").write_text(
        "def budget(client, round):\n"
        "    if client.client == 3:\n"
        "        raise OSError('no battery')\n"
        "    return {'flops': '50 %'}\n"
    )
    ended = subprocess.run(
        [BIN / "d2ft", "run", "--set", "budgets=moody:budget", "--set", "rounds=1", "--set",
         "clients=4", "--set", f"run-folder={tmp_path / 'run'}", "--supernodes", "1"],
        env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        "d2ft: budgets = 'moody:budget' raised OSError: no battery for client 3 in round 1"
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_a_stopped_run_stops_what_it_started(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [BIN / "d2ft", "run", "--set", f"run-folder={folder}", "--set", "rounds=50"],
        env=environment(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not folder.joinpath("plans").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "d2ft: stopped"
    assert left_behind(tmp_path) == []


OTHER_MACHINE = """
mount -t tmpfs none /dev/shm && mount -t tmpfs none "$TMPDIR" && exec ray start --block \\
    --address "$ADDRESS" --num-cpus 1 --disable-usage-stats
"""


@pytest.fixture
def two_machines(tmp_path):
    """The address of two Ray nodes, of which the second has memory and a folder of its own."""
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs leave to make a mount namespace")
    own = tmp_path / "own"
    own.mkdir()
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory() as short:
        env = environment(tmp_path, RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=short)
        first = subprocess.Popen(
            ["ray", "start", "--block", "--head", "--port", str(port), "--num-cpus", "1",
             "--include-dashboard=false", "--temp-dir", short],
            env=env, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        address = f"127.0.0.1:{port}"
        there = {"TMPDIR": str(own), "ADDRESS": address, "D2FT_WEIGHTS": str(own / "weights")}
        time.sleep(8)
        second = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", OTHER_MACHINE], env={**env, **there},
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(5)
        yield address
        for process in (second, first):
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(30)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


@pytest.mark.slow
def test_a_cluster_whose_machines_share_no_files_gives_the_same_result(tmp_path, two_machines):
    """The plug-in names a client's machine by its mount namespace, as a device."""
    folder, local = tmp_path / "run", tmp_path / "local"
    changes = ["budgets=tests.machines:budget", "clients=6", "slots=1"]
    run_local(checked(collect([], [*pairs(local), *changes])))
    options = [x for pair in [*pairs(folder), *changes] for x in ("--set", pair)]
    ended = subprocess.run(
        [BIN / "d2ft", "run", *options], cwd=ROOT, check=False, capture_output=True, text=True,
        timeout=300, env=environment(tmp_path, RAY_ADDRESS=two_machines),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    same_run(folder, local)
    lines = folder.joinpath("clients.jsonl").read_text().splitlines()
    assert len({json.loads(line)["device"] for line in lines}) == 2


@pytest.mark.slow
def test_a_run_whose_worker_is_lost_ends_with_a_line_and_can_be_resumed(tmp_path):
    folder, reference = tmp_path / "run", tmp_path / "whole"
    options = [x for pair in [*pairs(folder), "rounds=12"] for x in ("--set", pair)]
    process = subprocess.Popen(
        [BIN / "d2ft", "run", *options], env=environment(tmp_path), cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [p for p in family if "ClientAppActor" in " ".join(p.cmdline())]
    worker.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip() == (
        "d2ft: a worker process of Flower's simulation died; the run can be resumed"
    )
    assert left_behind(tmp_path) == []
    run_local(checked(collect([], [f"run-folder={folder}"], folder)))
    run_local(checked(collect([], [*pairs(reference), "rounds=12"])))
    same_run(folder, reference)


@pytest.fixture
def bare(tmp_path):
    """Plain `flwr run . --stream` from the checkout, with a SuperLink that is stopped after."""
    port, control = free_ports(2)
    env = environment(
        tmp_path,
        FLWR_HOME=str(tmp_path / "home"),
        FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(port),
        FLWR_LOCAL_CONTROL_API_PORT=str(control),
    )

    def run(config, **more):
        return subprocess.run(
            [BIN / "flwr", "run", str(ROOT), "--stream", "--run-config", config],
            env={k: v for k, v in (env | more).items() if v is not None}, cwd=ROOT,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    yield run
    end_family(tmp_path / "home", 5.0)


def flower_pairs(folder):
    return " ".join(
        f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}"
        for k, v in {**OPTIONS, "run-folder": str(folder)}.items()
    )


def test_bare_flwr_run_is_the_same_job(tmp_path, bare):
    local, folder = tmp_path / "local", tmp_path / "run"
    run_local(checked(collect([], pairs(local))))
    ended = bare(flower_pairs(folder))
    assert f"run folder: {folder}" in ended.stdout, ended.stdout + ended.stderr
    same_run(folder, local)


@pytest.mark.slow
def test_bare_flwr_run_beside_a_superlink_of_another_run_is_the_same_job(tmp_path, bare):
    """Which then carries out both: Flower's ports are the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    bare(flower_pairs(first))
    other = {"FLWR_HOME": str(tmp_path / "other"), "XDG_DATA_HOME": str(tmp_path / "elsewhere")}
    ended = bare(flower_pairs(second), **other)
    assert f"run folder: {second}" in ended.stdout, ended.stdout + ended.stderr
    same_run(second, first)


@pytest.mark.slow
@pytest.mark.skipif("D2FT_TEST_REGISTRY" not in os.environ, reason="installs gigabytes")
def test_bare_flwr_run_with_packages_that_flower_installs_is_the_same_job(tmp_path, bare):
    """D2FT_TEST_REGISTRY=1 where a package registry can be reached."""
    folder = tmp_path / "run"
    ended = bare(flower_pairs(folder), FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=None)
    assert "uv sync took" in ended.stdout, ended.stdout + ended.stderr
    assert f"run folder: {folder}" in ended.stdout, ended.stdout + ended.stderr
    assert len(rows(folder)) == 2


@pytest.mark.slow
def test_bare_flwr_run_ends_a_bad_job_with_its_line(bare):
    ended = bare("slots=99")
    last = [line for line in ended.stdout.splitlines() if line.strip()][-1]
    assert last.startswith("d2ft: slots = 99 is more than batch-size = 16")
    assert "Traceback" not in ended.stdout


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_flower_adds_nothing_to_blobs(size):
    blob = bytes(range(256)) * (size // 256) + bytes(size % 256)
    arrays, index = pack_blobs({5: blob, 7: blob})
    assert dict(unpack_blobs(arrays, index)) == {5: blob, 7: blob}
    assert sum(len(array.data) for array in arrays.values()) == 2 * size
