"""``d2ft report``."""

from pathlib import Path
from typing import Annotated

import typer

from d2ft_fl.cli.common import failures
from d2ft_fl.errors import ConfigError
from d2ft_fl.util import terminal
from d2ft_fl.util.strict_json import write_json


def report_command(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The folder of a run, or of a sweep.")
    ],
    output: Annotated[Path | None, typer.Option(help="PATH/report.html.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a sweep's table in Markdown instead.")
    ] = False,
    across: Annotated[
        str, typer.Option(metavar="KEY", help="With --markdown: a column for each of its values.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Write the page of a run or of a sweep, also while it goes on."""
    from d2ft_fl.report import pages, plan_figure

    with failures():
        if across and not markdown:
            raise ConfigError("--across is a column of --markdown; give both")
        if markdown and (as_json or output is not None):
            raise ConfigError("--markdown prints a table alone; leave out --json and --output")
        if markdown:
            typer.echo(pages.sweep_table(path, across), nl=False)
            return
        if output is not None:
            plan_figure.check_output(output, pages.SUFFIXES)
        kind = pages.kind_of(path)
        page = (pages.run_page if kind == pages.RUN else pages.sweep_page)(path, output)
    if as_json:
        typer.echo(write_json({"kind": kind, "report": str(page.absolute())}))
    else:
        terminal.say(f"report: {page.absolute()}")
