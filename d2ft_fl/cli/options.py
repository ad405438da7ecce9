"""``d2ft options``."""

import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from d2ft_fl.cli.common import failures
from d2ft_fl.cli.options_page import allowed_words, by_group, to_markdown, to_toml, toml_value
from d2ft_fl.config.option import TYPE_NAMES, Option
from d2ft_fl.config.renamed import RENAMED, notice
from d2ft_fl.config.run_config import OPTIONS
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import nearest
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.terminal import console, say


def options_command(
    name: Annotated[str, typer.Argument(help="One of them, in full.")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print all of them, as docs/options.md has them.")
    ] = False,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print all of them as a file for --config.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the options of a run: what they mean, their defaults, and what they may be."""
    with failures():
        if markdown + as_toml + as_json > 1:
            raise ConfigError("--markdown, --toml and --json exclude each other; give one")
        found = [_named(name)] if name else list(OPTIONS.values())
    if as_json:
        typer.echo(write_json([one.to_json() for one in found]))
    elif markdown:
        typer.echo(to_markdown(found), nl=False)
    elif as_toml:
        typer.echo(to_toml(found), nl=False)
    elif name:
        _one(found[0])
    else:
        _tables(found)


def _named(name: str) -> Option:
    """Return an option by its present or old name.

    Raises:
        ConfigError: When there is none of that name, with the nearest one.
    """
    now = RENAMED.get(name, name)
    if now not in OPTIONS:
        raise ConfigError(f"unknown option {name!r}; {nearest(name, OPTIONS)}")
    if now != name:
        print(notice(name, now), file=sys.stderr)
    return OPTIONS[now]


def _one(option: Option) -> None:
    """Print one option in full."""
    unit = f", in {option.unit}" if option.unit else ""
    say(f"{option.key} = {toml_value(option.default)}")
    console.print(option.text, markup=False, soft_wrap=False)
    say(f"\n{TYPE_NAMES[option.kind]}{unit}; group: {option.group}")
    if allowed := allowed_words(option):
        console.print(f"allowed: {allowed}", markup=False, soft_wrap=False)


def _tables(options: list[Option]) -> None:
    """Print options, a table a group."""
    for group, members in by_group(options).items():
        table = Table(title=group, title_justify="left", show_header=False, expand=False)
        table.add_column("option", no_wrap=True)
        table.add_column("default", max_width=12, overflow="fold")
        table.add_column("what it does", overflow="fold")
        for one in members:
            allowed = f" ({allowed_words(one)})" if allowed_words(one) else ""
            default = escape(toml_value(one.default))
            table.add_row(one.key, default, escape(one.text) + f"[dim]{escape(allowed)}[/dim]")
        console.print(table)
    say("one of them in full: d2ft options NAME; set one: d2ft run --set NAME=VALUE")
