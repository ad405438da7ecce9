"""Runs trials with Ray Tune, on this machine or on a Ray cluster.

Tune decides which trial runs when, starts one worker process for each that runs at once and uses it
for further trials (imports, compiled code and data stay warm there), and stops trials early. It
keeps nothing: the sweep's folder does, and is what a sweep goes on from.
"""

import importlib
import logging
import math
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch

from d2ft_fl.errors import RunError, first_line
from d2ft_fl.records.metrics import primary_of
from d2ft_fl.sweep.ledger import Ledger
from d2ft_fl.sweep.remote import CHANGES, METRIC, OUTCOME, ROUND, Outcome, trainable
from d2ft_fl.sweep.spec import Asha, RunOptions
from d2ft_fl.sweep.trials import Trial, sweep_metrics

CONNECT_SECONDS = 10.0
OBJECT_STORE_BYTES = 512 * 2**20  # reports pass through it; models, where they are kept
# A trial makes its folder where Tune puts it.
# Every trial has a thread, and glibc has threads keep to arenas of their own: with as many as it
# likes a worker holds 5 GB more after twenty trials of ViT-Tiny.
IN_WORKER = {"RAY_CHDIR_TO_TRIAL_DIR": "1", "MALLOC_ARENA_MAX": "2"}
# Ray and Tune otherwise print, count their users, log every report in three formats, save their
# state every few seconds, and take Ctrl-C for themselves.
ENVIRONMENT = IN_WORKER | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}
REFUSED_BY_TUNE = ("TUNE_RESULT_DIR", "RAY_AIR_LOCAL_CACHE_DIR")  # raises when they are set


class Engine(Protocol):
    """Whatever runs trials."""

    def __call__(self, todo: Sequence[Trial], ledger: Ledger, scratch: Path) -> None:
        """Run trials, and tell the ledger.

        Args:
            todo: The trials.
            ledger: Is told when each starts, goes on, and ends.
            scratch: A folder to use.
        """


@dataclass(frozen=True)
class TuneEngine:
    """Ray Tune."""

    options: RunOptions

    def __call__(self, todo: Sequence[Trial], ledger: Ledger, scratch: Path) -> None:
        """Run trials, and tell the ledger.

        Raises:
            RunError: When Ray cannot be started or reached, or has no room for a trial.
        """
        os.environ.update(ENVIRONMENT)
        for name in REFUSED_BY_TUNE:
            os.environ.pop(name, None)
        threads = max(trial.config.threads_per_client for trial in todo)
        at_once = self.options.at_once
        if not self.options.address:
            most = max(1, cores() // threads)
            if any(trial.config.device == "cuda" for trial in todo):
                most = max(1, min(most, torch.cuda.device_count()))  # a GPU each, unless asked
            at_once = min(at_once or most, len(todo))
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once)
        shipped = _shipped(todo, scratch) if self.options.address else []
        with _ray(self.options.address, at_once * threads, scratch, shipped):
            self._run(todo, ledger, scratch, at_once)

    def _run(self, todo: Sequence[Trial], ledger: Ledger, scratch: Path, at_once: int) -> None:
        from ray import tune

        there = {"start": os.getcwd(), "path": sys.path, "models": self.options.keep_models}
        needs = _needs(todo, at_once)
        given = [
            {"id": trial.id, "options": _changed(trial), "needs": need, **there}
            for trial, need in zip(todo, needs, strict=True)
        ]
        room = tune.with_resources(
            _in_worker, lambda config: tune.PlacementGroupFactory([config["trial"]["needs"]])
        )
        try:
            tune.run(
                room,
                name="tune",
                config={"trial": tune.grid_search(given)},
                storage_path=str(scratch),
                callbacks=[_watch(ledger)],
                scheduler=_scheduler(self.options.asha, ledger) if self.options.asha else None,
                max_concurrent_trials=at_once if self.options.address and at_once else None,
                reuse_actors=True,
                raise_on_failed_trial=False,
                trial_name_creator=_id,
                trial_dirname_creator=_id,
                verbose=0,
            )
        except tune.TuneError as error:
            raise RunError(f"Ray Tune broke off: {str(error).strip().splitlines()[-1]}") from error


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_worker(config: dict[str, Any]) -> None:
    trainable(config["trial"])


def _id(trial: Any) -> str:
    return str(trial.config["trial"]["id"])


def _changed(trial: Trial) -> dict[str, Any]:
    """Return the options of a trial that are not the default."""
    default = type(trial.config)().to_mapping()
    return {key: v for key, v in trial.config.to_mapping().items() if v != default[key]}


def _shipped(todo: Sequence[Trial], scratch: Path) -> list[ModuleType | str]:
    """Return what machines of a cluster get from here: this package and plug-ins.

    What is installed in ``site-packages`` is left out: it is expected on every machine.
    """
    names: set[str] = set()
    for trial in todo:
        config = trial.config
        names |= {name.split(".")[0] for name in (config.strategy, config.tuning) if "." in name}
        if ":" in config.budgets:
            names.add(config.budgets.split(":")[0].split(".")[0])
    modules = [importlib.import_module(name) for name in sorted(names)]
    shipped: list[ModuleType | str] = [m for m in modules if not _is_installed(_folder_of(m))]
    package = Path(__file__).resolve().parents[1]
    return shipped if _is_installed(package) else [*shipped, str(_as_in_a_wheel(package, scratch))]


