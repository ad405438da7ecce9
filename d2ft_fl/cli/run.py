"""``d2ft run``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2ft_fl.cli.common import Files, Pairs, compiling, failures
from d2ft_fl.config.run_config import RunConfig, resolve_path
from d2ft_fl.config.sources import collect
from d2ft_fl.errors import ConfigError
from d2ft_fl.util import terminal
from d2ft_fl.util.strict_json import write_json

if TYPE_CHECKING:
    from d2ft_fl.flower.superlink import SuperLink
    from d2ft_fl.runtime.fork_server import ForkServer


class Backend(StrEnum):
    """Where clients run."""

    flower = "flower"
    local = "local"


def run(
    config: Files = None,
    set_: Pairs = None,
    backend: Annotated[
        Backend, typer.Option(help="Flower's simulation engine, or one plain process.")
    ] = Backend.flower,
    supernodes: Annotated[
        int, typer.Option(help="Flower's; 0: one, which has all cores of this machine.")
    ] = 0,
    workers: Annotated[
        int, typer.Option(help="With --backend local: processes to train in; 0: this one.")
    ] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a run to go on with, under its own options.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON and nothing else.")
    ] = False,
) -> None:
    """Run a federation and show it round by round."""
    with failures():
        if workers and backend is not Backend.local:
            raise ConfigError("--workers belongs to --backend local; Flower starts its own")
        options = collect(config or [], set_ or [], resume).check_values()
        from d2ft_fl.runtime.guard import temporary_files

        _see_to_leftovers(options.resume)
        processes = bool(workers) or backend is Backend.flower
        with temporary_files(), _fork_server(processes) as forks, _superlink(backend) as link:
            from d2ft_fl.server import console

            if not as_json:
                console.title(options)  # before PyTorch is imported, which takes seconds
            from d2ft_fl.rounds.checks import check_names, checked

            check_names(options)
            if forks:
                forks.start_here(link.log if link else None)
            with compiling(options, as_json):
                note = (lambda line: None) if as_json else console.note
                _run(checked(options, note), link, supernodes, workers, as_json)


def _see_to_leftovers(resume: str) -> None:
    """End what lives on of a run to resume, though all that should have ended it was killed, too.

    What lives on of other runs is named, for whoever asked for them to decide.
    """
    from d2ft_fl.runtime import guard
    from d2ft_fl.util import scratch

    for left in guard.left_behind():
        numbers = " ".join(str(number) for number in sorted(p.pid for p in left.processes))
        if resume and left.run_folder == resolve_path(resume):
            guard.end_family(left.home)
            scratch.delete(left.home)
            typer.echo(f"d2ft: ended what was left of this run: processes {numbers}", err=True)
        else:
            of = f" in {str(left.run_folder)!r}" if left.run_folder else ""
            typer.echo(
                f"d2ft: processes of a run{of} live on, though it was killed; end them with: "
                f"kill {numbers}",
                err=True,
            )
    scratch.prune()


@contextmanager
def _fork_server(wanted: bool) -> "Iterator[ForkServer | None]":
    """Yield what worker processes will be forks of, where there are to be some."""
    if not wanted:
        yield None
        return
    from d2ft_fl.runtime import fork_server

    with fork_server.shared() as forks:
        yield forks


@contextmanager
def _superlink(backend: Backend) -> "Iterator[SuperLink | None]":
    """Start Flower's SuperLink where clients run behind it."""
    if backend is Backend.local:
        yield None
        return
    from d2ft_fl.flower.superlink import app_folder, superlink

    app_folder()
    with superlink() as link:  # starts while PyTorch is imported
        yield link


def _run(
    config: RunConfig, link: "SuperLink | None", supernodes: int, workers: int, as_json: bool
) -> None:
    from d2ft_fl.flower.superlink import run_flower
    from d2ft_fl.records.run_folder import claim_folder, note_failure
    from d2ft_fl.runtime.in_process import run_local
    from d2ft_fl.server import console

    folder = claim_folder(config)
    config = replace(config, run_folder=str(folder))
    progress = terminal.progress_bar(hidden=as_json)
    if not as_json:
        terminal.say(f"run folder: {folder}")
        console.columns(config)
    try:
        with progress:
            task = progress.add_task("starting", total=config.rounds)

            def show(row: dict[str, Any]) -> None:
                if not as_json:
                    console.round_line(row)
                progress.update(task, completed=row["round"], description="training")

            if link is None:
                summary = run_local(config, show, workers=workers)
            else:
                summary = run_flower(config, folder, supernodes, show, link)
    except (Exception, KeyboardInterrupt) as error:
        note_failure(folder, str(error) or type(error).__name__)
        raise
    if as_json:
        typer.echo(write_json(summary))
    else:
        console.summary(summary)
