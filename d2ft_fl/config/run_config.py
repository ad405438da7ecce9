"""The configuration of a run: one typed record, checked before anything starts.

Each field is one key of ``[tool.flwr.app.config]`` in ``pyproject.toml``, with ``-`` for ``_``;
the defaults there and here are the same, which a test holds.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.config.training_options import SCHEDULES
from d2ft_fl.errors import ConfigError

DIGITS = "digits"
MADE_UP = "made-up"
EMBEDDED = (DIGITS, MADE_UP)  # data sets that need no file
HUB = "hub:"

TUNINGS = ("full", "lora")
# Values of options with paths that are none.
BUILTIN = {
    "dataset": EMBEDDED,
    "pretrained": ("bundled", "hub", "none"),
    "run-folder": ("",),
    "resume": ("",),
    "lora-adapter": ("",),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. See ``pyproject.toml`` for what each key means."""

    strategy: str = "d2ft"
    rounds: int = 10
    clients: int = 10
    sample_clients: int = 0
    seed: int = 0

    dataset: str = "digits"
    label_column: str = "label"
    partitioner: str = "Dirichlet"
    partitioner_args: str = "alpha = 0.5"
    train_examples: int = 0
    test_examples: int = 0
    data_share: float = 1.0
    data_selection: str = "random"
    selection_temperature: float = 0.1

    model: str = "vit_glyphs"
    model_args: str = ""
    pretrained: str = "bundled"
    image_size: int = 0

    tuning: str = "full"
    lora_rank: int = 8
    lora_ranks: str = ""
    lora_rank_exponent: float = 0.5
    lora_alpha: float = 8.0
    lora_targets: str = "qkv, proj, fc1, fc2"
    lora_dropout: float = 0.0
    lora_rslora: bool = False
    lora_init: str = "lora"
    lora_aggregation: str = "factors"
    lora_error: bool = True
    lora_adapter: str = ""
    lora_lr: float = 2e-3
    slora_rounds: int = 0
    batch_size: int = 16
    epochs: int = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    head_lr: float = 2e-3
    lr_schedule: str = "constant"
    logit_adjustment: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    precision: str = "fp32"
    checkpointing: bool = False
    accumulate: int = 1
    proximal: float = 0.0
    compensation: bool = False
    aggregation: str = "mean"
    trim_share: float = 0.2
    neighbor_mixing: bool = True
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    epsilon: float = 0.0
    delta: float = 1e-5
    noise_seed: int = -1
    hostile_share: float = 0.0
    hostile_scale: float = -10.0
    upload_bits: int = 32
    download_bits: int = 32
    server_optimizer: str = "mean"
    server_lr: float = 1.0
    server_momentum: float = 0.9
    server_second_momentum: float = 0.99
    server_tau: float = 1e-3

    budgets: str = "devices"
    match: str = ""
    match_share: float = 0.0
    stage_rounds: int = 0
    planner: str = "joint"
    slots: int = 1
    backward_score: str = "fisher"
    forward_score: str = "fisher"
    forward_weight: float = 1.0
    frozen_weight: float = 0.0
    coupling: str = "none"
    spread_clients: float = 0.1
    least_clients: int = 1
    agenda_rounds: int = 4
    exploration: float = 1.0
    score_every: int = 5
    score_examples: int = 4
    score_momentum: float = 0.5

    device: str = "cpu"
    threads_per_client: int = 1
    eval_batch_size: int = 128
    eval_every: int = 1
    transport: str = "shared"
    round_timeout: float = 3600.0
    client_timeout: float = 0.0
    min_replies: int = 1
    few_replies: str = "stop"
    attempts: int = 3
    checkpoint_every: int = 1
    resume: str = ""
    verify_costs: bool = False
    trackers: str = ""
    run_folder: str = ""

    # -- reading -----------------------------------------------------------------------------

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any]) -> "RunConfig":
        """A configuration from keys as they stand in TOML.

        Raises:
            ConfigError: For an unknown key (with the nearest known one) or a wrong type.
        """
        types = {f.name.replace("_", "-"): f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in entries.items():
            if key not in types:
                raise ConfigError(f"unknown option {key!r}; {nearest(key, types)}")
            values[key.replace("-", "_")] = _typed(key, value, types[key])
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Keys as they stand in TOML."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}

    def suspects(self, clients: int) -> int:
        """How many of so many clients may be hostile, for robust folding: one at least."""
        return max(1, round(self.trim_share * clients))

    def hostile(self, client: int) -> bool:
        """Whether a client is one of those that attack, for experiments."""
        count = round(self.hostile_share * self.clients)
        if not count:
            return False
        order = np.random.default_rng([self.seed, 4]).permutation(self.clients)
        return client in order[:count]

    def offered_ranks(self) -> tuple[int, ...]:
        """Ranks that subnets may train at besides ``lora-rank``."""
        return tuple(int(text) for text in self.lora_ranks.split(",") if text.strip())

    def rate_factor(self, round_number: int) -> float:
        """What learning rates are multiplied by in a round, counted from 1."""
        return SCHEDULES[self.lr_schedule]((round_number - 1) / self.rounds)

    def examples_of(self, local: int) -> int:
        """Of so many examples of a client, on how many it trains in a round."""
        return max(1, round(self.data_share * local)) if local else 0

    @property
    def takes_steps(self) -> bool:
        """Whether a client's change may count for more than it is: where nothing bounds it."""
        bounded = self.aggregation != "mean" or self.clip_norm > 0
        return not bounded and self.tuning != "lora"


def resolve_path(path: str) -> Path:
    """An absolute path. Relative ones start where the command did.

    A Flower app runs elsewhere than it was started; ``d2ft run`` makes paths absolute before.
    """
    return Path(os.path.expanduser(path)).absolute()


def nearest(key: str, known: Iterable[str]) -> str:
    """What somebody who wrote ``key`` may have meant, as the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _typed(key: str, value: Any, kind: Any) -> Any:
    """``value`` as the type that key has; an int passes for a float, and for text."""
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


def inline_table(key: str, text: str) -> tuple[tuple[str, Any], ...]:
    """``a = 1, b = "x"`` as pairs, sorted by name, lists as tuples."""
    try:
        table = tomllib.loads(f"table = {{ {text} }}")["table"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f'{key} = {text!r} cannot be read; write pairs like "alpha = 0.5, shuffle = true"'
        ) from None
    return tuple(
        (name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(table.items())
    )