def _as_in_a_wheel(package: Path, scratch: Path) -> Path:
    """Copy a checkout's package with its strategies and clients inside, as a wheel has them.

    Ray puts every module into a folder of its own on the other machine, so that what stands beside
    the package here would not be found there.
    """
    copied, ignore = scratch / package.name, shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, copied, ignore=ignore)
    for inside in ("strategies", "clients"):
        shutil.copytree(package.parent / inside, copied / inside, ignore=ignore)
    return copied


def _folder_of(module: ModuleType) -> Path:
    return Path([*getattr(module, "__path__", []), module.__file__][0])


def _is_installed(folder: Path) -> bool:
    return "site-packages" in folder.parts


@contextmanager
def _ray(address: str, cpus: int, scratch: Path, modules: list[ModuleType | str]) -> Iterator[None]:
    """Start a Ray that ends with this process, or connect to a cluster and send it modules.

    Raises:
        RunError: When it cannot be started or reached.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    # Whatever log_to_driver says, Ray prints it on standard output when a worker dies.
    ray._private.worker._worker_logs_enabled = False
    handler = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    cluster: dict[str, Any] = {"runtime_env": {"py_modules": modules, "env_vars": IN_WORKER}}
    local: dict[str, Any] = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(scratch / "ray"),
    }
    try:
        if address and address != "auto":  # Ray itself tries for many minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **(cluster if address else local),
        )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"reach Ray at {address!r}" if address else "start Ray"
        reason = first_line(error)
        if "AF_UNIX" in reason:
            reason = f"{str(scratch.parent)!r} is too long for its sockets; set TMPDIR=/tmp"
        raise RunError(f"cannot {where}: {reason}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _needs(todo: Sequence[Trial], at_once: int) -> list[dict[str, float]]:
    """Return what Ray sets aside for each trial: a core for each thread, and a share of a GPU.

    All ask for as many cores, so that a worker serves whichever trial is next.

    Raises:
        RunError: When no machine has that much, so that a trial would wait forever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = max(node.get("CPU", 0.0) for node in nodes)
    threads = max(trial.config.threads_per_client for trial in todo)
    # No trial is on two GPUs: so many share one.
    gpus = sum(node.get("GPU", 0.0) for node in nodes if node.get("CPU", 0.0) >= threads)
    sharing = math.ceil(at_once / gpus) if gpus else 1
    share = math.floor(1000 / max(1, sharing)) / 1000
    if threads > cpus:
        raise RunError(
            f"threads-per-client = {threads} is more than the {cpus:g} cores that Ray has on its "
            "largest machine"
        )
    on_gpu = [trial.config.device == "cuda" for trial in todo]
    if any(on_gpu) and not gpus:
        raise RunError(
            f"device = 'cuda': Ray has no GPU on a machine with {threads} cores for a trial"
        )
    return [{"CPU": float(threads)} | ({"GPU": share} if on else {}) for on in on_gpu]


def _watch(ledger: Ledger) -> Any:
    """Make the callback by which Tune tells the ledger."""
    from ray import tune

    class Watch(tune.Callback):
        ended: set[str]

        def __init__(self) -> None:
            self.ended = set()

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
            ledger.started(_id(trial))

        def on_trial_result(
            self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            changes = result.pop(CHANGES)  # so that Tune does not keep it
            outcome = result.pop(OUTCOME, None)
            if outcome is not None:
                self.ended.add(_id(trial))
                ledger.ended(_id(trial), Outcome(**outcome), result.get(METRIC), changes)
            else:
                ledger.progressed(_id(trial), result[ROUND], result[METRIC], changes)

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
            if _id(trial) not in self.ended:  # the scheduler stopped it
                result = trial.last_result
                ledger.stopped(_id(trial), result[ROUND], result["time_total_s"])

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
            text = Path(trial.error_file).read_text() if trial.error_file else ""
            ledger.ended(_id(trial), Outcome("failed", _reason(text), text))

    return Watch()


def _reason(text: str) -> str:
    """Say in one line why a worker broke off, from what Ray says."""
    if "worker process has died" in text:
        return "its worker process died: out of memory, or a crash; error.txt has what Ray says"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"its worker broke off: {lines[-1] if lines else 'no reason known'}"


def _scheduler(asha: Asha, ledger: Ledger) -> Any:
    """Make Tune's ASHA, which knows the primary metric of trials that ended before."""
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(
        time_attr=ROUND,
        metric=METRIC,
        mode="max" if sweep_metrics(ledger.trials).maximise else "min",
        max_t=max(trial.config.rounds for trial in ledger.trials),
        grace_period=asha.grace_rounds,
        reduction_factor=asha.reduction_factor,
        stop_last_trials=False,
    )
    for trial in ledger.trials:
        if ledger.states[trial.id].status in ("finished", "stopped"):
            before: Any = SimpleNamespace(trial_id=trial.id)
            scheduler.on_trial_add(None, before)  # type: ignore[arg-type]
            for row in ledger.folder.rows(trial.id):
                known: dict[str, Any] = {ROUND: row["round"], METRIC: primary_of(row)}
                if known[METRIC] is not None:
                    scheduler.on_trial_result(None, before, known)  # type: ignore[arg-type]
    return scheduler
