"""The trials of a sweep, each with an id that its configuration alone decides."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from d2ft_fl.config.renamed import first_names
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, UnkeptBudget
from d2ft_fl.rounds.checks import checked_options
from d2ft_fl.rounds.components import Components
from d2ft_fl.sweep.contents import contents
from d2ft_fl.sweep.draws import uniform
from d2ft_fl.sweep.spec import Group, Sweep, place_name
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.util.strict_json import write_json

ID_DIGITS = 10


@dataclass(frozen=True)
class Trial:
    """One federation of a sweep.

    Attributes:
        config: Its configuration; the run folder is left open.
        settings: The options that vary over the sweep, and what they are here.
        refused: Why it cannot run; empty when nothing is known against it.
    """

    config: RunConfig
    settings: Mapping[str, Any] = field(compare=False)
    refused: str = field(default="", compare=False)

    @cached_property
    def id(self) -> str:
        """The name of its folder: strategy, seed, and a hash of the whole configuration.

        The content of files and plug-ins that it names is part of that.
        """
        strategy = re.sub(r"[^A-Za-z0-9_.-]", "_", self.config.strategy)[-40:]
        named = contents(self.config)
        options = first_names(self.config.to_mapping())  # a renaming leaves the folder's name
        whole = options | ({"contents": named} if named else {})
        return f"{strategy}-seed{self.config.seed}-{_hash(whole)}"


def _hash(value: Any) -> str:
    text = write_json(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def sweep_hash(sweep: Sweep, trials: Iterable[Trial]) -> str:
    """Hash what tells one sweep from another: its trials in any order, and early stopping."""
    return _hash([sorted(trial.id for trial in trials), repr(sweep.run.asha)])


def sweep_metrics(trials: Sequence[Trial]) -> MetricSpec:
    """Return what the trials of a sweep are compared by: the metrics of their task."""
    return MetricSpec.of(Components(trials[0].config).task)


def varied(sweep: Sweep) -> list[str]:
    """Return the options that vary over a sweep, in the order of its file; the seed is last."""
    keys = dict.fromkeys(key for group in sweep.groups for key in group.varied())
    return sorted(keys, key="seed".__eq__)


def expand(sweep: Sweep) -> list[Trial]:
    """Return the trials of a sweep, each once: all settings with the first seed, then the next.

    Raises:
        ConfigError: When a value is one that no trial can run with, with its line; when no trial
            lasts long enough to be stopped early.
    """
    keys = varied(sweep)
    trials: dict[Trial, None] = {}
    errors: dict[RunConfig, ConfigError | None] = {}

    def error(config: RunConfig) -> ConfigError | None:
        if config not in errors:
            errors[config] = _error(config)
        return errors[config]

    for group in sweep.groups:
        configs = [RunConfig.from_mapping(options) for options in combinations(sweep.base, group)]
        _check_values(sweep, group, configs, error)
        for config in configs:
            options = config.to_mapping()
            settings = {key: options[key] for key in keys}
            trials.setdefault(Trial(config, settings, str(error(config) or "")))
    _check_asha(sweep, [trial.config.rounds for trial in trials])
    return list(trials)


def combinations(base: Mapping[str, Any], group: Group) -> list[dict[str, Any]]:
    """Return the options of a group's trials: seeds, times draws, times the grid."""
    out = []
    seeds = [{"seed": seed} for seed in group.seeds] or [{}]
    for seed, sample in product(seeds, range(max(1, group.samples))):
        draws = {
            key: draw.draw(uniform(group.draw_seed, key, sample))
            for key, draw in group.search.items()
        }
        for values in product(*group.grid.values()):
            chosen = dict(zip(group.grid, values, strict=True))
            out.append({**base, **group.base, **draws, **chosen, **seed})
    return out


def _error(config: RunConfig) -> ConfigError | None:
    """Say why a configuration cannot run, as far as its options tell; None where they do not."""
    try:
        checked_options(config)
    except ConfigError as error:
        return error
    return None


def _check_values(
    sweep: Sweep,
    group: Group,
    configs: list[RunConfig],
    error: Callable[[RunConfig], ConfigError | None],
) -> None:
    """Check that each value can run in one of the group's combinations.

    That a strategy cannot keep a budget is no mistake of the file but a result of the sweep.

    Raises:
        ConfigError: For a value that none of them takes.
    """

    def mistake(config: RunConfig) -> str:
        reason = error(config)
        return "" if reason is None or isinstance(reason, UnkeptBudget) else str(reason)

    if all(mistake(config) for config in configs):
        raise ConfigError(_blamed(sweep, group, mistake(configs[0])))
    tried = [(("grid", key), key, values) for key, values in group.grid.items()]
    tried += [(("search", key), key, draw.tried) for key, draw in group.search.items()]
    for place, key, values in [*tried, (("seeds",), "seed", group.seeds)]:
        for value in values:
            changed = [replace(c, **{key.replace("-", "_"): value}) for c in configs]
            if all(mistake(config) for config in changed):
                where = place_name(sweep.at, (*group.place, *place))
                raise ConfigError(f"{where}: no trial runs with {value!r}: {mistake(changed[0])}")


def _blamed(sweep: Sweep, group: Group, reason: str) -> str:
    """Return a reason with the place of the option that it names first."""
    where = dict(sweep.given)
    for table, keys in (("base", group.base), ("grid", group.grid), ("search", group.search)):
        where |= {key: place_name(sweep.at, (*group.place, table, key)) for key in keys}
    if group.seeds:
        where["seed"] = place_name(sweep.at, (*group.place, "seeds"))
    named = {key: re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", reason) for key in where}
    matches = sorted((match.start(), key) for key, match in named.items() if match)
    return f"{where[matches[0][1]] if matches else sweep.at.name}: {reason}"


def _check_asha(sweep: Sweep, rounds: list[int]) -> None:
    """Check that a trial can be stopped early.

    Raises:
        ConfigError: When all trials have too few rounds.
    """
    if sweep.run.asha is not None and max(rounds) <= (grace := sweep.run.asha.grace_rounds):
        raise ConfigError(
            f"{place_name(sweep.at, ('run', 'asha'))}: grace-rounds = {grace} leaves nothing to "
            f"stop, as no trial has more than {max(rounds)} rounds; lower it, or leave asha out"
        )
