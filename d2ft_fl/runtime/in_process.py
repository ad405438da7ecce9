"""Back ends without Flower: the same round in this process, or in a few of its own.

The first is what most tests and sweeps use.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.client.trainer import worker
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.rounds.federation import Report
from d2ft_fl.runtime.shared_memory import Exchange
from d2ft_fl.runtime.worker_pool import Crew, Job
from d2ft_fl.server import run
from d2ft_fl.server.dispatch import Fault, Work


class _Everyone:
    """A pool whose clients are always there."""

    config: RunConfig

    def clients(self, round: int) -> dict[int, int]:
        """All of them."""
        return dict.fromkeys(range(self.config.clients), 0)


class LocalPool(_Everyone):
    """All clients in this process, one after the other; nobody can end one that hangs."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.worker = worker(config)

    def reports(self, round: int, clients: Sequence[int]) -> tuple[list[Report], dict[int, Fault]]:
        """What clients say of themselves."""
        return [self.worker.report(client, round) for client in clients], {}

    def train(self, work: Work) -> Iterator[tuple[int, bytes]]:
        """Train client after client."""
        shared = self.config.transport == "shared"
        for client in work.costs:
            message = work.encode(client, shared)
            yield client, self.worker.work(message, work.weights if shared else None)


class CrewPool(_Everyone):
    """All clients in child processes of this one, several at once."""

    def __init__(self, config: RunConfig, crew: Crew):
        self.config, self.crew = config, crew
        self.exchange: Exchange | None = None  # from the first round on, if that is asked for

    def close(self) -> None:
        """Delete what was shared."""
        if self.exchange:
            self.exchange.close()

    def reports(self, round: int, clients: Sequence[int]) -> tuple[list[Report], dict[int, Fault]]:
        """What clients say of themselves."""
        try:
            rows = self.crew.reports(clients, round, self.config.round_timeout)
        except RunError as error:
            return [], dict.fromkeys(clients, Fault(str(error)))
        return [Report(c, n, Budget.from_mapping(b)) for c, n, b in rows], {}

    def train(self, work: Work) -> Iterator[tuple[int, bytes | memoryview | Fault]]:
        """Train the longest first, each where there is room next."""
        config = self.config
        if config.transport == "shared" and self.exchange is None:
            self.exchange = Exchange.create(work.model_bytes, self.crew.size)
        exchange = self.exchange
        with work.clock.of("broadcast"):
            jobs = self._jobs(work)
        for client, reply in self.crew.work(jobs, config.round_timeout, config.client_timeout):
            if reply != b"":
                yield client, reply
            if exchange:
                yield from exchange.arrived(work.round)

    def _jobs(self, work: Work) -> list[Job]:
        exchange = self.exchange
        model = str(exchange.publish(work.round, work.weights)) if exchange else None
        return [
            Job(
                client,
                work.encode(client, exchange is not None),
                model,
                str(exchange.reply_path(work.round, client)) if exchange else None,
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
        return run.run(config, LocalPool(config), progress, report)
    with Crew(config.to_mapping(), workers) as crew:
        pool = CrewPool(config, crew)
        with contextlib.closing(pool):
            return run.run(config, pool, progress, report)
