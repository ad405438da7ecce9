"""What the options of a run stand for, resolved once: strategy, tuning, budgets, model, data.

A :class:`~d2ft_fl.config.run_config.RunConfig` is plain data. A run carries its ``Components``,
which turn the names in it into the code and specifications that they mean.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.aggregation.server_optimizer import ServerOptimizer
from d2ft_fl.budgets.sources import BudgetSource, budget_source
from d2ft_fl.config.choices import HUB
from d2ft_fl.config.run_config import NO_PATHS, RunConfig, inline_table, resolve_path
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.data.federated_data import class_count
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora
from d2ft_fl.lora.peft_import import read_adapter
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.planning import importance
from d2ft_fl.rounds.strategies import Method, load_strategy, method_of
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.task import Task
from d2ft_fl.trackers import Factory, load_trackers
from d2ft_fl.util.plugins import load_module
from d2ft_fl.util.torch_device import usable_device

TUNINGS = ("full", "lora")


@dataclass(frozen=True)
class Components:
    """Everything that a configuration names. Each attribute is resolved when first asked for.

    Every attribute raises :class:`~d2ft_fl.errors.ConfigError` where what is named does not exist.
    """

    config: RunConfig

    @cached_property
    def strategy(self) -> Any:
        """The strategy's module."""
        return load_strategy(self.config.strategy)

    @cached_property
    def method(self) -> Method:
        """What the strategy says of itself."""
        return method_of(self.strategy, self.config.strategy)

    @cached_property
    def tuning(self) -> Any:
        """The module of the way of tuning; see :mod:`clients`."""
        name = self.config.tuning
        module = load_module("clients", name, "tuning", TUNINGS)
        if not callable(getattr(module, "learning_rate", None)):
            raise ConfigError(
                f"tuning = {name!r} has no function learning_rate(kind, factor, options)"
            )
        return module

    @cached_property
    def task(self) -> Task:
        """What is learnt."""
        return ImageClassification(self.config.logit_adjustment)

    @cached_property
    def trackers(self) -> dict[str, Factory]:
        """What starts the trackers, by their names."""
        return load_trackers(self.config.trackers)

    @cached_property
    def lora(self) -> Lora:
        """What LoRA tunes, and how."""
        c = self.config
        targets = tuple(t.strip() for t in c.lora_targets.split(",") if t.strip())
        if not targets:
            raise ConfigError(
                "lora-targets is empty; name products of a block, such as qkv, proj, fc1, fc2"
            )
        return Lora(c.lora_rank, c.lora_alpha, targets, c.lora_rslora, c.lora_dropout)

    @cached_property
    def privacy(self) -> Privacy | None:
        """What clients are promised of their data; None for nothing."""
        return Privacy.of(self.config, self.measured_scores)

    @cached_property
    def budget_source(self) -> BudgetSource:
        """Where clients get their budgets."""
        c = self.config
        return budget_source(c.budgets, resolve_path, c.device, c.threads_per_client)

    @cached_property
    def training(self) -> TrainingOptions:
        """How clients train."""
        return TrainingOptions.of(self.config)

    @cached_property
    def server_optimizer(self) -> ServerOptimizer | None:
        """The server's optimiser; None where means are taken as they are."""
        c = self.config
        if c.server_optimizer == "mean":
            return None
        return ServerOptimizer(
            c.server_optimizer,
            c.server_lr,
            c.server_momentum,
            c.server_second_momentum,
            c.server_tau,
        )

    @cached_property
    def device(self) -> torch.device:
        """Where clients train and the global model is evaluated."""
        return usable_device(self.config.device)

    @cached_property
    def model_spec(self) -> ModelSpec:
        """The model to build."""
        c = self.config
        pretrained = c.pretrained
        if pretrained not in NO_PATHS["pretrained"]:
            pretrained = str(resolve_path(pretrained))
        return ModelSpec(
            name=c.model,
            arguments=inline_table("model-args", c.model_args),
            pretrained=pretrained,
            image_size=c.image_size,
            classes=class_count(self._dataset, c.label_column),
            seed=c.seed,
        )

    def data_spec(self, input_shape: tuple[int, ...]) -> DataSpec:
        """Return the data to open, for a model that takes examples of this shape.

        Args:
            input_shape: Channels, height and width of images.
        """
        c = self.config
        channels, side, _ = input_shape
        return DataSpec(
            dataset=self._dataset,
            label_column=c.label_column,
            image_size=side,
            channels=channels,
            clients=c.clients,
            partitioner=c.partitioner,
            partitioner_arguments=inline_table("partitioner-args", c.partitioner_args),
            train_examples=c.train_examples,
            test_examples=c.test_examples,
            seed=c.seed,
        )

    @cached_property
    def _dataset(self) -> str:
        dataset = self.config.dataset
        if dataset in NO_PATHS["dataset"] or dataset.startswith(HUB):
            return dataset
        return str(resolve_path(dataset))

    @cached_property
    def measured_scores(self) -> tuple[str, ...]:
        """The kinds that scoring passes measure; none where the strategy looks at none."""
        wanted = self.method.scores
        if wanted is None:
            wanted = (self.config.backward_score, self.config.forward_score)
        return tuple(kind for kind in importance.MEASURED if kind in wanted)

    @property
    def depends_on_rounds(self) -> bool:
        """Whether what a round does depends on how many there are to be."""
        c = self.config
        staged = self.method.staged and not c.stage_rounds
        return staged or c.epsilon > 0 or c.lr_schedule != "constant"

    def adapter(self, arch: Architecture) -> dict[str, Tensor]:
        """Return the factors that a run begins with, and the adapter's classifier where it fits.

        Args:
            arch: The model's architecture, without factors.

        Raises:
            ConfigError: When there are none, or they are others than the run's.
        """
        c = self.config
        found, tensors = read_adapter(resolve_path(c.lora_adapter), arch)
        if replace(found, dropout=self.lora.dropout, targets=()) != replace(
            self.lora, targets=()
        ) or set(found.targets) != set(self.lora.targets):
            raise ConfigError(
                f"lora-adapter = {c.lora_adapter!r} has other factors than the run: set "
                f"lora-rank={found.rank} lora-alpha={found.alpha} "
                f"lora-rslora={str(found.rslora).lower()} lora-targets={', '.join(found.targets)!r}"
            )
        return tensors
