"""``d2ft sweep``."""

from pathlib import Path
from typing import Annotated

import typer

from d2ft_fl.cli.common import Pairs, compile_once, failures


def sweep_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML: what varies; see above.")],
    set_: Pairs = None,
    output: Annotated[
        Path | None, typer.Option(help="The sweep's folder; by default one that FILE decides.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; by default one a core.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster to run on, like 10.0.0.1:6379, or auto.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials again that failed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the trials.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results as JSON and nothing else.")
    ] = False,
) -> None:
    """Run a grid or a random search of options and seeds, each trial a whole federation.

    The same command goes on where it was stopped. FILE is TOML:

    \b
    seeds = 3                           # each setting with seeds 0, 1 and 2
    \\[base]                              # options of all trials
    rounds = 10
    \\[grid]                              # every combination
    strategy = ["d2ft", "random"]
    \\[search]                            # random draws, each with the whole grid
    samples = 20
    lr = { min = 1e-4, max = 1e-2, log = true }
    batch-size = { choice = [8, 16, 32] }
    \\[run]
    asha = true                         # stop early what is behind

    experiments/sweep_example.toml has everything that a file can say.
    """
    from d2ft_fl.sweep.command import sweep

    with failures():
        code = sweep(
            file, set_ or [], output, at_once, address, retry_failed, dry_run, as_json,
            compile_once,
        )  # fmt: skip
    raise typer.Exit(code)
