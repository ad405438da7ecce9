"""``d2ft sweep``: from a file to a folder of results."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import platformdirs
import typer

from d2ft_fl.config.run_config import RunConfig, resolve_path
from d2ft_fl.config.sources import import_from_here
from d2ft_fl.errors import ConfigError
from d2ft_fl.sweep import show
from d2ft_fl.sweep.engine import Engine, TuneEngine
from d2ft_fl.sweep.folder import State, SweepFolder
from d2ft_fl.sweep.ledger import Ledger
from d2ft_fl.sweep.reading import read_sweep
from d2ft_fl.sweep.results import by_setting, trial_rows, write_tables
from d2ft_fl.sweep.spec import Sweep
from d2ft_fl.sweep.trials import Trial, expand, sweep_hash, sweep_metrics, varied
from d2ft_fl.sweep.written import toml_sweep
from d2ft_fl.util import terminal
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.torch_device import usable_device

FAILED, NOTHING_RAN = 1, 2  # exit codes
RESOLVED = "sweep.toml"


def sweep(
    file: Path,
    pairs: Sequence[str] = (),
    output: Path | None = None,
    at_once: int | None = None,
    address: str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    prepare: Callable[[RunConfig, bool], None] = lambda config, quiet: None,
    engine: Engine | None = None,
) -> int:
    """Run what is left of a sweep; returns the exit code.

    Args:
        file: Of the sweep.
        pairs: ``key=value``, over the options that all trials have in common.
        output: The folder; by default one that the sweep decides, so that it is found again.
        at_once: Trials that run at once, in place of the file's.
        address: Of a Ray cluster, in place of the file's.
        retry_failed: Run trials again that failed.
        dry_run: Only list the trials.
        as_json: Print JSON and nothing else.
        prepare: Called with a configuration before anything runs: what every process would
            otherwise do for itself.
        engine: What runs trials.

    Raises:
        ConfigError: When anything does not fit, before anything has started.
        RunError: When trials cannot be run here.
    """
    import_from_here()
    asked = read_sweep(file, pairs)
    run = replace(
        asked.run,
        at_once=asked.run.at_once if at_once is None else at_once,
        address=asked.run.address if address is None else address,
    )
    if run.address and not re.fullmatch(r"auto|[^:/]+:\d+", run.address):
        raise ConfigError(
            f"address = {run.address!r} is none: on a machine of the cluster, name its head like "
            "10.0.0.1:6379, or auto"
        )
    asked = replace(asked, run=run)
    trials = expand(asked)
    folder = SweepFolder(resolve_path(str(output)) if output else default_folder(asked, trials))
    if dry_run:
        _list(folder, trials, as_json)
        return 0
    if not run.address:
        for device in {trial.config.device for trial in trials}:
            usable_device(device)
    resolved = folder.path / RESOLVED
    with folder.locked() as scratch:
        if not (resolved.exists() and resolved.samefile(file)):
            resolved.write_text(toml_sweep(asked), encoding="utf-8")
        return _sweep(asked, trials, folder, scratch, retry_failed, as_json, prepare, engine)


def default_folder(asked: Sweep, trials: Sequence[Trial]) -> Path:
    """Return the folder of a sweep, which its trials decide."""
    root = platformdirs.user_data_path("d2ft-fl", appauthor=False) / "sweeps"
    return root / f"{asked.name}-{sweep_hash(asked, trials)}"


def _list(folder: SweepFolder, trials: Sequence[Trial], as_json: bool) -> None:
    rows = []
    for trial in trials:
        state = State("refused", trial.refused) if trial.refused else folder.state(trial.id)
        rows.append({"trial": trial.id, "settings": dict(trial.settings), **asdict(state)})
    if as_json:
        typer.echo(write_json({"folder": str(folder.path), "trials": rows}))
    else:
        show.trial_list(rows)
        terminal.say(f"sweep folder: {folder.path}")


def _sweep(
    asked: Sweep,
    trials: list[Trial],
    folder: SweepFolder,
    scratch: Path,
    retry_failed: bool,
    as_json: bool,
    prepare: Callable[[RunConfig, bool], None],
    engine: Engine | None,
) -> int:
    ledger = Ledger(folder, trials)
    todo = ledger.open(retry_failed)
    if not as_json:
        terminal.say(f"sweep folder: {folder.path}")
        terminal.say(f"{len(trials)} trials, {len(todo)} to run")
    if todo:
        for config in {trial.config.coupling: trial.config for trial in todo}.values():
            prepare(config, as_json)
        metrics = sweep_metrics(trials)
        with show.Show(len(todo), len(trials) - len(todo), metrics, as_json) as ledger.watcher:
            try:
                (engine or TuneEngine(asked.run))(todo, ledger, scratch)
            except KeyboardInterrupt:
                if not as_json:
                    done = len(trials) - ledger.count("waiting", "running")
                    terminal.say(f"{done} of {len(trials)} trials done; the same command goes on")
                raise
            finally:
                ledger.close()
    return _conclude(asked, trials, folder, ledger, as_json)


def _conclude(
    asked: Sweep, trials: list[Trial], folder: SweepFolder, ledger: Ledger, as_json: bool
) -> int:
    rows = trial_rows(folder, trials, ledger.states)
    write_tables(folder.path, rows)
    metrics = sweep_metrics(trials)
    settings = by_setting(rows, varied(asked), metrics)
    if as_json:
        entries = [setting.to_json(metrics) for setting in settings]
        typer.echo(write_json({"folder": str(folder.path), "trials": rows, "settings": entries}))
        _page(folder.path)
    else:
        show.settings_table(settings, metrics)
        show.ends(ledger)
        terminal.say(_page(folder.path))
        terminal.say(f"sweep folder: {folder.path}")
    if ledger.count("failed"):
        return FAILED
    return 0 if ledger.count("finished", "stopped") else NOTHING_RAN


def _page(folder: Path) -> str:
    """Write the sweep's page; returns the line to say of it."""
    from d2ft_fl.report.pages import sweep_page

    try:
        return f"report: {sweep_page(folder)}"
    except Exception as error:  # the results are safe; most often no trial has a finished round
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        return f"no report: {kind}{error}"
