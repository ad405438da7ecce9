"""The configuration of a run: one typed record that is plain data.

Its fields are the options of :mod:`d2ft_fl.config.groups`; each is one key of
``[tool.flwr.app.config]`` in ``pyproject.toml``, with ``-`` for ``_``.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2ft_fl.config.choices import LR_SCHEDULES
from d2ft_fl.config.groups.learning import (
    DataOptions,
    FederationOptions,
    LocalTrainingOptions,
    ModelOptions,
    TuningOptions,
)
from d2ft_fl.config.groups.planning import BudgetOptions, PlanningOptions, ScoreOptions
from d2ft_fl.config.groups.running import FailureOptions, RecordOptions, RunningOptions
from d2ft_fl.config.groups.server import (
    AggregationOptions,
    HostileOptions,
    PrivacyOptions,
    QuantizationOptions,
    ServerOptimizerOptions,
)
from d2ft_fl.config.option import Option, options_of
from d2ft_fl.config.renamed import renamed
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import nearest


@dataclass(frozen=True)
class RunConfig(  # a dataclass has the fields of its last base first
    RecordOptions,
    FailureOptions,
    RunningOptions,
    ScoreOptions,
    PlanningOptions,
    BudgetOptions,
    ServerOptimizerOptions,
    QuantizationOptions,
    HostileOptions,
    PrivacyOptions,
    AggregationOptions,
    LocalTrainingOptions,
    TuningOptions,
    ModelOptions,
    DataOptions,
    FederationOptions,
):
    """All options of a run, which together with code and data decide its result."""

    # -- reading -----------------------------------------------------------------------------

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any]) -> "RunConfig":
        """Return a configuration from keys as they stand in TOML; old names are accepted.

        Raises:
            ConfigError: For an unknown key (with the nearest known one) or a wrong type.
        """
        values: dict[str, Any] = {}
        for key, value in renamed(entries).items():
            if key not in OPTIONS:
                raise ConfigError(f"unknown option {key!r}; {nearest(key, OPTIONS)}")
            values[OPTIONS[key].field.name] = _typed(key, value, OPTIONS[key].kind)
        if "batch_size" in values:  # what somebody asked for stays, unless they say otherwise
            values.setdefault("policy_batch", False)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return all options by their keys as they stand in TOML."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}

    def check_values(self) -> "RunConfig":
        """Return this configuration, once each value is known to be in its range or a choice.

        Raises:
            ConfigError: For the first value that is not.
        """
        for one in OPTIONS.values():
            one.check(getattr(self, one.field.name))
        return self

    # -- what follows from options -----------------------------------------------------------

    def suspects(self, clients: int) -> int:
        """Return how many of ``clients`` may be hostile for robust aggregation: one at least."""
        return max(1, round(self.trim_share * clients))

    def hostile(self, client: int) -> bool:
        """Return whether a client is one of those that attack, for experiments."""
        count = round(self.hostile_share * self.clients)
        if not count:
            return False
        import numpy as np  # the other options do without, and so do the commands that list them

        order = np.random.default_rng([self.seed, 4]).permutation(self.clients)
        return client in order[:count]

    def flips_labels(self, client: int) -> bool:
        """Return whether a client trains on wrong labels, for experiments."""
        return self.hostile_attack == "label-flip" and self.hostile(client)

    @property
    def bounds_changes(self) -> bool:
        """Whether a client's change is bounded, so that none may be multiplied by a step."""
        return self.aggregation != "mean" or self.clip_norm > 0

    @property
    def learning_rates(self) -> str:
        """The learning rates of clients as options, to end a message with."""
        factors = f"lora-lr = {self.lora_lr:g}, " if self.tuning == "lora" else ""
        return f"lr = {self.lr:g}, {factors}head-lr = {self.head_lr:g}"

    def offered_ranks(self) -> tuple[int, ...]:
        """Return the ranks that subnets may train at besides ``lora-rank``."""
        return tuple(int(text) for text in self.lora_ranks.split(",") if text.strip())

    def class_list(self) -> tuple[str, ...]:
        """Return the names of classes that the option lists; none where the data set decides.

        Raises:
            ConfigError: When it is no list, or names a class twice.
        """
        names = name_list("classes", self.classes)
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"classes names {twice[0]!r} twice; name each class once")
        return names

    def rate_factor(self, round_number: int) -> float:
        """Return what learning rates are multiplied by in a round, counted from 1."""
        return LR_SCHEDULES[self.lr_schedule]((round_number - 1) / self.rounds)

    def examples_of(self, local: int) -> int:
        """Return on how many of its ``local`` examples a client trains in a round."""
        return max(1, round(self.data_share * local)) if local else 0


OPTIONS: dict[str, Option] = options_of(RunConfig)
# Options that name a file or folder, with their values that are no path.
NO_PATHS = {key: one.no_path for key, one in OPTIONS.items() if one.no_path is not None}


def resolve_path(path: str) -> Path:
    """Return a path as an absolute one. Relative paths start where the command did.

    A Flower app runs elsewhere than it was started; ``d2ft run`` makes paths absolute before.
    """
    return Path(os.path.expanduser(path)).absolute()


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return ``value`` as the type that ``key`` has; an int passes for a float, and for text."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and type(value) is int:  # `--set lora-ranks=4`
        return str(value)
    if type(value) is not kind:
        name = type(value).__name__
        article = "an" if name[0] in "aeiou" else "a"
        raise ConfigError(f"{key} = {value!r} is {article} {name}; write a {_EXAMPLES[kind]}")
    return value


_EXAMPLES = {
    int: "whole number, like 10",
    float: "number, like 0.5",
    str: 'string, like "text"',
    bool: "truth value: true or false",
}


def name_list(key: str, text: str) -> tuple[str, ...]:
    """Read ``a, b`` or ``["a", "b"]`` as names.

    Args:
        key: The option that the text belongs to.
        text: What the option is set to.

    Raises:
        ConfigError: When the text begins with a bracket and is no array of texts.
    """
    if not text.strip().startswith("["):
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        names = tomllib.loads(f"names = {text}")["names"]
    except tomllib.TOMLDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{key} = {text!r} cannot be read; write "cat, dog" or ["cat", "dog"]')
    return tuple(names)


def inline_table(key: str, text: str) -> tuple[tuple[str, Any], ...]:
    """Read ``a = 1, b = "x"`` as pairs, sorted by name, lists as tuples.

    Args:
        key: The option that the text belongs to.
        text: What the option is set to.

    Raises:
        ConfigError: When the text is no such pairs.
    """
    try:
        table = tomllib.loads(f"table = {{ {text} }}")["table"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f'{key} = {text!r} cannot be read; write pairs like "alpha = 0.5, shuffle = true"'
        ) from None
    return tuple(
        (name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(table.items())
    )
