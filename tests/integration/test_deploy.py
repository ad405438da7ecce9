"""Real devices: a SuperLink and SuperNodes as processes of their own, with TLS and keys."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.flower import certificates
from d2ft_fl.flower.superlink import free_ports

ROOT = Path(__file__).parent.parent.parent


def _script():
    spec = importlib.util.spec_from_file_location("deploy", ROOT / "experiments" / "deploy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def deployment(tmp_path):
    made = _script().Deployment(tmp_path, free_ports(1)[0], [])
    try:
        made.superlink()
        yield made
    finally:
        made.close()


def ends(deployment, command, seconds=60):
    """How a SuperNode that is not let in ends: exit code, output."""
    log = deployment.folder / "stranger.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=deployment.environment("stranger"), stdout=output, stderr=output,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(seconds), log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started may outlive it
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_strangers_are_refused(deployment, tmp_path):
    place = "partition-id=0 num-partitions=1"
    certificates.make_node(deployment.keys, "unknown")

    def command(name):
        return deployment.supernode_command(name, free_ports(1)[0], place)

    code, said = ends(deployment, command("unknown"))
    assert code != 0
    assert "Failed to activate SuperNode" in said
    deployment.supernode("node-0", free_ports(1)[0], place)
    code, said = ends(deployment, command("node-0"))  # somebody who has its key
    assert code != 0
    assert "Failed to activate SuperNode" in said
    plain = ["flower-supernode", "--superlink", f"127.0.0.1:{deployment.port}", "--insecure",
             "--port", str(free_ports(1)[0]), "--max-retries", "1"]  # fmt: skip
    assert ends(deployment, plain)[0] != 0
    other = tmp_path / "other"
    certificates.make(other, [], 0)
    wrong = command("node-0")
    wrong[wrong.index("--root-certificates") + 1] = str(other / "ca.crt")
    code, said = ends(deployment, wrong)
    assert code != 0
    assert "CERTIFICATE_VERIFY_FAILED" in said


@pytest.mark.slow
def test_the_app_runs_on_nodes_of_which_one_dies_and_another_comes(deployment, tmp_path):
    """Budgets are measured, but for one node's, which has its own; so is the memory of all."""
    own = tmp_path / "own.toml"
    own.write_text('[classes.edge]\nflops = "70 %"\n')
    ports = free_ports(4)
    for k, more in ((0, ""), (1, f' budgets="{own}"'), (2, "")):
        place = f'partition-id={k} num-partitions=3 takes="data, budgets"'
        deployment.supernode(f"node-{k}", ports[k], place + more)
    folder, log = tmp_path / "run", tmp_path / "node-2.log"
    config = (
        f'budgets="measured" clients=3 rounds=4 train-examples=150 test-examples=100 '
        f'min-replies=2 run-folder="{folder}"'
    )
    started = deployment.flwr(
        "run", str(ROOT), "d2ft", "--run-config", config, "--format", "json"
    )  # fmt: skip
    assert '"success": true' in started.stdout, started.stdout
    deadline = time.monotonic() + 400
    while "train message" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    deployment.stop("node-2", signal.SIGKILL)
    place = 'partition-id=2 num-partitions=3 takes="data, budgets"'
    deployment.supernode("late", ports[3], place)
    while status(folder) in ("", "starting", "running") and time.monotonic() < deadline:
        time.sleep(1)
    assert status(folder) == "finished", folder.joinpath("status.json").read_text()
    rows = [json.loads(line) for line in folder.joinpath("rounds.jsonl").read_text().splitlines()]
    worked = [row["worked"] for row in rows]  # nobody waits for who comes late to say so
    assert worked[0] == 2
    assert worked[2:] == [3, 3]
    assert len(rows[0]["faults"]) == 1
    assert rows[0]["faults"][0].startswith("client 2: its SuperNode failed: ")
    lines = folder.joinpath("clients.jsonl").read_text().splitlines()
    assert [json.loads(line)["device"] for line in lines[:3]] == ["measured", "edge", "measured"]


def status(folder):
    try:
        return json.loads(folder.joinpath("status.json").read_text())["status"]
    except (OSError, ValueError):
        return ""


def test_keys_are_private_and_not_made_twice(tmp_path):
    made = certificates.make(tmp_path / "keys", ["10.0.0.7", "lab.example"], 2)
    names = {path.name for path in made}
    assert {"ca.crt", "superlink.pem", "superlink.key", "node-0", "node-1.pub"} <= names
    for path in made:
        secret = path.name in ("superlink.key", "node-0", "node-1")
        assert bool(path.stat().st_mode & 0o077) is not secret
    with pytest.raises(ConfigError, match="is not empty"):
        certificates.make(tmp_path / "keys", [], 0)
    with pytest.raises(ConfigError, match="is there already"):
        certificates.make_node(tmp_path / "keys", "node-0")


def test_a_certificate_is_of_its_hosts(tmp_path):
    """What Python's own TLS says of it."""
    import ssl
    import threading
    from socket import create_connection, create_server

    certificates.make(tmp_path / "keys", ["lab.example"], 0)
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(tmp_path / "keys" / "superlink.pem", tmp_path / "keys" / "superlink.key")
    here = ssl.create_default_context(cafile=tmp_path / "keys" / "ca.crt")

    def greet(name):
        with create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]

            def serve():
                raw, _ = listening.accept()
                try:
                    there.wrap_socket(raw, server_side=True).close()
                except (ssl.SSLError, OSError):
                    raw.close()

            server = threading.Thread(target=serve)
            server.start()
            try:
                here.wrap_socket(create_connection(("127.0.0.1", port)), server_hostname=name)
            finally:
                server.join()

    for name in ("localhost", "127.0.0.1", "lab.example"):
        greet(name)
    with pytest.raises(ssl.SSLCertVerificationError):
        greet("elsewhere.example")
