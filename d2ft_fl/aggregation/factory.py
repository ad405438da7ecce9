"""The choice of a round's aggregator from the options of a run."""

from collections.abc import Callable

from torch import Tensor

from d2ft_fl.aggregation.aggregator import Aggregator
from d2ft_fl.aggregation.lora_sums import LoraSums
from d2ft_fl.aggregation.private_sums import PrivateRound, PrivateSums
from d2ft_fl.aggregation.robust import ROBUST, ClippedUpdates, RobustSums
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.subnets.architecture import Architecture

# From an architecture, a state and the examples that all updates can count: what takes the mean.
MakeMean = Callable[[Architecture, dict[str, Tensor], int], Aggregator]


def make_aggregator(
    config: RunConfig,
    arch: Architecture,
    weights: dict[str, Tensor],
    examples: int,
    clients: int,
    make_mean: MakeMean,
    private: PrivateRound | None = None,
) -> Aggregator:
    """Return what aggregates the updates of one round.

    Args:
        config: The options of the run.
        arch: The architecture of the round.
        weights: The global state before the round, by name.
        examples: How many examples all updates together can count.
        clients: How many clients train in the round.
        make_mean: The tuning's aggregator, made where options ask for the mean.
        private: How the round is private; None where nothing is promised.
    """
    if private:  # sums that clip updates themselves
        return PrivateSums(arch, weights, private)
    if config.aggregation in ROBUST:
        hostile = config.suspects(clients)
        inner: Aggregator = RobustSums(
            arch, weights, config.aggregation, hostile, config.neighbor_mixing
        )
    else:
        inner = make_mean(arch, weights, examples)
    if config.clip_norm:
        return ClippedUpdates(inner, arch, weights, config.clip_norm)
    return inner


def make_mean(
    config: RunConfig, arch: Architecture, weights: dict[str, Tensor], examples: int
) -> Aggregator:
    """Return what takes means: of factors as ``lora-aggregation`` says, else of weights.

    Args:
        config: The options of the run.
        arch: The architecture of the round; its rank says whether there are factors.
        weights: The global state before the round, by name.
        examples: How many examples all updates together can count.
    """
    if arch.rank:
        return LoraSums(arch, weights, examples, config.lora_aggregation, config.lora_error)
    return Sums(arch, weights, examples)
