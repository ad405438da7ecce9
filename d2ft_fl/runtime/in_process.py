"""Back ends without Flower: the same round in this process, or in a few of its own.

The first is what most tests and sweeps use.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.client.trainer import client_trainer
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.rounds.federation import Report
from d2ft_fl.runtime.shared_memory import SharedMemory
from d2ft_fl.runtime.worker_pool import Job, WorkerPool
from d2ft_fl.server import run
from d2ft_fl.server.dispatch import ClientFailure, RoundDispatch


class _Everyone:
    """A pool whose clients are always there."""

    config: RunConfig

    def clients(self, round_number: int) -> dict[int, int]:
        """All of them."""
        return dict.fromkeys(range(self.config.clients), 0)


class InProcessPool(_Everyone):
    """All clients in this process, one after the other; nobody can end one that hangs."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.client_trainer = client_trainer(config)

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], dict[int, ClientFailure]]:
        """What clients say of themselves."""
        return [self.client_trainer.report(client, round_number) for client in clients], {}

    def train(self, work: RoundDispatch) -> Iterator[tuple[int, bytes]]:
        """Train client after client."""
        shared = self.config.transport == "shared"
        for client in work.costs:
            message = work.encode(client, shared)
            yield client, self.client_trainer.work(message, work.weights if shared else None)


class WorkerProcessPool(_Everyone):
    """All clients in child processes of this one, several at once."""

    def __init__(self, config: RunConfig, worker_pool: WorkerPool):
        self.config, self.worker_pool = config, worker_pool
        self.shared_memory: SharedMemory | None = (
            None  # from the first round on, if that is asked for
        )

    def close(self) -> None:
        """Delete what was shared."""
        if self.shared_memory:
            self.shared_memory.close()

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], dict[int, ClientFailure]]:
        """What clients say of themselves."""
        try:
            rows = self.worker_pool.reports(clients, round_number, self.config.round_timeout)
        except RunError as error:
            return [], dict.fromkeys(clients, ClientFailure(str(error)))
        return [Report(c, n, Budget.from_mapping(b)) for c, n, b in rows], {}

    def train(
        self, work: RoundDispatch
    ) -> Iterator[tuple[int, bytes | memoryview | ClientFailure]]:
        """Train the longest first, each where there is room next."""
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
                client,
                work.encode(client, shared_memory is not None),
                model,
                str(shared_memory.reply_path(work.round, client)) if shared_memory else None,
            )
            for client in work.longest_first
        ]


def run_local(
    config: RunConfig,
    progress: run.Progress = lambda row: None,
    report: bool = True,
    workers: int = 0,
) -> dict[str, Any]:
    """Run a checked configuration without Flower; returns the summary. See :func:`loop.run`.

    Args:
        workers: Processes to train in; 0 for this one.
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
