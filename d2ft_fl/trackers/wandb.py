"""Weights & Biases: a run in the run folder's ``wandb/``, offline unless ``WANDB_MODE`` is set.

Send it later with ``wandb sync`` and the folder ``offline-run-...`` in there.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from d2ft_fl.trackers import scalars


class WandB:
    """A run, and the processes that wandb writes it with."""

    def __init__(self, config: Mapping[str, Any], folder: Path):
        # Offline too, it would report errors of its own over the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._owns_service = "WANDB_SERVICE" not in os.environ  # one that is there has other runs
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "d2ft-fl"),
                name=folder.name,
                dir=folder,
                config=dict(config),
                mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except BaseException:
            self._stop_service()
            raise

    def round(self, row: dict[str, Any]) -> None:
        """Log one step of the history."""
        self._run.log(scalars(row), step=int(row["round"]))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the totals into the run's summary."""
        self._run.summary.update(scalars(summary, "summary/"))
        self._close(0)

    def fail(self, reason: str) -> None:
        """Write the reason into the run's summary."""
        try:
            self._run.summary.update({"failure": reason})
        finally:
            self._close(1)

    def _close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            self._stop_service()

    def _stop_service(self) -> None:
        if self._owns_service:
            wandb.teardown()


start = WandB
