"""Bring up a SuperLink and SuperNodes with TLS and authentication, each a process of its own.

    python experiments/deploy.py FOLDER [--nodes 3] [--port 8443] [--host NAME]...

FOLDER gets certificates and keys (once), a home for each process, logs, and a connection for
``flwr``. Leave it running, and in another terminal do what it says. Ctrl-C stops everything it
started. On real machines run the same commands, which it prints, where they belong; see
docs/deploy.md.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from d2ft_fl.errors import D2FTError, RunError
from d2ft_fl.flower import certificates

CONNECTION = "d2ft"
START_SECONDS = 60.0


class Deployment:
    """A SuperLink and SuperNodes of this machine.

    Args:
        folder: Where everything is kept. port: Of the SuperLink.
        hosts: Names of this machine for its certificate.
    """

    def __init__(self, folder: Path, port: int, hosts: list[str]):
        self.folder, self.port = folder.absolute(), port
        self.keys = self.folder / "keys"
        self.processes: dict[str, subprocess.Popen] = {}
        if not self.keys.exists():
            certificates.make(self.keys, hosts, 0)

    def environment(self, home: str) -> dict[str, str]:
        """Of one process: Flower's programs are found, its home is its own."""
        tools = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.folder / home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }

    def superlink(self) -> None:
        """Start the SuperLink, and wait until it answers."""
        flwr = self.folder / "flwr"
        flwr.mkdir(parents=True, exist_ok=True)
        flwr.joinpath("config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys / "ca.crt"}"\n'
        )
        self._start(
            "superlink",
            [
                "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port),
                "--ssl-ca-certfile", str(self.keys / "ca.crt"),
                "--ssl-certfile", str(self.keys / "superlink.pem"),
                "--ssl-keyfile", str(self.keys / "superlink.key"),
                "--enable-supernode-auth", "--database", str(self.folder / "state.db"),
                "--disable-runtime-dependency-installation",
            ],
        )  # fmt: skip
        self._until("superlink", lambda: self.flwr("ls", CONNECTION).returncode == 0)

    def supernode(self, name: str, port: int, config: str, register: bool = True) -> None:
        """Start a SuperNode, registered under a key of its own, and wait until it is online.

        Args:
            port: One of its own, of this machine. config: Its ``--node-config``.
        """
        key = self.keys / "nodes" / name
        if not key.exists():
            certificates.make_node(self.keys, name)
        known = self.folder / f"{name}.registered"
        if register and not known.exists():
            said = self.flwr("supernode", "register", str(key) + ".pub", CONNECTION)
            if said.returncode and "already in use" not in said.stdout + said.stderr:
                raise RunError(f"{name} cannot be registered: {_last(said.stdout)}")
            known.touch()
        self._start(name, self.supernode_command(name, port, config))
        log = self.folder / f"{name}.log"
        self._until(name, lambda: "SuperNode ID:" in log.read_text(errors="replace"))

    def supernode_command(self, name: str, port: int, config: str) -> list[str]:
        """The command that starts a SuperNode."""
        return [
            "flower-supernode", "--superlink", f"127.0.0.1:{self.port}",
            "--root-certificates", str(self.keys / "ca.crt"),
            "--auth-supernode-private-key", str(self.keys / "nodes" / name),
            "--host", "127.0.0.1", "--port", str(port), "--node-config", config,
        ]  # fmt: skip

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run Flower's command against this SuperLink."""
        command = ["flwr", *arguments]
        try:
            return subprocess.run(
                command, env=self.environment("flwr"), capture_output=True, text=True,
                check=False, timeout=START_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            said = f"flwr {arguments[0]} took more than {START_SECONDS:.0f} s"
            return subprocess.CompletedProcess(command, 1, said, "")

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """Stop one process, with what it has started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            if how == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """Stop everything, the SuperLink last."""
        for name in [*(n for n in self.processes if n != "superlink"), "superlink"]:
            if name in self.processes:
                self.stop(name)

    def _start(self, name: str, command: list[str]) -> None:
        print(f"{name}:\n  {shlex.join(command)}", flush=True)
        with self.folder.joinpath(f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment(name), stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _until(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            ended = self.processes[name].poll() is not None
            if ended or time.monotonic() > deadline:
                log = self.folder / f"{name}.log"
                raise RunError(f"{name} did not start: {_last(log.read_text(errors='replace'))}")
            time.sleep(0.5)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def main() -> None:
    """Bring everything up, say what to do, and wait."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument("--host", action="append", default=[], help="of this machine")
    parser.add_argument(
        "--node-config",
        default='takes="data, budgets"',
        help="more of it, the same for all nodes; by default runs choose their data and budgets",
    )
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        deployment = Deployment(arguments.folder, arguments.port, arguments.host)
    except D2FTError as error:
        sys.exit(f"deploy: {error}")
    try:
        deployment.superlink()
        for k in range(arguments.nodes):
            config = f"partition-id={k} num-partitions={arguments.nodes} {arguments.node_config}"
            deployment.supernode(f"node-{k}", arguments.port + 1 + k, config.strip())
        print(
            f"\nrun the app on them, from the checkout:\n"
            f"  FLWR_HOME={shlex.quote(str(deployment.folder / 'flwr'))} flwr run . {CONNECTION} "
            f"--stream --run-config 'budgets=\"measured\" clients={arguments.nodes}'\n"
            "Ctrl-C stops everything",
            flush=True,
        )
        while all(process.poll() is None for process in deployment.processes.values()):
            time.sleep(1)
        print("a process ended; see the logs", file=sys.stderr)
    except D2FTError as error:
        sys.exit(f"deploy: {error}")
    except KeyboardInterrupt:
        pass
    finally:
        deployment.close()


if __name__ == "__main__":
    main()
