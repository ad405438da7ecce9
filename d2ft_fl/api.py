"""The public API: what ``import d2ft_fl`` offers to strategies, tunings and scripts.

    import d2ft_fl

    config = d2ft_fl.RunConfig(strategy="d2ft", rounds=3, clients=5, train_examples=400)
    print(d2ft_fl.plan(config).rounds[0].coverage)
    summary = d2ft_fl.run(config)
    print(d2ft_fl.load_run(summary["folder"]).rounds)

Its groups are runs (:func:`run`, :func:`plan`, :func:`load_run` and what they take and return),
what a strategy decides with (``Round`` first of all), what a tuning is made of, and errors.
Everything else in ``d2ft_fl`` is internal and free to move.

Names are imported when they are first used: a client's process does not load the planner's compiled
solver because its tuning imports ``TrainingOptions``.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2ft_fl.aggregation.aggregator import Aggregator
    from d2ft_fl.aggregation.lora_sums import frozen as frozen_factors
    from d2ft_fl.aggregation.lora_sums import unchanging as unchanging_factors
    from d2ft_fl.budgets.budget import DEADLINE, LIMITS, UNLIMITED, Budget, ClientDescription
    from d2ft_fl.budgets.sources import BudgetSource
    from d2ft_fl.config.choices import MIXED_RANK_AGGREGATIONS, PLAIN_BITS
    from d2ft_fl.config.run_config import RunConfig, resolve_path
    from d2ft_fl.config.training_options import DEFAULT_POLICY, ExecutionPolicy, TrainingOptions
    from d2ft_fl.costs.probe_costs import NO_PROBES, Probes
    from d2ft_fl.costs.resources import RESOURCES, Cost
    from d2ft_fl.errors import (
        ConfigError,
        D2FTError,
        Refusal,
        ReplyError,
        RunError,
        UnkeptBudget,
    )
    from d2ft_fl.lora.config import Lora, targets_alone, with_lora, without_lora
    from d2ft_fl.lora.config import targeted as targeted_weights
    from d2ft_fl.lora.init import begin as begin_factors
    from d2ft_fl.lora.init import from_update as factors_of_update
    from d2ft_fl.lora.peft_import import read_adapter
    from d2ft_fl.models.export import base_model
    from d2ft_fl.models.export import save_tuned as save_lora
    from d2ft_fl.planning.assignment import Assignment, Participant
    from d2ft_fl.preview.plan_preview import ClientPreview, Preview, RoundPreview
    from d2ft_fl.report.run_folder import RunFolder
    from d2ft_fl.rounds.components import Components
    from d2ft_fl.rounds.context import Round, most, plan_round
    from d2ft_fl.rounds.federation import Federation, Report, State
    from d2ft_fl.rounds.policy_search import Search as PolicySearch
    from d2ft_fl.rounds.strategies import Strategy
    from d2ft_fl.rounds.tuning import Tuning
    from d2ft_fl.subnets.architecture import Architecture, Kind
    from d2ft_fl.subnets.schedule import Operation, Schedule, effective
    from d2ft_fl.tasks.task import BaseTask, Batch, Outputs, Task

__all__ = [
    "DEADLINE",
    "DEFAULT_POLICY",
    "LIMITS",
    "MIXED_RANK_AGGREGATIONS",
    "NO_PROBES",
    "PLAIN_BITS",
    "RESOURCES",
    "UNLIMITED",
    "Aggregator",
    "Architecture",
    "Assignment",
    "BaseTask",
    "Batch",
    "Budget",
    "BudgetSource",
    "ClientDescription",
    "ClientPreview",
    "Components",
    "ConfigError",
    "Cost",
    "D2FTError",
    "ExecutionPolicy",
    "Federation",
    "Kind",
    "Lora",
    "Operation",
    "Outputs",
    "Participant",
    "PolicySearch",
    "Preview",
    "Probes",
    "Refusal",
    "ReplyError",
    "Report",
    "Round",
    "RoundPreview",
    "RunConfig",
    "RunError",
    "RunFolder",
    "Schedule",
    "State",
    "Strategy",
    "Task",
    "TrainingOptions",
    "Tuning",
    "UnkeptBudget",
    "base_model",
    "begin_factors",
    "effective",
    "factors_of_update",
    "frozen_factors",
    "load_run",
    "most",
    "plan",
    "plan_round",
    "read_adapter",
    "resolve_path",
    "run",
    "save_lora",
    "targeted_weights",
    "targets_alone",
    "unchanging_factors",
    "with_lora",
    "without_lora",
]

# Where names live; ``name=other`` where the module calls it otherwise. Type checkers read the
# imports above, a test holds the two equal.
_MODULES = {
    "aggregation.aggregator": "Aggregator",
    "aggregation.lora_sums": "frozen_factors=frozen unchanging_factors=unchanging",
    "budgets.budget": "DEADLINE LIMITS UNLIMITED Budget ClientDescription",
    "budgets.sources": "BudgetSource",
    "config.choices": "MIXED_RANK_AGGREGATIONS PLAIN_BITS",
    "config.run_config": "RunConfig resolve_path",
    "config.training_options": "DEFAULT_POLICY ExecutionPolicy TrainingOptions",
    "costs.probe_costs": "NO_PROBES Probes",
    "costs.resources": "RESOURCES Cost",
    "errors": "ConfigError D2FTError Refusal ReplyError RunError UnkeptBudget",
    "lora.config": "Lora targets_alone with_lora without_lora targeted_weights=targeted",
    "lora.init": "begin_factors=begin factors_of_update=from_update",
    "lora.peft_import": "read_adapter",
    "models.export": "base_model save_lora=save_tuned",
    "planning.assignment": "Assignment Participant",
    "preview.plan_preview": "ClientPreview Preview RoundPreview",
    "report.run_folder": "RunFolder",
    "rounds.components": "Components",
    "rounds.context": "Round most plan_round",
    "rounds.federation": "Federation Report State",
    "rounds.policy_search": "PolicySearch=Search",
    "rounds.strategies": "Strategy",
    "rounds.tuning": "Tuning",
    "subnets.architecture": "Architecture Kind",
    "subnets.schedule": "Operation Schedule effective",
    "tasks.task": "BaseTask Batch Outputs Task",
}
_HOMES = {
    entry.split("=")[0]: (f"d2ft_fl.{module}", entry.split("=")[-1])
    for module, entries in _MODULES.items()
    for entry in entries.split()
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'd2ft_fl' has no attribute {name!r}")
        module, attribute = _HOMES[name]
        globals()[name] = found = getattr(importlib.import_module(module), attribute)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def run(
    config: "RunConfig",
    workers: int = 0,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
    report: bool = True,
) -> dict[str, Any]:
    """Run a federation on this machine, without Flower.

    Args:
        config: The options of the run; they are checked before it starts.
        workers: Worker processes that train clients; 0 trains them in this process.
        progress: Called after each round with its line of ``rounds.jsonl``.
        report: Whether to write the page ``report.html`` at the end.

    Returns:
        The summary of the run, ``summary.json``; ``summary["folder"]`` is its folder.

    Raises:
        ConfigError: When an option cannot be used as it stands; the message says what to write.
        RunError: When the run cannot go on.
    """
    from d2ft_fl.rounds.checks import checked
    from d2ft_fl.runtime.in_process import run_local

    return run_local(checked(config), progress, report, workers)


def plan(
    config: "RunConfig",
    examples: int | None = None,
    rounds: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> "Preview":
    """Plan the first rounds of a run without training, as if every client answered.

    Args:
        config: The options of the run; all that planning needs is checked.
        examples: Training examples of every client; None divides the configured data.
        rounds: How many rounds to plan.
        progress: Called with the number of rounds planned, 0 once everything is loaded.

    Returns:
        Of every round and client: what it would do, its predicted cost and the binding budget.

    Raises:
        ConfigError: When an option cannot be used as it stands; the message says what to write.
        RunError: When the strategy fails.
    """
    from d2ft_fl.budgets.process_memory import kept_worker_memory
    from d2ft_fl.preview.plan_preview import preview
    from d2ft_fl.rounds.checks import checked_options

    memory = kept_worker_memory()
    return preview(checked_options(config), examples, rounds, progress, memory)


def load_run(folder: Path | str) -> "RunFolder":
    """Read the folder of a run, also of one that is still going on.

    Args:
        folder: The run folder, ``summary["folder"]`` of :func:`run`.

    Returns:
        Its configuration and status, and its rounds and clients as pandas frames.

    Raises:
        ConfigError: When the folder is no run's, has no finished round, or is damaged.
    """
    from d2ft_fl.report.run_folder import RunFolder

    return RunFolder.read(Path(folder))
