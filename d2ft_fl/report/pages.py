"""Pages of runs and sweeps: one HTML file each, with its charts inside, which needs no network."""

from pathlib import Path

from d2ft_fl.errors import ConfigError
from d2ft_fl.report import html
from d2ft_fl.report.run import run_html
from d2ft_fl.report.run_folder import ROUNDS, STATUS, RunFolder
from d2ft_fl.report.sweep import sweep_html
from d2ft_fl.report.sweep_folder import TRIALS, SweepFolder
from d2ft_fl.report.sweep_markdown import sweep_markdown

PAGE, SUFFIXES = "report.html", (".html",)
RUN, SWEEP = "run", "sweep"


def run_page(folder: Path, output: Path | None = None) -> Path:
    """Write a run's page, by default into its folder; returns where it is.

    Raises:
        ConfigError: When there is nothing to show, the folder is damaged, or the page cannot be
            written.
    """
    return _write(run_html(RunFolder.read(folder)), output or folder / PAGE)


def sweep_page(folder: Path, output: Path | None = None) -> Path:
    """Write a sweep's page, by default into its folder; returns where it is.

    Raises:
        ConfigError: As :func:`run_page`.
    """
    return _write(sweep_html(SweepFolder.read(folder)), output or folder / PAGE)


def sweep_table(folder: Path, across: str = "") -> str:
    """Make a sweep's table in Markdown; see :func:`.sweep_markdown.sweep_markdown`.

    Raises:
        ConfigError: When the folder is no sweep's, is damaged, or has nothing to show.
    """
    if kind_of(folder) != SWEEP:
        raise ConfigError(f"{str(folder)!r} is the folder of a run; only sweeps have a table")
    return sweep_markdown(SweepFolder.read(folder), across)


def kind_of(folder: Path) -> str:
    """Return ``RUN`` or ``SWEEP``, by what a folder holds.

    Raises:
        ConfigError: When it is neither.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    if folder.joinpath(TRIALS).is_file():
        return SWEEP
    if any(folder.joinpath(name).is_file() for name in (ROUNDS, STATUS)):
        return RUN
    raise ConfigError(
        f"{str(folder)!r} is neither the folder of a run, which has {ROUNDS}, nor that of a sweep, "
        f"which has {TRIALS}"
    )


def _write(pieces: list[str], path: Path) -> Path:
    html.write(pieces, path)
    return path
