"""Back ends without Flower: a run in this process, or in worker processes of its own.

Most tests, and trials of sweeps, run in this process.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.client.trainer import client_trainer
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.records.run_folder import Progress
from d2ft_fl.rounds.federation import Report
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.runtime.worker_pool import Job, WorkerPool
from d2ft_fl.server import run
from d2ft_fl.server.dispatch import ClientFailure, RoundDispatch


class _Everyone:
    """A client pool whose clients are always there."""

    config: RunConfig

    def clients(self, round_number: int) -> dict[int, int]:
        """Return all clients: client -> 0."""
        return dict.fromkeys(range(self.config.clients), 0)


class InProcessPool(_Everyone):
    """All clients in this process, one after the other; nobody can end one that hangs.

    Attributes:
        config: The options of the run.
        client_trainer: Trains the clients.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.client_trainer = client_trainer(config)

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], dict[int, ClientFailure]]:
        """Return the reports of clients, and why others do not report."""
        return [self.client_trainer.report(client, round_number) for client in clients], {}

    def train(self, work: RoundDispatch) -> Iterator[tuple[int, bytes]]:
        """Train client after client, and yield each reply."""
        shared = self.config.transport == "shared"
        for client in work.costs:
            message = work.encode(client, shared)
            weights = work.weights if shared else None
            yield client, self.client_trainer.work(message, weights, (work.round, client))


class WorkerProcessPool(_Everyone):
    """All clients in worker processes of this one, several at once.

    Attributes:
        config: The options of the run.
        worker_pool: The worker processes.
        shared_memory: Where model and replies go, from the first round with shared transport on.
    """

    def __init__(self, config: RunConfig, worker_pool: WorkerPool):
        self.config, self.worker_pool = config, worker_pool
        self.shared_memory: SharedMemory | None = None

    def close(self) -> None:
        """Delete what was shared."""
        if self.shared_memory:
            self.shared_memory.close()

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], dict[int, ClientFailure]]:
        """Return the reports of clients, and why others do not report."""
        try:
            rows = self.worker_pool.reports(clients, round_number, self.config.round_timeout)
        except RunError as error:
            return [], dict.fromkeys(clients, ClientFailure(str(error)))
        return [Report(c, n, Budget.from_json(b)) for c, n, b in rows], {}

    def train(
        self, work: RoundDispatch
    ) -> Iterator[tuple[int, bytes | memoryview | ClientFailure]]:
        """Train the longest first, each in the worker process that is free next."""
        config = self.config
        if config.transport == "shared" and self.shared_memory is None:
            self.shared_memory = SharedMemory.create(work.model_bytes, self.worker_pool.size)
        shared_memory = self.shared_memory
        with work.stopwatch.of("broadcast"):
            jobs = self._jobs(work)
        for client, reply in self.worker_pool.work(
            jobs, config.round_timeout, config.client_timeout
        ):
            if reply != b"":
                yield client, reply
            if shared_memory:
                yield from shared_memory.arrived(work.round)

    def _jobs(self, work: RoundDispatch) -> list[Job]:
        shared_memory = self.shared_memory
        model = str(shared_memory.publish(work.round, work.weights)) if shared_memory else None
        return [
            Job(
                work.round,
                client,
                work.encode(client, shared_memory is not None),
                model,
                str(shared_memory.reply_path(work.round, client)) if shared_memory else None,
            )
            for client in work.longest_first
        ]


def run_local(
    config: RunConfig,
    progress: Progress = lambda row: None,
    report: bool = True,
    workers: int = 0,
) -> dict[str, Any]:
    """Run a checked configuration without Flower; return the summary.

    Args:
        config: A checked configuration.
        progress: Called with each round's line.
        report: Whether to write the run's page at its end.
        workers: Worker processes to train in; 0 trains in this process.

    Raises:
        ConfigError: When ``workers`` and options do not fit together.
        RunError: See :func:`d2ft_fl.server.run.run`.
    """
    if workers < 0:
        raise ConfigError(f"--workers {workers} must be 0 (this process) or more")
    if not workers and config.client_timeout:
        raise ConfigError(
            f"client-timeout = {config.client_timeout:g} needs processes that can be ended: add "
            "--workers 1 or more, or leave it at 0"
        )
    if not workers:
        return run.run(config, InProcessPool(config), progress, report)
    with WorkerPool(config.to_mapping(), workers) as worker_pool:
        pool = WorkerProcessPool(config, worker_pool)
        with contextlib.closing(pool):
            return run.run(config, pool, progress, report)
