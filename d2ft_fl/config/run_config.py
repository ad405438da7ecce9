"""The configuration of a run: one typed record, checked before anything starts.

Each field is one key of ``[tool.flwr.app.config]`` in ``pyproject.toml``, with ``-`` for ``_``;
the defaults there and here are the same, which a test holds.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.aggregation.server_optimizer import ServerOptimizer
from d2ft_fl.budgets.sources import BudgetSource, budget_source
from d2ft_fl.config.training_options import SCHEDULES, LocalOptions
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora
from d2ft_fl.lora.peft_io import read_adapter
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.planning import importance
from d2ft_fl.records.trackers import Factory, load_trackers
from d2ft_fl.rounds.checks import check, check_options
from d2ft_fl.rounds.strategies import load_strategy, method_of
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.util.plugins import load_module
from d2ft_fl.util.torch_device import usable_device

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

    # -- checking ----------------------------------------------------------------------------

    def check(self) -> "RunConfig":
        """This configuration, once everything it names is known to exist and to fit together.

        Raises:
            ConfigError: In one line, what to write instead.
        """
        check(self)
        return self

    def adapter(self, arch: Architecture) -> dict[str, Tensor]:
        """The factors that a run begins with, and the adapter's classifier where it fits.

        Args:
            arch: Of the model, without factors.

        Raises:
            ConfigError: When there are none, or they are others than the run's.
        """
        lora = self.lora()
        found, tensors = read_adapter(resolve_path(self.lora_adapter), arch)
        if replace(found, dropout=lora.dropout, targets=()) != replace(lora, targets=()) or set(
            found.targets
        ) != set(lora.targets):
            raise ConfigError(
                f"lora-adapter = {self.lora_adapter!r} has other factors than the run: set "
                f"lora-rank={found.rank} lora-alpha={found.alpha} "
                f"lora-rslora={str(found.rslora).lower()} lora-targets={', '.join(found.targets)!r}"
            )
        return tensors

    def check_options(self) -> "RunConfig":
        """This configuration, once all but its model, data and machine is known to fit together.

        Raises:
            ConfigError: In one line, what to write instead.
        """
        check_options(self)
        return self

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

    def measured_scores(self) -> tuple[str, ...]:
        """The kinds that scoring passes measure; none where the strategy looks at none."""
        wanted = method_of(self.load_strategy(), self.strategy).scores
        if wanted is None:
            wanted = (self.backward_score, self.forward_score)
        return tuple(k for k in importance.MEASURED if k in wanted)

    # -- what the keys stand for -------------------------------------------------------------

    def load_strategy(self) -> Any:
        """The strategy's module."""
        return load_strategy(self.strategy)

    def load_tuning(self) -> Any:
        """The module of the way of tuning; see :mod:`clients`."""
        module = load_module("clients", self.tuning, "tuning", TUNINGS)
        if not callable(getattr(module, "learning_rate", None)):
            raise ConfigError(
                f"tuning = {self.tuning!r} has no function learning_rate(kind, factor, options)"
            )
        return module

    def load_trackers(self) -> dict[str, Factory]:
        """What starts the trackers, by their names."""
        return load_trackers(self.trackers)

    def lora(self) -> Lora:
        """What LoRA tunes, and how."""
        targets = tuple(t.strip() for t in self.lora_targets.split(",") if t.strip())
        return Lora(self.lora_rank, self.lora_alpha, targets, self.lora_rslora, self.lora_dropout)

    def depends_on_rounds(self) -> bool:
        """Whether what a round does depends on how many there are to be."""
        staged = method_of(self.load_strategy(), self.strategy).staged and not self.stage_rounds
        return staged or self.epsilon > 0 or self.lr_schedule != "constant"

    def privacy(self) -> Privacy | None:
        """What clients are promised of their data; None for nothing."""
        return Privacy.of(self)

    def budget_source(self) -> BudgetSource:
        """Where clients get their budgets."""
        return budget_source(self.budgets, resolve_path, self.device, self.threads_per_client)

    def model_spec(self) -> ModelSpec:
        """The model to build."""
        from d2ft_fl.data.federated_data import class_count

        pretrained = self.pretrained
        if pretrained not in BUILTIN["pretrained"]:
            pretrained = str(resolve_path(pretrained))
        return ModelSpec(
            name=self.model,
            arguments=_inline_table("model-args", self.model_args),
            pretrained=pretrained,
            image_size=self.image_size,
            classes=class_count(self._dataset(), self.label_column),
            seed=self.seed,
        )

    def data_spec(self, image_size: int, channels: int) -> DataSpec:
        """The data to open, for images of that size."""
        return DataSpec(
            dataset=self._dataset(),
            label_column=self.label_column,
            image_size=image_size,
            channels=channels,
            clients=self.clients,
            partitioner=self.partitioner,
            partitioner_arguments=_inline_table("partitioner-args", self.partitioner_args),
            train_examples=self.train_examples,
            test_examples=self.test_examples,
            seed=self.seed,
        )

    def _dataset(self) -> str:
        if self.dataset in BUILTIN["dataset"] or self.dataset.startswith(HUB):
            return self.dataset
        return str(resolve_path(self.dataset))

    def local_options(self) -> LocalOptions:
        """How clients train."""
        return LocalOptions(
            batch_size=self.batch_size,
            epochs=self.epochs,
            optimizer=self.optimizer,
            lr=self.lr,
            head_lr=self.head_lr,
            lora_lr=self.lora_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            precision=self.precision,
            checkpointing=self.checkpointing,
            accumulate=self.accumulate,
            proximal=self.proximal,
            logit_adjustment=self.logit_adjustment,
        )

    def rate_factor(self, round: int) -> float:
        """What learning rates are multiplied by in a round, counted from 1."""
        return SCHEDULES[self.lr_schedule]((round - 1) / self.rounds)

    def examples_of(self, local: int) -> int:
        """Of so many examples of a client, on how many it trains in a round."""
        return max(1, round(self.data_share * local)) if local else 0

    @property
    def takes_steps(self) -> bool:
        """Whether a client's change may count for more than it is: where nothing bounds it."""
        bounded = self.aggregation != "mean" or self.clip_norm > 0
        return not bounded and self.tuning != "lora"

    def make_server_optimizer(self) -> ServerOptimizer | None:
        """The server's optimiser; None where means are taken as they are."""
        if self.server_optimizer == "mean":
            return None
        return ServerOptimizer(
            self.server_optimizer,
            self.server_lr,
            self.server_momentum,
            self.server_second_momentum,
            self.server_tau,
        )

    def torch_device(self) -> torch.device:
        """Where clients train and the global model is evaluated.

        Raises:
            ConfigError: When this machine has no such device.
        """
        return usable_device(self.device)


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


def _inline_table(key: str, text: str) -> tuple[tuple[str, Any], ...]:
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
