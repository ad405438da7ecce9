"""A process that has imported PyTorch once, and forks each worker process from itself.

Importing PyTorch and timm takes seconds of a core and hundreds of megabytes, in every worker that
does it. A fork begins with all of it at once, and shares the memory. The fork server runs nothing
but imports, so that no thread of a library is lost in a fork. It is started as

    python -m d2ft_fl.runtime.fork_server LISTENER LIFELINE [LOG]

with file descriptors, or is itself a fork of a command that needs PyTorch too, and imports it once
for both. It ends with whoever started it.

Whoever wants a worker connects to the listener and sends a request: its length, JSON, and with it
the descriptors of the worker's connection and lifeline (:mod:`d2ft_fl.runtime.worker_process`). The
same connection is afterwards the worker's: when the worker has ended, its exit code comes back, and
when the other end closes, the worker is killed.

Python's own (``multiprocessing``) serves the process that started it alone, while here Ray's actors
find one that the command started; and its forks import the main module, which is Ray's there.
"""

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Self

import psutil

from d2ft_fl.runtime import worker_process
from d2ft_fl.util import lifeline as lifelines
from d2ft_fl.util import scratch
from d2ft_fl.util.scratch import Scratch
from d2ft_fl.util.strict_json import write_json

SHARED = "D2FT_FORK_SERVER"  # environment variable: the socket of one that processes share
# What workers need, whatever they train; the rest they import themselves.
PRELOADED = ("d2ft_fl.client.trainer", "d2ft_fl.models.timm_vit", "d2ft_fl.runtime.shared_memory")
# Parameters of glibc's mallopt, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, that have it keep freed
# memory: a client's weights fit where those of the one before were.
KEEP_MEMORY = {-3: 1 << 25, -1: 1 << 30}
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's library would start some when it is loaded
LENGTH, CODE = struct.Struct("!I"), struct.Struct("!i")
BACKLOG = 128
LONGEST = 90  # bytes of its folder's name: a socket's may have 103 on macOS, 107 on Linux
CLOSING = 0.5  # seconds for a fork server to end by itself
PATIENCE = 5.0  # seconds for what takes none: a request to arrive, a process to be killed


