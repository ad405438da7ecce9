"""Flower's ServerApp: drives the round over Flower's messages, through :class:`.FlowerPool`."""

import contextlib
import logging
import warnings
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import D2FTError
from d2ft_fl.flower.wake import is_simulated, wake
from d2ft_fl.records.run_folder import claim_folder, note_failure, read_status
from d2ft_fl.server import console as run_console
from d2ft_fl.util import terminal

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured federation and log its lines and tables."""
    folder: Path | None = None
    try:
        if is_simulated(grid):
            wake(grid)
        # PyTorch is imported here and in the workers at once.
        from d2ft_fl.flower.grid_pool import FlowerPool
        from d2ft_fl.rounds.checks import checked
        from d2ft_fl.server import run

        config = checked(RunConfig.from_mapping(context.run_config), run_console.note)
        folder = claim_folder(config)
        terminal.say(f"run folder: {folder}")
        run_console.title(config)
        run_console.columns(config)
        filled = RunConfig(**{**vars(config), "run_folder": str(folder)})
        with contextlib.closing(FlowerPool(grid, filled)) as pool:
            summary = run.run(filled, pool, run_console.round_line)
        run_console.summary(summary)
    except BaseException as error:
        known = isinstance(error, D2FTError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        named = str(context.run_config.get("run-folder", ""))
        # The folder could not be claimed: whoever made it waits for a word, unless it has a run.
        if folder is None and named and not _has_a_run(Path(named)):
            folder = Path(named)
        if folder:
            note_failure(folder, reason)
        if known:
            _last_word(f"d2ft: {error}")
        raise  # so that Flower calls the run failed


def _has_a_run(folder: Path) -> bool:
    return read_status(folder).get("status", "starting") != "starting"


def _last_word(line: str) -> None:
    """Say one line and keep Flower from burying it under tracebacks in this ending process."""
    logging.getLogger("flwr").addFilter(lambda record: False)
    warnings.simplefilter("ignore")
    terminal.say(line)
