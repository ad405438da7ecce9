"""``d2ft bench``: speed and memory of this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import click
import typer

from d2ft_fl.cli.common import DEVICE, failures
from d2ft_fl.config.choices import PRECISIONS, PRODUCTS, TUNINGS
from d2ft_fl.config.renamed import given_twice, notice
from d2ft_fl.models.spec import GLYPH_NAME
from d2ft_fl.util import terminal
from d2ft_fl.util.strict_json import write_json

app = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


@app.command("step")
def step_command(
    model: Annotated[str, typer.Option(help="A plain timm ViT.")] = "vit_small_patch16_224",
    image_size: Annotated[int, typer.Option(help="Pixels; 0 keeps the model's own.")] = 0,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Examples of a step; may be repeated. 8.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch, on a CPU.")] = 2,
    device: Annotated[str, typer.Option(help="Where to compute.", click_type=DEVICE)] = "cpu",
    products: Annotated[
        str,
        typer.Option(
            help="Scheduled side, fp32 on a CPU: which library multiplies; auto: the faster one.",
            click_type=click.Choice(PRODUCTS),
        ),
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="Of both sides.", click_type=click.Choice(PRECISIONS))
    ] = "fp32",
    slots: Annotated[int, typer.Option(help="Slots of a batch.")] = 1,
    tuning: Annotated[
        str, typer.Option(help="How heads are tuned.", click_type=click.Choice(TUNINGS))
    ] = "full",
    pairs: Annotated[int, typer.Option(help="Pairs of steps a schedule.")] = 15,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Scheduled side: compute activations again.")
    ] = False,
    micro_batches: Annotated[
        int, typer.Option(help="Scheduled side: parts that a batch is run in.")
    ] = 1,
    accumulate: Annotated[
        int | None, typer.Option(hidden=True, help="The old name of --micro-batches.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A picture to write: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")] = False,
) -> None:
    """Time scheduled training beside full fine-tuning of the unmodified timm model."""
    from d2ft_fl.bench import step, step_picture
    from d2ft_fl.cli import bench_tables
    from d2ft_fl.report import plan_figure

    with failures():
        if accumulate is not None:
            old, present = "--accumulate", "--micro-batches"
            if micro_batches != 1:
                raise given_twice(old, present)
            typer.echo(notice(old, present), err=True)
            micro_batches = accumulate
        benches = [
            step.StepBench(
                model, image_size, size, threads, device, precision, slots, pairs,
                checkpointing, micro_batches, tuning, products,
            )
            for size in batch_size or [8]
        ]  # fmt: skip
        for what in benches:
            what.check()
        if output is not None:
            plan_figure.check_output(output, step_picture.SUFFIXES)
        with terminal.progress_bar(hidden=as_json) as progress:
            task = progress.add_task("measuring", total=None)

            def done(name: str) -> None:
                progress.update(task, advance=1, description=name)

            of_sizes = [step.bench_step(what, done) for what in benches]
        if output is not None:
            step_picture.draw(of_sizes, benches, output)
    rows = [row for of_size in of_sizes for row in of_size]
    if as_json:
        typer.echo(write_json([row.to_json() for row in rows]))
        return
    bench_tables.step_table(rows, tuning)
    if output is not None:
        terminal.say(f"picture: {output}")


@app.command("planner")
def planner_command(
    clients: Annotated[
        list[int] | None, typer.Option(help="How many; may be repeated. 100, 1000 and 10000.")
    ] = None,
    subnets: Annotated[int, typer.Option(help="Of the model.")] = 144,
    sample: Annotated[int, typer.Option(help="Clients that HiGHS solves exactly.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")] = False,
) -> None:
    """Time the planner's solver on made-up clients, beside exact optima."""
    from d2ft_fl.bench import planner
    from d2ft_fl.cli import bench_tables

    with failures(), terminal.progress_bar(hidden=as_json) as progress:
        task = progress.add_task("measuring", total=None)

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)

        rows = planner.bench_planner(clients or [100, 1_000, 10_000], subnets, sample, done)
    if as_json:
        typer.echo(write_json([asdict(row) for row in rows]))
    else:
        bench_tables.planner_table(rows)


@app.command("scale")
def scale_command(
    clients: Annotated[int, typer.Option(help="How many take part in a round.")] = 100,
    examples: Annotated[int, typer.Option(help="Of each client, made up.")] = 32,
    model: Annotated[str, typer.Option(help="As model=...")] = "vit_tiny_patch16_224",
    image_size: Annotated[
        int, typer.Option(help="Pixels; 0 keeps the model's own, -1 is 64, or that of vit_glyphs.")
    ] = -1,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of a run, besides one before them.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each side, in turns, at most.")] = 3,
    seconds: Annotated[
        float, typer.Option(help="No side is run again that would end later than that.")
    ] = 170.0,
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="floor, products, flower, full or d2ft; may be repeated. By default all."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON only.")] = False,
) -> None:
    """Time whole rounds beside two plain processes, and beside Flower's own FedAvg."""
    from d2ft_fl.bench import scale
    from d2ft_fl.cli import bench_tables

    with failures(), terminal.progress_bar(hidden=as_json) as progress:
        if image_size < 0:
            image_size = 0 if model == GLYPH_NAME else 64
        step = scale.ScaleBench(
            clients, examples, model, image_size, batch_size, rounds, repeats,
            tuple(side or scale.SIDES), seconds,
        ).check()  # fmt: skip
        task = progress.add_task("measuring", total=repeats * len(step.sides))

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = scale.bench_scale(step, done)
    if as_json:
        typer.echo(write_json(found))
    else:
        bench_tables.scale_table(found)


@app.command("start")
def start_command(
    part: Annotated[
        list[str] | None,
        typer.Option(help="lists, local, flower or worker; may be repeated. By default all."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON only.")] = False,
) -> None:
    """Time start-up beside imports and Flower's smallest app, and measure a worker's memory."""
    from d2ft_fl.bench import start
    from d2ft_fl.cli import bench_tables

    with failures(), terminal.progress_bar(hidden=as_json) as progress:
        task = progress.add_task("measuring", total=None)

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = start.bench_start(tuple(part or start.PARTS), repeats, done)
    if as_json:
        typer.echo(write_json(found))
    else:
        bench_tables.start_table(found)