class ForkedProcess:
    """A worker process that a fork server started.

    Attributes:
        connection: To the worker.
    """

    def __init__(self, connection: Connection, lifeline: int, control: socket.socket):
        self.connection = connection
        self._lifeline, self._control = lifeline, control
        self._code: int | None = None

    def exit_code(self, seconds: float = 0.0) -> int | None:
        """Return how the process ended, as :mod:`subprocess` has it; None while it goes on.

        Args:
            seconds: How long to wait for its end.
        """
        if self._code is None:
            self._control.settimeout(seconds)
            with suppress(TimeoutError, BlockingIOError):
                try:
                    told = self._control.recv(CODE.size)
                except ConnectionError:
                    told = b""
                # Without a word the fork server itself has ended.
                self._code = CODE.unpack(told)[0] if len(told) == CODE.size else -signal.SIGKILL
        return self._code

    def end(self) -> None:
        """Kill the process."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        self.exit_code(PATIENCE)
        self.let_go()

    def let_go(self) -> None:
        """Close what it is reached by, without waiting: it ends by itself."""
        self._control.close()
        self.connection.close()
        with suppress(OSError):
            lifelines.close(self._lifeline)


class ForkServer:
    """A fork server, as those see it who want workers.

    Attributes:
        path: Its socket, in a folder of its own.
        process: The process, where it was started from here and runs.
    """

    def __init__(self, path: Path):
        self.path = path
        self.process: psutil.Process | None = None
        self._lifeline = -1
        self._folder: Scratch | None = None

    @classmethod
    def shared(cls) -> Self | None:
        """Return the fork server that this process's environment names, if it can be reached."""
        path = Path(os.environ.get(SHARED, ""))
        return cls(path) if path.is_socket() else None

    @classmethod
    def prepare(cls) -> Self:
        """Return one that is known by its path, and takes requests when it is started.

        Raises:
            RunError: When there is no folder whose name is short enough for a socket.
        """
        return cls(scratch.short_path(scratch.FORKS, LONGEST) / "socket")

    def start(self, log: Path | None = None) -> None:
        """Start the process, which ends with this one.

        Args:
            log: Where it and its workers print; None for where this process does.
        """
        with self._handed_over() as (listener, lifeline):
            self.process = psutil.Popen(
                [
                    sys.executable, "-m", __spec__.name, str(listener), str(lifeline),
                    *([] if log is None else [str(log)]),
                ],
                pass_fds=(listener, lifeline),
                env=os.environ
                | NO_THREADS
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip

    def start_here(self, log: Path | None = None) -> None:
        """Import what workers need in this process too, and start the process as a fork of it.

        Where this process has other threads, a library's that has run already or Python's own, the
        process is started apart: in a fork those would be missing, and locks stay as they are.

        Args:
            log: As for :meth:`start`.
        """
        preload()
        if psutil.Process().num_threads() > 1:
            self.start(log)
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else a fork prints it once more
        with self._handed_over() as (listener, lifeline):
            if not (pid := os.fork()):
                _serve(listener, lifeline, log)
            self.process = psutil.Process(pid)

    @contextmanager
    def _handed_over(self) -> Iterator[tuple[int, int]]:
        """Yield a listener and a lifeline for the process, and let go of them here."""
        # The folder is made no sooner: as long as there is no process, none deletes it with this.
        self._folder = Scratch.make(self.path.parent)
        lifeline, self._lifeline = lifelines.new()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen(BACKLOG)
            yield listener.fileno(), lifeline
        os.close(lifeline)

    def fork(self, environment: Mapping[str, str]) -> ForkedProcess:
        """Ask for a worker process, and wait for nothing.

        Args:
            environment: Of the worker, but for what libraries read when they are loaded.

        Raises:
            OSError: When the fork server is gone.
        """
        request = {"environment": dict(environment), "path": sys.path, "folder": os.getcwd()}
        text = write_json(request).encode()
        control = socket.socket(socket.AF_UNIX)
        ours, theirs = socket.socketpair()
        reader, lifeline = lifelines.new()
        try:
            control.connect(str(self.path))
            descriptors = [theirs.fileno(), reader]
            socket.send_fds(control, [LENGTH.pack(len(text))], descriptors)
            control.sendall(text)
        except OSError:
            lifelines.close(lifeline)
            ours.close()
            control.close()
            raise
        finally:
            theirs.close()
            os.close(reader)
        return ForkedProcess(Connection(ours.detach()), lifeline, control)

    def close(self) -> None:
        """End the process, if it was started from here."""
        if self.process:
            lifelines.cut(self._lifeline)  # has it kill its workers
            try:
                self.process.wait(CLOSING)
            except psutil.TimeoutExpired:  # it imports, and has none yet
                self.process.kill()
                self.process.wait()
        if self._folder:
            self._folder.delete()


@contextmanager
def shared() -> Iterator[ForkServer]:
    """Yield a fork server, yet to be started, that this process and those it starts share.

    NumPy starts no threads if it is loaded meanwhile: the server may be a fork of this process.
    """
    server = ForkServer.prepare()
    unset = {name: value for name, value in NO_THREADS.items() if name not in os.environ}
    before = {SHARED: os.environ[SHARED]} if SHARED in os.environ else {}
    os.environ.update(unset | {SHARED: str(server.path)})
    try:
        yield server
    finally:
        for name in (*unset, SHARED):
            del os.environ[name]
        os.environ.update(before)
        server.close()


# -- the process ---------------------------------------------------------------------------------


def preload() -> None:
    """Import what every worker needs; what cannot be imported is a worker's to say."""
    for name in PRELOADED:
        with suppress(Exception):
            importlib.import_module(name)


class _Server:
    """The loop of a fork server."""

    def __init__(self, listener: socket.socket, lifeline: int):
        self.listener, self.lifeline = listener, lifeline
        self.woken, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.controls: dict[int, socket.socket] = {}  # pid -> the connection it was asked for over
        for source in (listener, lifeline, self.woken):
            self.selector.register(source, selectors.EVENT_READ)

    def run(self) -> None:
        """Fork, kill and reap until the lifeline ends, and workers with it."""
        signal.set_wakeup_fd(self.waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready = {key.fileobj for key, _ in self.selector.select()}
            if self.lifeline in ready:
                for pid in self.controls:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                return
            if self.listener in ready:
                self._accept()
            if self.woken in ready:
                self.woken.recv(1 << 12)
            for pid, control in list(self.controls.items()):
                if control in ready:  # closed at its other end
                    self.selector.unregister(control)
                    os.kill(pid, signal.SIGKILL)
            self._reap()

    def _accept(self) -> None:
        control, _ = self.listener.accept()
        control.settimeout(PATIENCE)
        descriptors: list[int] = []
        try:
            head, descriptors, _, _ = socket.recv_fds(control, LENGTH.size, 2)
            (length,) = LENGTH.unpack(head)
            text = b""
            while len(text) < length:
                if not (more := control.recv(length - len(text))):
                    raise EOFError
                text += more
            connection, lifeline = descriptors
            pid = os.fork()
        except (OSError, EOFError, ValueError, struct.error):
            # Whoever asked is gone, or there is no memory for one more: they see it by the end of
            # the connection.
            for descriptor in (control.detach(), *descriptors):
                os.close(descriptor)
            return
        if not pid:
            self._become_worker(control, json.loads(text), connection, lifeline)
        os.close(connection)
        os.close(lifeline)
        self.controls[pid] = control
        self.selector.register(control, selectors.EVENT_READ)

    def _become_worker(
        self, control: socket.socket, request: dict[str, Any], connection: int, lifeline: int
    ) -> None:
        """Be a worker, in the fork, and end."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()
            for other in (control, self.listener, self.woken, self.waker, *self.controls.values()):
                other.close()
            os.close(self.lifeline)
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.path[:] = request["path"]
            with suppress(OSError):
                os.chdir(request["folder"])
            worker_process.run(connection, lifeline)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        """Say of every worker that has ended how it did."""
        while self.controls:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            control = self.controls.pop(pid)
            with suppress(KeyError, ValueError):
                self.selector.unregister(control)
            with suppress(OSError):
                control.send(CODE.pack(os.waitstatus_to_exitcode(status)))
            control.close()


def _serve(listener: int, lifeline: int, log: Path | None) -> NoReturn:
    """Serve until whoever started this is gone, and end.

    Args:
        listener: File descriptor of the socket.
        lifeline: File descriptor whose other end they have.
        log: Where to print; None for where this process does.
    """
    code = 1
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # of the command that this is a fork of
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asked for workers
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if log is not None:
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
        with suppress(AttributeError):  # no glibc
            for parameter, value in KEEP_MEMORY.items():
                ctypes.CDLL(None).mallopt(parameter, value)
        preload()
        gc.collect()
        gc.freeze()  # a collection in a worker would write to, and so copy, every object
        _Server(socket.socket(fileno=listener), lifeline).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # at a regular end libraries would report what is alive, the command's too


def main() -> None:
    """Serve until whoever started this is gone."""
    listener, lifeline, *log = sys.argv[1:]
    _serve(int(listener), int(lifeline), Path(log[0]) if log else None)


if __name__ == "__main__":
    main()
