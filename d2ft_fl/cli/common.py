"""What the commands of ``d2ft`` share: how they fail, show progress and take options."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import click
import typer

from d2ft_fl.config.choices import DEVICES
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, D2FTError
from d2ft_fl.util import limits, terminal

DEVICE = click.Choice(DEVICES)  # the type of options that name one
Files = Annotated[
    list[Path] | None, typer.Option("--config", help="TOML file of options; the later one wins.")
]
Pairs = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, over files; may be repeated.")
]


@contextmanager
def failures() -> Iterator[None]:
    """End a command in one line for errors of ours: exit code 2 for what was asked, 1 for a run.

    To be told to end is to be interrupted, so that what we started stops with us.
    """
    handlers = {n: signal.signal(n, _interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except D2FTError as error:
        typer.echo(f"d2ft: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except OSError as error:  # a full disk, a folder that is gone
        where = f" {error.filename!r}" if error.filename else ""
        typer.echo(f"d2ft: {error.strerror or error}{where}{limits.advice(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("d2ft: stopped", err=True)
        raise typer.Exit(130) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def compiling(config: RunConfig, quiet: bool) -> Iterator[None]:
    """Compile the planner's solver in another process, where that was not done on this machine.

    The first plan waits for it.

    Args:
        config: The options of what will be planned, whose names were checked.
        quiet: Whether to say nothing.
    """
    from d2ft_fl.planning import solver_process

    with solver_process.compiling(config.coupling == "spread") as compiles:
        if compiles and not quiet:
            terminal.say("compiling the planner, once on this machine: about ten seconds")
        yield


def compile_once(config: RunConfig, quiet: bool) -> None:
    """Compile the planner's solver, and wait for it, where that was not done on this machine.

    Args:
        config: The options of what will be planned.
        quiet: Whether to say nothing.
    """
    from d2ft_fl.planning import knapsack

    coupled = config.coupling == "spread"
    if not knapsack.is_compiled(coupled):
        if not quiet:
            terminal.say("compiling the planner, once on this machine: about ten seconds")
        knapsack.compile_solver(coupled)
