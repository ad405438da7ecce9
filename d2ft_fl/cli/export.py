"""``d2ft export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2ft_fl.cli.common import failures
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.terminal import say

if TYPE_CHECKING:
    from d2ft_fl.models.export import Exported


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft: an adapter; timm: whole weights. By default peft, of a run tuned by LoRA."
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="A new folder; RUN/adapter or RUN/timm.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Write a run's result as others load it: an adapter for peft, or weights for timm."""
    from d2ft_fl.models.export import export_run

    with failures():
        found = export_run(run, format, output)
    if as_json:
        typer.echo(write_json(found.to_json()))
    else:
        _exported(found)


def _exported(found: "Exported") -> None:
    """Print what was written, and how to load it."""
    from d2ft_fl.report.format import quantity

    what = "whole weights"
    if found.rank is not None:
        what = f"an adapter of rank {found.rank} of {', '.join(found.targets)}"
    say(f"{found.folder}: {what} for {found.format}, {quantity(found.bytes, 'B')}")
    for line in ("load it with", *(f"    {line}" for line in found.load)):
        say(line)
