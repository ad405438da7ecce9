"""Worker processes that train clients: several at once, and each can be ended.

Training may hang, or take its process with it (memory, a library's fault). Here that costs one
client and a restart. This process only carries blobs and needs no torch: workers are forks of a
process that has it (:mod:`~d2ft_fl.runtime.fork_server`).
"""

import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.runtime.fork_server import ForkedProcess, ForkServer
from d2ft_fl.server.dispatch import ClientFailure
from d2ft_fl.util.strict_json import write_json

START_SECONDS = 120.0
# The longest message that a busy worker is sent ahead: it fits into the connection's buffer.
# Waiting for a worker to read would mean neither ending one that hangs nor reading its reply.
AHEAD_BYTES = 1 << 15


@dataclass(frozen=True)
class Job:
    """One client's work.

    Attributes:
        round: The round's number, counted from 1.
        client: The client's number.
        blob: The message with its assignment.
        model: File of the model in shared memory; None where the message has the model.
        reply: Where the reply goes in shared memory; None where it is sent back.
    """

    round: int
    client: int
    blob: bytes
    model: str | None = None
    reply: str | None = None


@dataclass(eq=False)
class _Worker:
    process: ForkedProcess
    slot: int  # its place in the pool: no other worker has it at the same time
    ready: bool = False
    jobs: deque[Job] = field(default_factory=deque)  # the one it works on, and the one after
    started: float = field(default_factory=time.monotonic)

    @property
    def connection(self) -> Connection:
        """The connection to the process."""
        return self.process.connection

    def send(self, request: Mapping[str, Any], blob: bytes = b"") -> None:
        self.connection.send_bytes(write_json(request).encode())
        self.connection.send_bytes(blob)

    def how_it_ended(self) -> str:
        """Return how a worker process ended whose connection is closed."""
        code = self.process.exit_code(1.0)
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def end(self) -> None:
        """Kill the process."""
        self.process.end()


