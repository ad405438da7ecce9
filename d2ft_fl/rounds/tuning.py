"""Tunings: what of an assigned model trains, how fast, and how updates are aggregated.

A tuning is a subclass of :class:`Tuning`. The option ``tuning`` chooses it: a built-in name or the
dotted path of a module with ``tuning(config)``, which returns it. A module with plain functions
works too, see :class:`FunctionTuning`. The built-in tunings are in the package ``clients``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from d2ft_fl.config.choices import TUNINGS
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.architecture import Architecture, Kind
from d2ft_fl.util.plugins import load_module

if TYPE_CHECKING:
    from d2ft_fl.aggregation.aggregator import Aggregator

LEARNING_RATE = "learning_rate(kind, factor, options)"


class Tuning(ABC):
    """Decides what trains of the slices that a client is assigned.

    A tuning has no training loop of its own: the engine trains what the hooks describe. Each
    process of a run, the server and every worker, makes a tuning of its own from equal options, so
    that hooks must depend on their arguments and on :attr:`config` only. Every hook but
    :meth:`learning_rate` has a default, which is that of full fine-tuning.

    When hooks are called:

    1. :meth:`check_options`, then :meth:`check_model`, before a run starts.
    2. Before each round :meth:`architecture`, on the server and on every worker, and then, on the
       server, :meth:`prepare`.
    3. In the round :meth:`learning_rate` on workers, once for each group of parameters, and
       :meth:`aggregator` on the server, once.
    4. :meth:`save` after the last round, on the server.

    Attributes:
        config: The options of the run.
        reads: The tuning whose own options this one reads (``read_by`` of an option, for example
            ``lora``); empty for none. Options that the tuning of a run does not read are refused
            where they are set.
        takes_steps: Whether the server may multiply a client's change by
            :attr:`~d2ft_fl.config.training_options.ExecutionPolicy.step`, which asks for an
            aggregator that does.
    """

    reads: str = ""
    takes_steps: bool = True

    def __init__(self, config: RunConfig):
        self.config = config

    @abstractmethod
    def learning_rate(self, kind: Kind, factor: bool, options: TrainingOptions) -> float:
        """Return the learning rate of a kind of parameters.

        Args:
            kind: What the parameters belong to: subnets, blocks, or the end of the model.
            factor: Whether they are low-rank factors.
            options: How the client trains in this round, learning rates scheduled.
        """

    def check_options(self) -> None:
        """Refuse options that do not fit together.

        Called without a model, for ``d2ft run`` as for every trial of a sweep: it must be fast.

        Raises:
            ConfigError: In one line with the value, what is allowed and what to write instead.
        """

    def check_model(self, arch: Architecture) -> None:
        """Refuse options that do not fit the model.

        Args:
            arch: The model's architecture, as it was built.

        Raises:
            ConfigError: In one line with the value, what is allowed and what to write instead.
        """

    def architecture(self, arch: Architecture, round_number: int) -> Architecture:
        """Return the architecture of a round, which says what trains and which factors there are.

        Costs, messages, training and aggregation all follow it. It may differ from round to round;
        rounds that train alike must return equal architectures.

        Args:
            arch: The model's architecture, as it was built.
            round_number: The round that comes, counted from 1.
        """
        return arch

    def prepare(
        self,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        round_number: int,
        original: Mapping[str, Tensor],
    ) -> tuple[Mapping[str, Tensor], Mapping[str, float | None]]:
        """Return the global state that a round starts from, and figures about its making.

        Returning ``weights`` itself keeps the state. A new mapping is a new beginning: parameters
        that never change are sent again, and the moments of the server's optimiser start anew. A
        round that is repeated or resumed is prepared again from the same arguments.

        Args:
            weights: The global state so far, by name, which must not be changed in place.
            arch: The architecture of the round, as :meth:`architecture` returned it.
            round_number: The round that comes, counted from 1.
            original: The model's weights before the first round, by name.

        Returns:
            The state with a tensor for every parameter of ``arch``, and figures for the record of
            the round, by name.
        """
        return weights, {}

    def aggregator(
        self, arch: Architecture, weights: dict[str, Tensor], examples: int
    ) -> "Aggregator":
        """Return what takes the mean of the updates of one round.

        The default aggregates factors as ``lora-aggregation`` says, where the architecture has
        some, else weights. Not called where a robust or private aggregator replaces the mean.

        Args:
            arch: The architecture of the round.
            weights: The global state before the round, by name.
            examples: How many examples all updates together can count.
        """
        from d2ft_fl.aggregation.factory import make_mean  # compiled code, which workers do without

        return make_mean(self.config, arch, weights, examples)

    def save(
        self,
        folder: Path,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        original: Mapping[str, Tensor],
    ) -> None:
        """Write files of the tuning's own to the folder of a run that has ended.

        The merged model is saved besides in any case.

        Args:
            folder: The folder of the run.
            weights: The final global state, by name.
            arch: The architecture of the last round.
            original: The model's weights before the first round, by name.
        """


class FunctionTuning(Tuning):
    """A tuning that is a module with plain functions.

    The module has ``learning_rate(kind, factor, options)``. It may have the following functions.
    Each means what the method of that name means in :class:`Tuning`:

    - ``architecture(arch, config, round_number)``
    - ``prepare(weights, arch, config, round_number, original)``
    - ``save(folder, weights, arch, config, original)``

    Attributes:
        module: The module.
    """

    def __init__(self, config: RunConfig, module: ModuleType):
        super().__init__(config)
        self.module = module

    def _function(self, name: str) -> Callable[..., Any] | None:
        """Return a function of the module; None if it has none of this name."""
        return getattr(self.module, name, None)

    def learning_rate(self, kind: Kind, factor: bool, options: TrainingOptions) -> float:
        """Return what the module's function returns."""
        return self.module.learning_rate(kind, factor, options)

    def architecture(self, arch: Architecture, round_number: int) -> Architecture:
        """Return what the module's function returns; ``arch`` without one."""
        function = self._function("architecture")
        return function(arch, self.config, round_number) if function else arch

    def prepare(
        self,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        round_number: int,
        original: Mapping[str, Tensor],
    ) -> tuple[Mapping[str, Tensor], Mapping[str, float | None]]:
        """Return what the module's function returns; ``weights`` and no figures without one."""
        function = self._function("prepare")
        if function is None:
            return weights, {}
        return function(weights, arch, self.config, round_number, original)

    def save(
        self,
        folder: Path,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        original: Mapping[str, Tensor],
    ) -> None:
        """Call the module's function, if it has one."""
        if function := self._function("save"):
            function(folder, weights, arch, self.config, original)


def load_tuning(config: RunConfig, option: str = "tuning") -> Tuning:
    """Load the tuning that ``tuning`` names.

    Args:
        config: The options of the run.
        option: The option that names the tuning, for messages.

    Raises:
        ConfigError: When there is no such module, or it is not a tuning.
    """
    module = load_module("clients", config.tuning, option, TUNINGS)
    where = f"{option} = {config.tuning!r}"
    make = getattr(module, "tuning", None)
    if callable(make):
        try:
            tuning = make(config)
        except ConfigError:
            raise
        except Exception as error:  # a plug-in is anybody's code
            raise ConfigError(
                f"{where}: tuning(config) raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(tuning, Tuning):
            raise ConfigError(
                f"{where}: tuning(config) returned a {type(tuning).__name__}; return a Tuning"
            )
        return tuning
    if callable(getattr(module, "learning_rate", None)):
        return FunctionTuning(config, module)
    raise ConfigError(f"{where} has no function {LEARNING_RATE}, and no tuning(config)")
