"""What a worker process takes before any model, measured in one."""

from d2ft_fl.budgets.process_memory import keep_worker_memory, kept_worker_memory
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.runtime.worker_pool import WorkerPool

SECONDS = 120.0


def measure() -> int:
    """Start a worker process, ask what it has, and keep the answer: bytes; takes some seconds.

    Raises:
        RunError: When it does not answer.
    """
    with WorkerPool(RunConfig().to_mapping(), 1) as pool:
        size = pool.resident(SECONDS)
    keep_worker_memory(size)
    return size


def worker_memory() -> int:
    """Return what was measured on this machine, measured now where it was not before: bytes."""
    kept = kept_worker_memory()
    return measure() if kept is None else kept
