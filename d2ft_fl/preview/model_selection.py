"""Which of several models to fine-tune: the one of which clients can train the most layers.

CAFF (Pfeiffer et al., arXiv 2411.07826) chooses among pretrained transformers by the number of
layers that clients can train on average, before anything is trained. A model that is too large
leaves clients with few layers or nothing to do; one that is too small has few layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from d2ft_fl.budgets.budget import ClientDescription
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.errors import ConfigError
from d2ft_fl.preview.plan_preview import preview
from d2ft_fl.rounds.components import Components


@dataclass(frozen=True)
class Candidate:
    """One model, under the budgets of the federation.

    Attributes:
        model: Its name. layers: How many it has.
        trained_layers: How many a client trains whole in the first round, on average over clients.
        sit_out: Clients that afford nothing of it.
        coverage: Share of the subnets that someone trains.
        chosen: Whether it is the one to take.
    """

    model: str
    layers: int
    trained_layers: float
    sit_out: int
    coverage: float
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def choose(
    config: RunConfig,
    models: Sequence[str],
    examples: int | None = None,
    progress: Callable[[str], None] = lambda model: None,
) -> list[Candidate]:
    """Plan a round of each model, in order, and choose.

    Of equals the one with which fewer clients sit out is chosen, then the first.

    Args:
        config: Its options checked; its strategy plans.
        models: Names of models, one at least.
        examples: How many examples every client has; None reads the data.
        progress: Called with each model before it is planned.

    Raises:
        ConfigError: When there is no model, one cannot be planned, or budgets are all shares of a
            model itself, of which every model affords as much.
    """
    if not models:
        raise ConfigError("name the models to choose from, like vit_tiny_patch16_224")
    if config.match or not _absolute(config, examples or 1):
        raise ConfigError(
            f"budgets = {config.budgets!r} are shares of each model itself, which say nothing of "
            'which to take; name absolute ones, like memory = "512 MiB" or a deadline, or use '
            "budgets = 'hardware', and leave match empty"
        )
    found = []
    for model in models:
        progress(model)
        # Weights decide nothing about costs.
        planned = preview(replace(config, model=model, pretrained="none"), examples)
        clients = planned.rounds[-1].clients
        found.append(
            Candidate(
                model,
                planned.blocks,
                float(np.mean([c.trained_layers for c in clients])),
                sum(c.sits_out for c in clients),
                planned.rounds[-1].coverage,
            )
        )
    best = max(found, key=lambda c: (c.trained_layers, -c.sit_out))
    return [replace(c, chosen=c is best) for c in found]


def _absolute(config: RunConfig, examples: int) -> bool:
    """Whether some client has a budget that is not a share of what it trains."""
    source = Components(config).budget_source
    budgets = (
        source(ClientDescription(client, examples, config.clients), 1)
        for client in range(config.clients)
    )
    return any(
        budget.deadline is not None
        or any(
            (own := getattr(budget, name)) is not None and not own.relative for name in RESOURCES
        )
        for budget in budgets
    )
