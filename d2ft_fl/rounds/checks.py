"""Checks that options fit together, and that what they name exists.

:meth:`.RunConfig.check_values` checks each option alone. A refusal is one line that says what to
write instead.
"""

from collections.abc import Callable

from d2ft_fl.budgets.budget import ClientDescription
from d2ft_fl.budgets.matching import MATCHES
from d2ft_fl.config.choices import (
    ADAPTIVE_OPTIMIZERS,
    EMBEDDED_DATASETS,
    HUB,
    SERVER_OPTIMIZERS,
)
from d2ft_fl.config.run_config import OPTIONS, RunConfig
from d2ft_fl.data.folders import check_folder
from d2ft_fl.errors import ConfigError, UnkeptBudget
from d2ft_fl.models.build import family_of
from d2ft_fl.models.weights import check_weights
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.strategies import Strategy
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.wire.quantization import check_bits


def check_names(config: RunConfig) -> None:
    """Check that options fit together, and all of model and data that takes no time to check.

    Args:
        config: The options of a run.

    Raises:
        ConfigError: In one line, what to write instead.
    """
    components = Components(checked_options(config))
    family_of(config.model)
    if components.dataset not in EMBEDDED_DATASETS and not components.dataset.startswith(HUB):
        check_folder(components.dataset)
    check_weights(config.model, components.pretrained)


def checked(config: RunConfig, note: Callable[[str], None] = lambda line: None) -> RunConfig:
    """Return the configuration, once everything that it names exists and fits together.

    Args:
        config: The options of a run.
        note: Called with each line on weights and data that who runs this may want to know.

    Raises:
        ConfigError: In one line, what to write instead.
    """
    # These modules take seconds to import, and checks of options alone need none of them.
    from d2ft_fl.data.federated_data import open_data
    from d2ft_fl.models.build import build_adapter

    components = Components(checked_options(config))
    _ = components.device
    adapter = build_adapter(components.model_spec)
    arch = adapter.describe()
    components.tuning.check_model(arch)
    data = open_data(components.data_spec(adapter.input_shape))
    partitions = data.partitions
    for line in (*adapter.notes, *data.notes):
        note(line)
    _check_budgets(components, arch, [len(examples) for examples in partitions])
    return config


def _check_budgets(components: Components, arch: Architecture, examples: list[int]) -> None:
    """Raise ConfigError unless clients' budgets of the first round exist and can be matched."""
    from d2ft_fl.rounds.federation import Federation, Report, State

    source = components.budget_source
    asked = examples if components.config.match else examples[:1]
    reports = [
        Report(client, count, source(ClientDescription(client, count, len(examples)), 1))
        for client, count in enumerate(asked)
    ]
    Federation(components, arch).at(1).participants(reports, State(0, {}))


def checked_options(config: RunConfig) -> RunConfig:
    """Return the configuration, once all but its model, data and machine fits together.

    Args:
        config: The options of a run.

    Raises:
        ConfigError: In one line, what to write instead.
    """
    components = Components(config.check_values())
    if config.sample_clients > config.clients:
        raise ConfigError(
            f"sample-clients = {config.sample_clients} is more than clients = {config.clients}; "
            "0 takes all"
        )
    taking_part = config.sample_clients or config.clients
    if config.min_replies > taking_part:
        raise ConfigError(
            f"min-replies = {config.min_replies} is more than the {taking_part} clients that "
            "take part in a round"
        )
    if config.seed >= 2**63:
        raise ConfigError(f"seed = {config.seed} must be below 2**63")
    if config.planner == "two-stage" and (config.frozen_weight or config.coupling == "spread"):
        raise ConfigError(
            "planner = 'two-stage' has D2FT's three operations and no coupling: leave "
            "frozen-weight at 0 and coupling at 'none' or 'agenda', or use planner = 'joint'"
        )
    if config.slots > config.batch_size:
        raise ConfigError(
            f"slots = {config.slots} is more than batch-size = {config.batch_size}; a slot "
            f"needs an example, so ask for at most {config.batch_size} slots"
        )
    if config.compensation and config.score_every == 0:
        raise ConfigError(
            "compensation needs rounds in which clients measure: set score-every to 1 or more"
        )
    no_probe = config.score_every == 0 or config.score_examples == 0
    if no_probe and (measured := components.measured_scores):
        raise ConfigError(
            f"{' and '.join(measured)} scores need scoring probes: set score-every and "
            "score-examples to 1 or more, or use magnitude or uniform scores"
        )
    _check_match(config, components.strategy)
    _check_tuning(components)
    _check_server(config)
    _check_robust(config)
    _ = components.privacy, components.budget_source, components.trackers
    return config


def _check_match(config: RunConfig, strategy: Strategy) -> None:
    """Raise ConfigError unless the strategy keeps the budget that is matched."""
    if config.match_share and not config.match:
        raise ConfigError(
            f"match-share = {config.match_share} belongs to match: set that to one of "
            f"{', '.join(MATCHES)}"
        )
    if lost := [r for r in MATCHES.get(config.match, ()) if r not in strategy.keeps]:
        raise UnkeptBudget(
            f"strategy = {config.strategy!r} cannot keep a budget of {' and '.join(lost)}, which "
            f"match = {config.match!r} gives every client: leave match empty to run it as a "
            "reference, or take another strategy"
        )


def _check_server(config: RunConfig) -> None:
    """Raise ConfigError unless the server's optimiser and its learning rate fit together."""
    if config.server_optimizer in ADAPTIVE_OPTIMIZERS and config.server_lr >= 1:
        raise ConfigError(
            f"server-lr = {config.server_lr} moves every weight by about that much in the first "
            f"rounds of server-optimizer = {config.server_optimizer!r}; set it to 0.01 or so"
        )
    if config.server_optimizer == "mean" and config.server_lr != 1:
        raise ConfigError(
            f"server-lr = {config.server_lr} belongs to an optimiser: set server-optimizer to "
            f"one of {', '.join(SERVER_OPTIMIZERS[1:])}"
        )


def _check_robust(config: RunConfig) -> None:
    """Raise ConfigError unless updates can be aggregated as configured."""
    taking_part = config.sample_clients or config.clients
    if config.hostile_share and config.lora_ranks.strip():
        raise ConfigError(
            "hostile-share makes slices of clients alike, which have other ranks each under "
            f"lora-ranks = {config.lora_ranks!r}: leave one of both out"
        )
    hostile = config.suspects(taking_part)
    if config.aggregation != "mean" and taking_part <= 2 * hostile:
        raise ConfigError(
            f"aggregation = {config.aggregation!r} needs {2 * hostile + 1} clients a round to "
            f"bear {hostile} hostile ones, and there are {taking_part}: have more clients, or "
            f"lower trim-share = {config.trim_share}"
        )


def _check_tuning(components: Components) -> None:
    """Refuse options that the tuning does not read, or that do not go together under it."""
    config, tuning = components.config, components.tuning
    check_bits(config.upload_bits, config.download_bits)
    for one in OPTIONS.values():
        value = getattr(config, one.field.name)
        unread = one.read_by not in ("", tuning.reads)
        if unread and str(value).strip() != str(one.default):
            raise ConfigError(
                f"{one.key} belongs to tuning = {one.read_by!r}, not {config.tuning!r}"
            )
    tuning.check_options()
