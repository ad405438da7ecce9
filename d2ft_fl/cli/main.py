"""The ``d2ft`` command."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from d2ft_fl.budgets import device_classes
from d2ft_fl.cli import console
from d2ft_fl.cli.strategies_page import to_markdown
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.sources import collect
from d2ft_fl.errors import ConfigError, D2FTError
from d2ft_fl.models.spec import GLYPH_NAME
from d2ft_fl.records.run_folder import claim_folder, note_failure
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.server import console as run_console
from d2ft_fl.util import terminal

app = typer.Typer(
    help="Federated fine-tuning of transformers under hard per-client budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


bench_app = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@contextmanager
def failures() -> Iterator[None]:
    """Errors of ours end a command in one line: exit code 2 for what was asked, 1 for a run.

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
        typer.echo(f"d2ft: {error.strerror or error}{where}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("d2ft: stopped", err=True)
        raise typer.Exit(130) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Precision(StrEnum):
    """Types of products and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Device(StrEnum):
    """Where to compute."""

    cpu = "cpu"
    cuda = "cuda"


class Tuning(StrEnum):
    """How assigned heads are tuned."""

    full = "full"
    lora = "lora"


class Backend(StrEnum):
    """Where clients run."""

    flower = "flower"
    local = "local"


Files = Annotated[
    list[Path] | None, typer.Option("--config", help="TOML file of options; the later one wins.")
]
Pairs = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, over files; may be repeated.")
]


@app.command()
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
        options = checked(collect(config or [], set_ or [], resume))
        _run(options, backend, supernodes, workers, as_json)


@bench_app.command("step")
def bench_step_command(
    model: Annotated[str, typer.Option(help="A plain timm ViT.")] = "vit_small_patch16_224",
    image_size: Annotated[int, typer.Option(help="Pixels; 0 keeps the model's own.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of torch, on a CPU.")] = 2,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    precision: Annotated[Precision, typer.Option(help="Of both sides.")] = Precision.fp32,
    slots: Annotated[int, typer.Option(help="Slots of a batch.")] = 1,
    tuning: Annotated[Tuning, typer.Option(help="How heads are tuned.")] = Tuning.full,
    pairs: Annotated[int, typer.Option(help="Pairs of steps a schedule.")] = 15,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Scheduled side: compute activations again.")
    ] = False,
    micro_batches: Annotated[
        int,
        typer.Option(
            "--micro-batches", "--accumulate", help="Scheduled side: passes that a batch is run in."
        ),
    ] = 1,
    output: Annotated[
        Path | None, typer.Option(help="A picture to write: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")] = False,
) -> None:
    """Time scheduled training beside full fine-tuning of the unmodified timm model."""
    from d2ft_fl.bench import step
    from d2ft_fl.report import plan_figure

    with failures():
        what = step.StepBench(
            model, image_size, batch_size, threads, device.value, precision.value, slots, pairs,
            checkpointing, micro_batches, tuning.value,
        )  # fmt: skip
        if output is not None:
            plan_figure.check_output(output, step.SUFFIXES)
        with _progress(hidden=as_json) as progress:
            task = progress.add_task("measuring", total=None)

            def done(name: str) -> None:
                progress.update(task, advance=1, description=name)

            rows = step.bench_step(what, done)
        if output is not None:
            step.draw(rows, what, output)
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows]))
        return
    console.bench_table(rows, tuning.value)
    if output is not None:
        terminal.say(f"picture: {output}")


@bench_app.command("planner")
def bench_planner_command(
    clients: Annotated[
        list[int] | None, typer.Option(help="How many; may be repeated. 100, 1000 and 10000.")
    ] = None,
    subnets: Annotated[int, typer.Option(help="Of the model.")] = 144,
    sample: Annotated[int, typer.Option(help="Clients that HiGHS solves exactly.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")] = False,
) -> None:
    """Time the planner's solver on made-up clients, beside exact optima."""
    from d2ft_fl.bench import planner

    with failures(), _progress(hidden=as_json) as progress:
        task = progress.add_task("measuring", total=None)

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)

        rows = planner.bench_planner(clients or [100, 1_000, 10_000], subnets, sample, done)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
    else:
        console.planner_table(rows)


@bench_app.command("scale")
def bench_scale_command(
    clients: Annotated[int, typer.Option(help="How many take part in a round.")] = 100,
    examples: Annotated[int, typer.Option(help="Of each client, made up.")] = 32,
    model: Annotated[str, typer.Option(help="As model=...")] = "vit_tiny_patch16_224",
    image_size: Annotated[
        int, typer.Option(help="Pixels; 0 keeps the model's own, -1 is 64, or that of vit_glyphs.")
    ] = -1,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of a run, besides one before them.")] = 3,
    repeats: Annotated[int, typer.Option(help="Runs of each side, in turns.")] = 2,
    side: Annotated[
        list[str] | None,
        typer.Option(help="floor, flower, full or d2ft; may be repeated. By default all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON only.")] = False,
) -> None:
    """Time whole rounds beside two plain processes, and beside Flower's own FedAvg."""
    from d2ft_fl.bench import scale

    with failures(), _progress(hidden=as_json) as progress:
        if image_size < 0:
            image_size = 0 if model == GLYPH_NAME else 64
        step = scale.ScaleBench(
            clients, examples, model, image_size, batch_size, rounds, repeats,
            tuple(side or scale.SIDES),
        ).check()  # fmt: skip
        task = progress.add_task("measuring", total=repeats * len(step.sides))

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = scale.bench_scale(step, done)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        console.scale_table(found)


@app.command("plan")
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
    with failures():
        options = checked_options(collect(config or [], [*(set_ or []), *pairs]))
        _plan(options, examples, rounds, output, as_json)


