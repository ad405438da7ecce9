"""Options of how the server aggregates updates, and of what travels."""

from dataclasses import dataclass

from d2ft_fl.config.choices import (
    AGGREGATIONS,
    ATTACKS,
    DOWNLOAD_BITS,
    SERVER_OPTIMIZERS,
    UPLOAD_BITS,
)
from d2ft_fl.config.option import option


@dataclass(frozen=True)
class AggregationOptions:
    """Aggregation."""

    aggregation: str = option(
        "mean",
        "How clients' values of a slice become one: their weighted mean, or a robust aggregation "
        "that a few hostile clients cannot lead anywhere.",
        choices=AGGREGATIONS,
    )
    trim_share: float = option(
        0.2,
        "Share of a round's clients that may be hostile, one at least, for robust aggregations.",
        low=0,
        below=0.5,
    )
    neighbor_mixing: bool = option(
        True,
        "Whether robust aggregations first mix each client's slice with those nearest to it "
        "(Allouah et al., AISTATS 2023, arXiv 2302.01772).",
    )


@dataclass(frozen=True)
class PrivacyOptions:
    """Clipping and differential privacy."""

    clip_norm: float = option(
        0.0,
        "Longest L2 norm that a client's whole change may have; longer ones are scaled down; 0 for "
        "no limit.",
        low=0,
    )
    noise_multiplier: float = option(
        0.0,
        "Standard deviation of the noise on every round's sums, for differential privacy; 0 for "
        "none.",
        low=0,
        unit="clip-norms",
    )
    epsilon: float = option(
        0.0,
        "Epsilon of differential privacy that all rounds together keep, in place of "
        "noise-multiplier; 0 for none.",
        low=0,
    )
    delta: float = option(
        1e-5,
        "Probability with which the promise of differential privacy may fail; above 0 and below "
        "1 / clients where there is noise.",
    )
    noise_seed: int = option(
        -1,
        "Seed of the noise of differential privacy; -1 for a secret one that is kept in the run's "
        "folder.",
        low=-1,
    )


@dataclass(frozen=True)
class HostileOptions:
    """Hostile clients, for experiments."""

    hostile_share: float = option(
        0.0, "Share of the clients that attack, as hostile-attack says.", low=0, high=1
    )
    hostile_attack: str = option(
        "sign-flip",
        "What hostile clients do: they send hostile-scale times their change (sign-flip), noise as "
        "large (gaussian), or hostile-scale times the mean of the honest (inner-product); they "
        "hide among these (alie, min-max); or they train on wrong labels (label-flip).",
        choices=ATTACKS,
    )
    hostile_scale: float = option(
        -10.0, "Factor of the attacks sign-flip, gaussian and inner-product."
    )


@dataclass(frozen=True)
class QuantizationOptions:
    """Quantization of what travels."""

    upload_bits: int = option(
        32,
        "Bits of each number that a client sends; 8 and 4 are rounded at random, without bias.",
        choices=UPLOAD_BITS,
        unit="bits",
    )
    download_bits: int = option(
        32,
        "Bits of each number that a client receives; 8 needs fewer than 32 upload-bits.",
        choices=DOWNLOAD_BITS,
        unit="bits",
    )


@dataclass(frozen=True)
class ServerOptimizerOptions:
    """Server optimizer, for every slice that somebody trained."""

    server_optimizer: str = option(
        "mean",
        "How the server steps: mean takes the aggregate as it is; fedavgm, fedadam and fedyogi "
        "treat the change as a gradient (Reddi et al., ICLR 2021, arXiv 2003.00295).",
        choices=SERVER_OPTIMIZERS,
    )
    server_lr: float = option(
        1.0,
        "Learning rate of the server optimizer; fedadam and fedyogi need 0.01 or so, and mean has "
        "none (1).",
        low=0,
    )
    server_momentum: float = option(
        0.9, "Decay of the first moment of the server optimizer.", low=0, below=1
    )
    server_second_momentum: float = option(
        0.99, "Decay of the second moment of fedadam and fedyogi.", low=0, below=1
    )
    server_tau: float = option(
        1e-3, "Number that fedadam and fedyogi add to the root of the second moment.", above=0
    )
