"""``d2ft certificates``."""

from pathlib import Path
from typing import Annotated

import typer

from d2ft_fl.cli.common import failures
from d2ft_fl.util.strict_json import write_json


def certificates_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address of the SuperLink's machine; may be repeated."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="SuperNodes to make keys for.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Make certificates and keys for a deployment with TLS and authenticated SuperNodes."""
    from d2ft_fl.flower import certificates

    with failures():
        made = [str(path) for path in certificates.make(folder, host or [], nodes)]
    typer.echo(write_json(made) if as_json else "\n".join(made))
