"""Running the app through Flower: a private SuperLink, the run, its progress, its end.

``flwr run`` leaves its SuperLink running and exits 0 when a run failed. Here the SuperLink has free
ports and a home of its own, under a guard (:mod:`d2ft_fl.runtime.guard`): it ends with the run, and
with this process, and so does what it started.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import RunError
from d2ft_fl.records.run_folder import Progress, read_rows, read_status
from d2ft_fl.runtime import guard
from d2ft_fl.util import proxies, scratch
from d2ft_fl.util.files import writing
from d2ft_fl.util.scratch import Scratch
from d2ft_fl.util.toml import dump_toml

START_TIMEOUT = 60.0
STATUS_SECONDS = 5.0
COMMAND_TIMEOUT = 120.0
CLUSTER_NODES = 64
NICENESS = "RAY_worker_niceness"
CONNECTION = "d2ft"
SIMULATION = "flwr-simulation"  # Flower's program
# Bytes of a home's name: Ray has its sockets in it, as
# ray/session_2026-01-31_12-00-00_123456_4194304/sockets/plasma_store, of 103 (macOS) at most.
LONGEST = 103 - 68


def app_folder() -> Path:
    """Return the checkout that has the Flower app.

    Raises:
        RunError: When the package was installed without it.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file():
        raise RunError(
            "the Flower back end needs the checkout: install with `pip install -e .`, "
            "or use --backend local"
        )
    return folder


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


def flower_environment(home: Path) -> dict[str, str]:
    """Return this process's environment, with Flower in a home of its own and off the network."""
    tools = str(Path(sys.executable).parent)
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
    # Ray joins any cluster that was started on this machine, and dies with that, but for this.
    address = os.environ.get("RAY_ADDRESS", "local")
    # Ray never deletes what it writes for a cluster of its own.
    own = {"RAY_TMPDIR": os.environ.get("RAY_TMPDIR", str(home))} if address == "local" else {}
    return {
        **os.environ,
        **proxies.without_own(os.environ),
        **own,
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),  # plug-ins lie where the command was started
        guard.HOME: str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        NICENESS: os.environ.get(NICENESS, "0"),  # Ray's own is 15
        "RAY_ADDRESS": address,
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


@dataclass(frozen=True)
class SuperLink:
    """A private SuperLink in simulation mode, which may still be starting.

    Attributes:
        environment: In which ``flwr`` finds it.
        log: Its log file.
        process: Its guard's process, which ends when it does.
        port: Of its health server.
        home: Its folder.
    """

    environment: dict[str, str]
    log: Path
    process: subprocess.Popen
    port: int
    home: Path

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RunError: When it ended, or does not answer in time.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RunError(f"flower-superlink ended at once: {_last_line(self.log)}")
            with contextlib.suppress(httpx.HTTPError):
                address = f"http://127.0.0.1:{self.port}/health"
                if httpx.get(address, timeout=1.0, trust_env=False).is_success:  # no proxy's
                    return
            time.sleep(0.2)
        raise RunError(f"flower-superlink did not start within {START_TIMEOUT:.0f} s")


