"""The in-process back end: the same round, without Flower. What most tests and sweeps use."""

from collections.abc import Callable, Iterator
from typing import Any

from d2ft_fl import loop
from d2ft_fl.config import RunConfig
from d2ft_fl.federation import Report
from d2ft_fl.worker import worker


class LocalPool:
    """All clients in this process, one after the other."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.worker = worker(config)

    def reports(self, round: int) -> list[Report]:
        """What every client says of itself."""
        return [self.worker.report(client, round) for client in range(self.config.clients)]

    def train(
        self, clients: list[int], assignment: Callable[[int], bytes]
    ) -> Iterator[tuple[int, bytes | loop.Fault]]:
        """Train client after client."""
        for client in clients:
            yield client, self.worker.work(assignment(client))


def run_local(
    config: RunConfig, progress: loop.Progress = lambda row: None, report: bool = True
) -> dict[str, Any]:
    """Run a checked configuration in this process; returns the summary. See :func:`loop.run`."""
    return loop.run(config, LocalPool(config), progress, report)
