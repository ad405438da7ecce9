"""``d2ft plan`` and ``d2ft choose``: what would be trained, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from d2ft_fl.cli.common import Files, Pairs, compiling, failures
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.sources import collect
from d2ft_fl.util import terminal
from d2ft_fl.util.strict_json import write_json

if TYPE_CHECKING:
    from d2ft_fl.preview.model_selection import Candidate


def plan_command(
    config: Files = None,
    set_: Pairs = None,
    model: Annotated[str | None, typer.Option(help="As --set model=...")] = None,
    budgets: Annotated[str | None, typer.Option(help="As --set budgets=...")] = None,
    clients: Annotated[int | None, typer.Option(help="As --set clients=...")] = None,
    examples: Annotated[
        int | None, typer.Option(help="What every client has, without reading the data.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds to plan, as if every client answered.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="A picture or a page to write: .png, .svg, .pdf or .html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as JSON only.")] = False,
) -> None:
    """Plan rounds without training, and show who would do what, at what cost."""
    shortcuts = {"model": model, "budgets": budgets, "clients": clients}
    pairs = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
    from d2ft_fl.rounds.checks import checked_options

    with failures():
        options = checked_options(collect(config or [], [*(set_ or []), *pairs]))
        _plan(options, examples, rounds, output, as_json)


def _plan(
    config: RunConfig, examples: int | None, rounds: int, output: Path | None, as_json: bool
) -> None:
    from d2ft_fl.preview import console
    from d2ft_fl.preview import page as preview_page
    from d2ft_fl.preview.plan_preview import preview
    from d2ft_fl.report import plan_figure
    from d2ft_fl.runtime.worker_memory import worker_memory

    if output is not None:
        plan_figure.check_output(output, preview_page.SUFFIXES)
    with compiling(config, as_json), terminal.progress_bar(hidden=as_json) as progress:
        task = progress.add_task(f"loading {config.model}", total=rounds)

        def done(planned: int) -> None:
            progress.update(task, completed=planned, description="planning")

        found = preview(config, examples, rounds, done, worker_memory())
    if output is not None:
        preview_page.write(found, output)
    if as_json:
        typer.echo(write_json(found.to_json()))
        return
    console.show(found)
    if output is not None:
        terminal.say(f"{'page' if output.suffix == '.html' else 'picture'}: {output}")


def choose_command(
    models: Annotated[list[str], typer.Argument(help="Names of plain timm ViTs.")],
    config: Files = None,
    set_: Pairs = None,
    examples: Annotated[
        int | None, typer.Option(help="What every client has, without reading the data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Choose among models by how many layers clients can train, as CAFF does.

    Plans with strategy caff, whatever files say, unless --set names another. Budgets must be
    absolute (memory, bytes, a deadline), like budgets=hardware.
    """
    from d2ft_fl.preview.model_selection import choose
    from d2ft_fl.rounds.checks import checked_options

    with failures():
        pairs = ["strategy=caff", f"model={models[0]}", "pretrained=none", *(set_ or [])]
        options = checked_options(collect(config or [], pairs))
        with terminal.progress_bar(hidden=as_json) as progress:
            task = progress.add_task("planning", total=len(models))

            def done(model: str) -> None:
                progress.update(task, advance=1, description=model)

            found = choose(options, models, examples, done)
    if as_json:
        typer.echo(write_json([c.to_json() for c in found]))
    else:
        _candidates_table(found)


def _candidates_table(found: list["Candidate"]) -> None:
    """Print models to choose from, one a row."""
    table = Table(title="Layers that clients can train", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("layers", "trained, mean", "share", "clients sitting out", "subnets trained"):
        table.add_column(column, justify="right")
    for c in found:
        share = c.trained_layers / c.layers
        table.add_row(
            escape(c.model) + (" *" if c.chosen else ""), str(c.layers),
            f"{c.trained_layers:.2f}", f"{share:.0%}", str(c.sit_out), f"{c.coverage:.0%}",
        )  # fmt: skip
    terminal.console.print(table)
    best = next(c for c in found if c.chosen)
    terminal.say(f"* most layers trained by the mean client: {best.model}")