@app.command("sweep")
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
            _compile_once,
        )  # fmt: skip
    raise typer.Exit(code)


@app.command("budgets")
def budgets_command(
    source: Annotated[
        str, typer.Argument(help="A TOML file of device classes, devices, or hardware.")
    ],
    clients: Annotated[int, typer.Option(min=1, help="Clients to spread over the classes.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print classes as JSON only.")] = False,
) -> None:
    """Check a file of budgets and show what it means."""
    with failures():
        found = device_classes.named(source)
    rows = found.to_json(clients)
    if as_json:
        typer.echo(json.dumps({"varies": found.varies, "classes": rows}))
        return
    console.budgets_table(source, clients, found)


@app.command("choose")
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

    with failures():
        pairs = ["strategy=caff", f"model={models[0]}", "pretrained=none", *(set_ or [])]
        options = checked_options(collect(config or [], pairs))
        with _progress(hidden=as_json) as progress:
            task = progress.add_task("planning", total=len(models))

            def done(model: str) -> None:
                progress.update(task, advance=1, description=model)

            found = choose(options, models, examples, done)
    if as_json:
        typer.echo(json.dumps([c.to_json() for c in found]))
    else:
        console.candidates_table(found)


@app.command("strategies")
def strategies_command(
    name: Annotated[str, typer.Argument(help="One of them, in full.")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print all of them, as docs/methods.md has them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the strategies: where they come from, what they do, which budgets they keep."""
    from d2ft_fl.rounds import strategies

    with failures():
        found = [strategies.find(name)] if name else strategies.methods()
    if as_json:
        typer.echo(json.dumps([m.to_json() for m in found]))
    elif markdown:
        typer.echo(to_markdown(found), nl=False)
    elif name:
        console.method(found[0])
    else:
        console.methods_table(found)


@app.command("profile")
def profile_command(
    threads: Annotated[int, typer.Option(help="Threads of torch, on a CPU.")] = 1,
    device: Annotated[Device, typer.Option(help="What to measure.")] = Device.cpu,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Measure this machine's speed and free memory, as budgets = "measured" does."""
    from d2ft_fl.budgets.machine import profile

    with failures():
        found = profile(device.value, threads)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    console.profile_table(found)


@app.command("certificates")
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
    typer.echo(json.dumps(made) if as_json else "\n".join(made))


@app.command("report")
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
    from d2ft_fl import report
    from d2ft_fl.report import plan_figure

    with failures():
        if across and not markdown:
            raise ConfigError("--across is a column of --markdown; give both")
        if markdown and (as_json or output is not None):
            raise ConfigError("--markdown prints a table alone; leave out --json and --output")
        if markdown:
            typer.echo(report.sweep_table(path, across), nl=False)
            return
        if output is not None:
            plan_figure.check_output(output, report.SUFFIXES)
        kind = report.kind_of(path)
        page = (report.run_page if kind == report.RUN else report.sweep_page)(path, output)
    if as_json:
        typer.echo(json.dumps({"kind": kind, "report": str(page.absolute())}))
    else:
        terminal.say(f"report: {page.absolute()}")


@app.command("export")
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
        typer.echo(json.dumps(found.to_json()))
    else:
        console.exported(found)


def _progress(hidden: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=terminal.console, transient=True,
        disable=hidden or not terminal.console.is_terminal,
    )  # fmt: skip


def _compile_once(config: RunConfig, quiet: bool) -> None:
    """Compile the planner's solver where that was not done before, and say so."""
    from d2ft_fl.planning import knapsack

    coupled = config.coupling == "spread"
    if not knapsack.is_compiled(coupled):
        if not quiet:
            terminal.say("compiling the planner, once on this machine: about half a minute")
        knapsack.compile_solver(coupled)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _plan(
    config: RunConfig, examples: int | None, rounds: int, output: Path | None, as_json: bool
) -> None:
    from d2ft_fl.preview import console
    from d2ft_fl.preview import page as preview_page
    from d2ft_fl.preview.plan_preview import preview
    from d2ft_fl.report import plan_figure

    if output is not None:
        plan_figure.check_output(output, preview_page.SUFFIXES)
    _compile_once(config, as_json)
    with _progress(hidden=as_json) as progress:
        task = progress.add_task(f"loading {config.model}", total=rounds)

        def done(planned: int) -> None:
            progress.update(task, completed=planned, description="planning")

        found = preview(config, examples, rounds, done)
    if output is not None:
        preview_page.write(found, output)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    console.show(found)
    if output is not None:
        terminal.say(f"{'page' if output.suffix == '.html' else 'picture'}: {output}")


def _run(config: RunConfig, backend: Backend, supernodes: int, workers: int, as_json: bool) -> None:
    from d2ft_fl.flower.superlink import run_flower
    from d2ft_fl.runtime.in_process import run_local

    folder = claim_folder(config)
    config = replace(config, run_folder=str(folder))
    progress = _progress(hidden=as_json)
    if not as_json:
        terminal.say(f"run folder: {folder}")
        run_console.header(config)
    try:
        _compile_once(config, as_json)
        with progress:
            task = progress.add_task("starting", total=config.rounds)

            def show(row: dict[str, Any]) -> None:
                if not as_json:
                    run_console.round_line(row)
                progress.update(task, completed=row["round"], description="training")

            if backend is Backend.local:
                summary = run_local(config, show, workers=workers)
            else:
                summary = run_flower(config, folder, supernodes, show)
    except (Exception, KeyboardInterrupt) as error:
        note_failure(folder, str(error) or type(error).__name__)
        raise
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        run_console.summary(summary)


if __name__ == "__main__":
    app()