class WorkerPool:
    """Up to ``size`` worker processes under one configuration, started when they are needed.

    They can be started before; see :meth:`start`.

    Attributes:
        options: The configuration, by its keys in TOML.
        size: How many clients train at once.
        owns_budget: Whether clients keep their own budget whatever a plan promises.
        on_device: Whether this is the device that budgets are of, and no simulation of it.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        size: int,
        owns_budget: bool = False,
        on_device: bool = False,
    ):
        self.options, self.size = dict(options), size
        self.owns_budget, self.on_device = owns_budget, on_device
        self._workers: list[_Worker] = []
        self._fork_server: ForkServer | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all worker processes."""
        for worker in self._workers:
            if worker.ready:
                worker.end()
            else:  # the fork server may be busy with imports, and need not be waited for
                worker.process.let_go()
        self._workers.clear()
        if self._fork_server:
            self._fork_server.close()
            self._fork_server = None

    def start(self, clients: int) -> None:
        """Start the worker processes that so many clients will need, and wait for none."""
        while len(self._workers) < min(self.size, clients):
            self._workers.append(self._start())

    # -- asking ------------------------------------------------------------------------------

    def reports(
        self, clients: Sequence[int], round_number: int, seconds: float, classes: str = ""
    ) -> list[list[Any]]:
        """Return reports of clients: [client, examples, budget as JSON] of each.

        Args:
            clients: Who is asked.
            round_number: Of the round that they are asked for.
            seconds: How long to wait.
            classes: Digest of the run's classes; empty where the data are the run's own.

        Raises:
            ConfigError: With what a client reports to be wrong with the configuration.
            RunError: When there is no answer in time.
        """
        deadline = time.monotonic() + seconds
        request = {
            "do": "report", "clients": list(clients), "round": round_number, "classes": classes
        }  # fmt: skip
        answer = self._ask(request, deadline) or self._ask(request, deadline, again=True)
        if "error" in answer:
            raise ConfigError(answer["error"])
        if "failed" in answer:
            raise RunError(answer["failed"])
        return answer["reports"]

    def resident(self, seconds: float) -> int:
        """Return the bytes that a worker has; before its first report, those before any model.

        Raises:
            RunError: When there is no answer in time.
        """
        deadline = time.monotonic() + seconds
        request = {"do": "resident"}
        answer = self._ask(request, deadline) or self._ask(request, deadline, again=True)
        return int(answer["resident"])

    def _ask(self, request: dict[str, Any], deadline: float, again: bool = False) -> dict[str, Any]:
        """Return a worker's answer; at the first attempt nothing, if the worker ends meanwhile.

        Args:
            request: What to ask.
            deadline: Until when to wait, in seconds of ``time.monotonic``.
            again: Whether this is the second attempt.

        Raises:
            RunError: When there is no answer in time, or the worker ends at the second attempt.
        """
        if not self._workers:
            self._workers.append(self._start())
        worker = self._workers[0]
        try:
            if not worker.ready:
                self._await(worker, min(deadline, worker.started + START_SECONDS))
                self._greet(worker)
            worker.send(request)
            self._await(worker, deadline)
            return json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            how = worker.how_it_ended()
            self._drop(worker)
            if again:
                raise RunError(f"a worker process ended ({how})") from None
            return {}

    def _await(self, worker: _Worker, deadline: float) -> None:
        if not worker.connection.poll(max(0.0, deadline - time.monotonic())):
            self._drop(worker)
            raise RunError("a worker process did not answer in time")

    # -- working -----------------------------------------------------------------------------

    def work(
        self, jobs: Sequence[Job], seconds: float, client_seconds: float = 0.0
    ) -> Iterator[tuple[int, bytes | ClientFailure]]:
        """Carry jobs out in order, several at once; yield clients and replies as they come.

        A reply that went to shared memory is empty. At the deadline every busy worker is ended, and
        jobs that none began are left.

        Args:
            jobs: What to do.
            seconds: Until the deadline.
            client_seconds: The most that one client may take; 0 for no limit but the deadline.
        """
        deadline = time.monotonic() + seconds
        pending = deque(jobs)
        try:
            while pending or self._busy:
                self._hand_out(pending, deadline)
                ends = [deadline]
                if client_seconds:
                    ends += [worker.started + client_seconds for worker in self._busy]
                ends += [w.started + START_SECONDS for w in self._workers if not w.ready]
                waiting = [w.connection for w in self._workers if w.jobs or not w.ready]
                ready = wait(waiting, timeout=max(0.0, min(ends) - time.monotonic()))
                for worker in [w for w in self._workers if w.connection in ready]:
                    yield from self._hear(worker, pending)
                now = time.monotonic()
                for worker in self._busy if client_seconds else []:
                    if now >= worker.started + client_seconds and not worker.connection.poll():
                        yield (
                            self._left(worker, pending),
                            ClientFailure(f"took longer than {client_seconds:g} s"),
                        )
                for worker in [w for w in self._workers if not w.ready]:
                    if now >= worker.started + START_SECONDS:
                        self._drop(worker)  # and another is started
                if now >= deadline:
                    yield from self._give_up(pending)
                    return
        finally:
            for worker in self._busy:  # nothing waits for its reply any more
                self._drop(worker)

    @property
    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.jobs]

    def _hand_out(self, pending: deque[Job], deadline: float) -> None:
        for worker in list(self._workers):
            if worker.ready and not worker.jobs and worker.process.exit_code() is not None:
                self._drop(worker)  # it died while it had nothing to do: nobody's fault
        for worker in self._workers:
            if pending and worker.ready and not worker.jobs:
                self._give(worker, pending.popleft(), deadline)
        for worker in self._busy:  # so that none waits for its next job, except at the end
            ahead = len(pending) > self.size and len(pending[0].blob) <= AHEAD_BYTES
            if ahead and len(worker.jobs) == 1:
                self._give(worker, pending.popleft(), deadline)
        starting = sum(not worker.ready for worker in self._workers)
        while starting < len(pending) and len(self._workers) < self.size:
            self._workers.append(self._start())
            starting += 1

    def _give(self, worker: _Worker, job: Job, deadline: float) -> None:
        if not worker.jobs:
            worker.started = time.monotonic()
        worker.jobs.append(job)
        seconds = deadline - time.monotonic()
        with suppress(OSError):  # it has ended, which shows when its reply is waited for
            worker.send(
                {
                    "do": "work",
                    "round": job.round,
                    "client": job.client,
                    "model": job.model,
                    "reply": job.reply,
                    "seconds": seconds,
                },
                job.blob,
            )

    def _hear(
        self, worker: _Worker, pending: deque[Job]
    ) -> Iterator[tuple[int, bytes | ClientFailure]]:
        try:
            if not worker.ready:
                self._greet(worker)
                return
            reply = worker.connection.recv_bytes()
        except (EOFError, OSError):
            how = worker.how_it_ended()
            if not worker.jobs:
                self._drop(worker)
                raise RunError(f"a worker process ended while it started ({how})") from None
            yield self._left(worker, pending), ClientFailure(f"its process ended ({how})")
            return
        job, worker.started = worker.jobs.popleft(), time.monotonic()
        yield job.client, reply

    def _left(self, worker: _Worker, pending: deque[Job]) -> int:
        """End a worker; return the client it trained. A job it had not begun goes to another."""
        current, *later = worker.jobs
        pending.extendleft(reversed(later))
        self._drop(worker)
        return current.client

    def _give_up(self, pending: deque[Job]) -> Iterator[tuple[int, bytes | ClientFailure]]:
        for worker in self._busy:
            if worker.connection.poll():  # the reply was in time; this process was not
                yield from self._hear(worker, pending)
        for worker in self._busy:
            client = self._left(worker, pending)
            yield client, ClientFailure("did not end before the round's deadline")
        while pending:
            yield pending.popleft().client, ClientFailure("not begun before the round's deadline")

    # -- processes ---------------------------------------------------------------------------

    def _start(self) -> _Worker:
        environment = dict(os.environ)
        slot = min(set(range(len(self._workers) + 1)) - {w.slot for w in self._workers})
        if devices := os.environ.get("CUDA_VISIBLE_DEVICES", ""):
            names = devices.split(",")
            environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
        worker = _Worker(self._forked(environment), slot)
        with suppress(OSError):  # it has ended, which shows when it is to say that it is ready
            terms = {
                "options": self.options,
                "owns-budget": self.owns_budget,
                "on-device": self.on_device,
            }
            worker.connection.send_bytes(write_json(terms).encode())
        return worker

    def _forked(self, environment: Mapping[str, str]) -> ForkedProcess:
        """Return a fork of the fork server; where there is none any more, of a new one."""
        if self._fork_server is None:
            self._fork_server = ForkServer.shared()
        if self._fork_server:
            try:
                return self._fork_server.fork(environment)
            except OSError:
                self._fork_server.close()
        self._fork_server = ForkServer.prepare()
        self._fork_server.start()
        return self._fork_server.fork(environment)

    def _greet(self, worker: _Worker) -> None:
        """Receive a new worker's word that it is ready.

        Raises:
            ConfigError: When the configuration cannot be used where the worker runs.
        """
        answer = json.loads(worker.connection.recv_bytes())
        if "error" in answer:
            self._drop(worker)
            raise ConfigError(answer["error"])
        worker.ready = True

    def _drop(self, worker: _Worker) -> None:
        """End a worker; another is started when one is needed."""
        if worker in self._workers:
            self._workers.remove(worker)
        worker.end()
