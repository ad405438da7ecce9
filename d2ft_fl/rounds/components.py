"""What the options of a run name, resolved once: strategy, tuning, budgets, model, data.

A :class:`~d2ft_fl.config.run_config.RunConfig` is plain data. A run carries its ``Components``,
which resolve the names in it to code and specifications.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from d2ft_fl.aggregation.privacy import Privacy
from d2ft_fl.aggregation.server_optimizer import ServerOptimizer
from d2ft_fl.budgets.kept_speeds import kept
from d2ft_fl.budgets.sources import BudgetSource, budget_source
from d2ft_fl.config.choices import HUB
from d2ft_fl.config.run_config import NO_PATHS, RunConfig, inline_table, resolve_path
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.planning import importance
from d2ft_fl.rounds.strategies import Strategy, load_strategy
from d2ft_fl.rounds.tuning import Tuning, load_tuning
from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.task import Task
from d2ft_fl.trackers import Factory, load_trackers
from d2ft_fl.util.torch_device import usable_device


@dataclass(frozen=True)
class Components:
    """Everything that a configuration names. Each attribute is resolved when first asked for.

    Every attribute raises :class:`~d2ft_fl.errors.ConfigError` where what is named does not exist.

    Attributes:
        config: The options of the run.
    """

    config: RunConfig

    @cached_property
    def strategy(self) -> Strategy:
        """What decides which client runs what."""
        return load_strategy(self.config.strategy)

    @cached_property
    def tuning(self) -> Tuning:
        """What decides what trains of an assigned model, and how."""
        return load_tuning(self.config)

    @property
    def takes_steps(self) -> bool:
        """Whether a client's change may be multiplied by a step: where nothing bounds changes."""
        return self.tuning.takes_steps and not self.config.bounds_changes

    @cached_property
    def task(self) -> Task:
        """What is learnt: loss and metrics."""
        return ImageClassification(self.config.logit_adjustment)

    @cached_property
    def trackers(self) -> dict[str, Factory]:
        """Name -> what starts the tracker."""
        return load_trackers(self.config.trackers)

    @cached_property
    def privacy(self) -> Privacy | None:
        """The differential privacy that clients are promised; None where nothing is promised."""
        return Privacy.of(self.config, self.measured_scores)

    @cached_property
    def budget_source(self) -> BudgetSource:
        """The source of clients' budgets."""
        c = self.config
        return budget_source(c.budgets, resolve_path, c.device, c.threads_per_client, c.precision)

    @cached_property
    def local_speed(self) -> MachineSpeed | None:
        """How fast this machine is, where ``d2ft profile`` has measured it."""
        c = self.config
        return kept(c.device, c.precision, c.threads_per_client)

    @cached_property
    def training(self) -> TrainingOptions:
        """The options of clients' training."""
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
        """The device on which clients train and the global model is evaluated."""
        return usable_device(self.config.device)

    @cached_property
    def model_spec(self) -> ModelSpec:
        """The model to build."""
        c, names = self.config, self.class_names
        return ModelSpec(
            name=c.model,
            arguments=inline_table("model-args", c.model_args),
            pretrained=self.pretrained,
            image_size=c.image_size,
            classes=len(names),
            seed=c.seed,
            class_names=names,
        )

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by their numbers."""
        # It brings datasets in, which strategies and options do without.
        from d2ft_fl.data.sources import class_names

        return class_names(self.data_spec((0, 0, 0)))

    def data_spec(self, input_shape: tuple[int, ...]) -> DataSpec:
        """Return the data to open, for a model that takes examples of a shape.

        Args:
            input_shape: Channels, height and width of images.
        """
        c = self.config
        channels, side, _ = input_shape
        return DataSpec(
            dataset=self.dataset,
            label_column=c.label_column,
            image_size=side,
            channels=channels,
            clients=c.clients,
            partitioner=c.partitioner,
            partitioner_arguments=inline_table("partitioner-args", c.partitioner_args),
            train_examples=c.train_examples,
            test_examples=c.test_examples,
            seed=c.seed,
            image_column=c.image_column,
            test_split=c.test_split,
            classes=c.class_list(),
            bad_examples=c.bad_examples,
        )

    @property
    def pretrained(self) -> str:
        """Where the model's weights come from, or their absolute path."""
        pretrained = self.config.pretrained
        if pretrained in NO_PATHS["pretrained"]:
            return pretrained
        return str(resolve_path(pretrained))

    @cached_property
    def dataset(self) -> str:
        """The name of the dataset, or its absolute path."""
        dataset = self.config.dataset
        if dataset in NO_PATHS["dataset"] or dataset.startswith(HUB):
            return dataset
        return str(resolve_path(dataset))

    @cached_property
    def measured_scores(self) -> tuple[str, ...]:
        """The kinds of scores that scoring probes measure; none where the strategy reads none."""
        wanted = self.strategy.scores
        if wanted is None:
            wanted = (self.config.backward_score, self.config.forward_score)
        return tuple(kind for kind in importance.MEASURED if kind in wanted)

    @property
    def depends_on_rounds(self) -> bool:
        """Whether a round depends on how many rounds the run has."""
        c = self.config
        staged = self.strategy.staged and not c.stage_rounds
        return staged or c.epsilon > 0 or c.lr_schedule != "constant"
