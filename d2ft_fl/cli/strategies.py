"""``d2ft strategies``."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from d2ft_fl.cli.common import failures
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.terminal import console, say

if TYPE_CHECKING:
    from d2ft_fl.rounds.strategies import Strategy


def strategies_command(
    name: Annotated[str, typer.Argument(help="One of them, in full.")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print all of them, as docs/methods.md has them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the strategies: where they come from, what they do, which budgets they keep."""
    from d2ft_fl.cli.strategies_page import to_markdown
    from d2ft_fl.rounds import strategies

    with failures():
        if not name:
            found = strategies.builtin_strategies()
        elif name in strategies.STRATEGIES:
            found = [strategies.declared_strategy(name)]
        else:
            found = [strategies.load_strategy(name)]
    if as_json:
        typer.echo(write_json([m.to_json() for m in found]))
    elif markdown:
        typer.echo(to_markdown(found), nl=False)
    elif name:
        _method(found[0])
    else:
        _methods_table(found)


def _methods_table(found: list["Strategy"]) -> None:
    """Print strategies, one a row."""
    table = Table(title="Strategies", title_justify="left")
    for column in ("strategy", "what it does", "keeps budgets of"):
        table.add_column(column, no_wrap=column == "strategy")
    for m in found:
        table.add_row(m.name, escape(m.summary), m.kept)
    console.print(table)
    say("one of them in full, with its paper: d2ft strategies NAME")


def _method(found: "Strategy") -> None:
    """Print one strategy in full."""
    say(f"{found.name}: {found.text}")
    if found.paper:
        say(f"\n{found.paper}")
    say(f"\nkeeps budgets of: {found.kept}")