@contextlib.contextmanager
def superlink() -> Iterator[SuperLink]:
    """Start a private SuperLink, and end it with all that it started.

    Raises:
        RunError: When there is no folder with a name that is short enough for it.
    """
    own = Scratch.make(scratch.short_path(scratch.FLOWER, LONGEST))
    home, (port, control) = own.path, free_ports(2)
    with writing(home):
        home.joinpath("config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
    environment = flower_environment(home)
    log = home / "superlink.log"
    command = [
        "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
        "--disable-runtime-dependency-installation",
        "--host", "127.0.0.1", "--port", str(port),
        "--control-api-address", f"127.0.0.1:{control}",
    ]  # fmt: skip
    guarded = guard.start(own, command, log, environment)
    try:
        yield SuperLink(environment, log, guarded.process, port, home)
    finally:
        guarded.end()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def run_flower(
    config: RunConfig, folder: Path, supernodes: int, progress: Progress, link: SuperLink
) -> dict[str, Any]:
    """Run a checked configuration on Flower's simulation engine; return the summary.

    Args:
        config: The configuration; its paths are absolute.
        folder: The run folder.
        supernodes: Virtual SuperNodes to spread the clients over; 0 for as many as are best.
        progress: Called with each round's line.
        link: Where it runs. It may have been started before the configuration was checked.

    Raises:
        RunError: When the run does not end well.
    """
    app = app_folder()
    link.wait()
    file = link.home / guard.OPTIONS
    with writing(file):
        file.write_text(dump_toml(config.to_mapping() | {"run-folder": str(folder)}))
    started = subprocess.run(
        [
            "flwr", "run", str(app), CONNECTION, "--format", "json",
            "--run-config", str(file),
            "--federation-config", _simulation(config, supernodes),
        ],
        env=link.environment, capture_output=True, text=True, check=False,
        timeout=COMMAND_TIMEOUT,
    )  # fmt: skip
    run_id = _run_id(started)
    try:
        return _follow(folder, run_id, link, progress)
    except RunError:
        output = link.log.read_text(errors="replace")
        if link.process.poll() is None:
            output += _output_of_run(run_id, link.environment)
        with contextlib.suppress(OSError):  # the disk may be full, which is the reason
            folder.mkdir(parents=True, exist_ok=True)
            folder.joinpath("flower.log").write_text(output)
        raise


def _output_of_run(run_id: str, environment: dict[str, str]) -> str:
    """Return what the processes of a run printed, which Flower keeps apart from its log."""
    try:
        return subprocess.run(
            ["flwr", "log", run_id, CONNECTION, "--show"],
            env=environment, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT,
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired:
        return ""


def _simulation(config: RunConfig, supernodes: int) -> str:
    """Return the number of SuperNodes and what Ray sets aside for each, as Flower's options.

    A SuperNode trains as many clients at once as it has cores for, so that one SuperNode is best on
    one machine. On a cluster, whose machines may have fewer cores than this one, each has one core.
    Ray hides GPUs from SuperNodes for which none is set aside.
    """
    cores = os.cpu_count() or 1
    cluster = os.environ.get("RAY_ADDRESS", "local") != "local"
    nodes = supernodes or (min(config.clients, CLUSTER_NODES) if cluster else 1)
    cpus = config.threads_per_client if cluster else max(config.threads_per_client, cores // nodes)
    text = f"num-supernodes={nodes} client-resources-num-cpus={cpus}"
    if config.device == "cuda":
        import torch  # a SuperLink starts while it is imported

        share = math.floor(1000 * torch.cuda.device_count() / max(1, cores // cpus)) / 1000
        text += f" client-resources-num-gpus={min(float(torch.cuda.device_count()), share)}"
    return text


def _run_id(started: subprocess.CompletedProcess) -> str:
    try:
        answer = json.loads(started.stdout[started.stdout.index("{") :])
        if answer.get("success"):
            return str(answer["run-id"])
        raise RunError(f"flwr run failed: {answer.get('error-message', answer)}")
    except ValueError:
        text = (started.stderr or started.stdout).strip().splitlines()
        raise RunError(f"flwr run failed: {text[-1] if text else 'no output'}") from None


def _follow(folder: Path, run_id: str, link: SuperLink, progress: Progress) -> dict[str, Any]:
    """Report rounds as they are recorded, until the run ends."""
    shown, next_check = 0, time.monotonic() + STATUS_SECONDS
    while True:
        status = read_status(folder)
        if status.get("status") != "starting":  # else lines of a run that is resumed may yet go
            shown = _show_new(folder, shown, progress)
        if status.get("status") == "finished":
            return json.loads(folder.joinpath("summary.json").read_text())
        if status.get("status") == "failed":
            raise RunError(status["reason"])
        if link.process.poll() is not None:
            raise RunError(f"flower-superlink ended; see {folder / 'flower.log'}")
        if time.monotonic() > next_check:
            # Asking Flower takes a second of a core.
            if not _simulates(link.process) and (ended := _ended(run_id, link.environment)):
                status = read_status(folder)
                if status.get("status") not in ("finished", "failed"):
                    raise RunError(f"Flower ended the run ({ended}); see {folder / 'flower.log'}")
            next_check = time.monotonic() + STATUS_SECONDS
        time.sleep(0.2)


def _show_new(folder: Path, shown: int, progress: Progress) -> int:
    rows = read_rows(folder)
    for row in rows[shown:]:
        progress(row)
    return len(rows)


def _simulates(process: subprocess.Popen) -> bool:
    """Return whether a process of a simulation runs under a SuperLink."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if SIMULATION in " ".join(child.cmdline()):
                    return True
    return False


def _ended(run_id: str, environment: dict[str, str]) -> str:
    """Return how Flower says the run ended, or nothing while it goes on."""
    try:
        listed = subprocess.run(
            ["flwr", "ls", CONNECTION, "--run-id", run_id, "--format", "json"],
            env=environment, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT,
        )  # fmt: skip
        run = json.loads(listed.stdout[listed.stdout.index("{") :])["runs"][0]
    except (ValueError, KeyError, IndexError, subprocess.TimeoutExpired):
        return ""
    status = str(run.get("status", ""))
    return status if status.startswith("finished") else ""
