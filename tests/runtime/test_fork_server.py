"""Fork servers: what forks are like, and what is known of their end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from d2ft_fl.runtime import fork_server
from d2ft_fl.runtime.fork_server import SHARED, ForkServer
from d2ft_fl.runtime.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def server():
    server = ForkServer.prepare()
    server.start()
    yield server
    server.close()


def worker_of(server):
    """The process of the only worker of a fork server, once it is there."""
    for _ in range(600):
        if found := psutil.Process(server.process.pid).children():
            return found[0]
        time.sleep(0.1)
    raise AssertionError("no worker was forked")


def test_it_forks_with_one_thread_and_everything_imported(server):
    """A thread of a library would be missing in each fork, and its locks might be held."""
    forked = server.fork(os.environ)
    worker = worker_of(server)
    assert psutil.Process(server.process.pid).num_threads() == 1
    maps = {Path(m.path).name for m in worker.memory_maps()}
    assert any(name.startswith("libtorch_cpu") for name in maps)
    forked.end()
    assert not psutil.pid_exists(worker.pid)


def test_a_fork_is_where_and_what_who_asked_is(server, tmp_path, monkeypatch, quick):
    """Its plug-in is found by the search path of the process that asks, and sees its variables."""
    tmp_path.joinpath("own_budget.py").write_text(
        "import json, os\n"
        "def budget(client, round):\n"
        "    said = {'folder': os.getcwd(), 'mark': os.environ.get('D2FT_TEST_MARK')}\n"
        "    open(os.environ['D2FT_TEST_SAID'], 'w').write(json.dumps(said))\n"
        "    return {'flops': '50 %'}\n"
    )
    said = tmp_path / "said.json"
    monkeypatch.setenv(SHARED, str(server.path))
    monkeypatch.setenv("D2FT_TEST_MARK", "here")
    monkeypatch.setenv("D2FT_TEST_SAID", str(said))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with WorkerPool(quick(budgets="own_budget:budget").to_mapping(), 1) as pool:
        pool.reports([0], 1, 60.0)
        assert worker_of(server).is_running()
        assert psutil.Process().children() == [psutil.Process(server.process.pid)]  # and no other
    assert json.loads(said.read_text()) == {"folder": str(tmp_path), "mark": "here"}


def test_how_a_fork_ends_is_told(server):
    by_signal, by_itself = server.fork(os.environ), server.fork(os.environ)
    assert by_signal.exit_code() is None
    worker_of(server).send_signal(signal.SIGTERM)
    assert by_signal.exit_code(10.0) == -signal.SIGTERM
    by_itself.connection.close()  # there is nobody to ask
    assert by_itself.exit_code(10.0) == 0
    by_signal.let_go()
    by_itself.let_go()


def test_a_fork_that_is_let_go_ends(server):
    forked = server.fork(os.environ)
    worker = worker_of(server)
    forked.let_go()
    assert psutil.wait_procs([worker], timeout=10)[1] == []


def test_a_pool_whose_fork_server_is_gone_starts_another(quick, monkeypatch):
    server = ForkServer.prepare()
    server.start()
    monkeypatch.setenv(SHARED, str(server.path))
    with WorkerPool(quick().to_mapping(), 1) as pool:
        assert len(pool.reports([0], 1, 60.0)) == 1
        server.close()
        assert len(pool.reports([0, 1], 1, 60.0)) == 2


def test_workers_end_with_their_fork_server():
    server = ForkServer.prepare()
    server.start()
    forked = server.fork(os.environ)
    worker = worker_of(server)
    server.close()
    assert psutil.wait_procs([worker], timeout=5)[1] == []
    assert forked.exit_code(5.0) == -signal.SIGKILL
    forked.let_go()


def test_what_workers_print_goes_to_the_log(tmp_path):
    server = ForkServer.prepare()
    log = tmp_path / "log"
    server.start(log)
    forked = server.fork({"PATH": os.environ["PATH"]})
    forked.connection.send_bytes(b"no configuration")
    assert forked.exit_code(60.0) == 1
    server.close()
    forked.let_go()
    last = log.read_text().splitlines()[-1]  # of the worker: the fork server ends without a word
    assert last.startswith("json.decoder.JSONDecodeError")


COMMAND = """
import json, os, signal, sys, time
from pathlib import Path
import psutil
from d2ft_fl.runtime import fork_server
signal.signal(signal.SIGTERM, lambda *_: sys.exit("of the command"))
print("said before")
with fork_server.shared() as server:
    server.start_here(Path(sys.argv[1]))
    forked = fork_server.ForkServer.shared().fork(os.environ)
    forked.connection.send_bytes(b"no configuration")
    forked.exit_code(60.0)
    process = psutil.Process(server.process.pid)
    other = fork_server.ForkServer.shared().fork(os.environ)
    while not process.children():
        time.sleep(0.01)
    process.children()[0].terminate()
    said = {
        "forked": process.cmdline() == psutil.Process().cmdline(),
        "threads": process.num_threads(),
        "torch": "torch" in sys.modules,
        "code": other.exit_code(10.0),
    }
said["ends"] = not process.is_running()
said["named"] = fork_server.SHARED in os.environ
print(json.dumps(said))
"""


def test_a_command_that_imports_pytorch_for_itself_has_a_fork_serve(tmp_path):
    log = tmp_path / "log"
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, str(log)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    before, said = ended.stdout.splitlines()
    assert (before, ended.stderr) == ("said before", "")
    assert json.loads(said) == {
        "forked": True, "threads": 1, "torch": True, "code": -signal.SIGTERM,
        "ends": True, "named": False,
    }  # fmt: skip
    assert log.read_text().splitlines()[-1].startswith("json.decoder.JSONDecodeError")


def test_a_process_that_has_other_threads_is_not_forked():
    over = threading.Event()
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    with fork_server.shared() as server:
        server.start_here()
        assert isinstance(server.process, psutil.Popen)
    over.set()
    thread.join()


def test_what_is_no_request_ends_nothing(server):
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(server.path))
        control.sendall(b"\x00\x00\x01\x00{")
    forked = server.fork(os.environ)
    assert worker_of(server).is_running()
    forked.end()


def test_a_long_folder_for_temporary_files_is_no_hindrance(tmp_path, monkeypatch):
    """The name of a socket may have about a hundred bytes."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    server = ForkServer.prepare()
    server.start()
    assert server.path.is_socket()
    server.close()
    assert not server.path.parent.exists()
    assert not list(long.iterdir())
