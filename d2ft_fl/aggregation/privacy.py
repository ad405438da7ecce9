"""Central differential privacy of what clients send.

The server adds normal noise to a round's sums before anybody sees them (DP-FedAvg, McMahan et al.,
ICLR 2018, arXiv 1710.06963). A client's whole change is made no longer than S = ``clip-norm``, z is
``noise-multiplier``, q the chance that a client takes part in a round, and n_s the number of all
clients whose plan trains slice s, drawn or not:

    theta_s <- theta_s + (sum_{c in C_s} min(1, S / |change_c|_2) change_cs + N(0, z^2 S^2 I))
                         / max(1, q n_s)

Clients count alike. n_s counts plans, not answers, so that nothing but the noisy sum depends on who
was drawn or on what anybody sent. A slice that no plan trains keeps its bits.

``epsilon`` and ``delta`` hold for all models of a run together, those of rounds that were released
more than once included (:mod:`d2ft_fl.aggregation.releases`). They compare a federation with one in
which a client never sends anything (the zero-out relation of Kairouz et al., ICML 2021, arXiv
2103.00039). That a client exists, its budget and its number of examples are not hidden. Nothing is
hidden from the server, which is trusted, as are the private files of its run folder.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from d2ft_fl.aggregation.grid import FRACTION_BITS, SUM_BITS
from d2ft_fl.aggregation.keyed_noise import REACH, Noise
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError

LEAST = 0.01  # the least noise-multiplier, in units of clip-norm
LARGE = 100.0  # beyond it epsilon promises next to nothing, and its tight bound takes gigabytes


@dataclass(frozen=True)
class Privacy:
    """What a run promises every client.

    Attributes:
        clip: The longest that a client's whole change can be (L2); longer ones are shortened to it.
        noise: Standard deviation of the noise of the sums, in units of ``clip``.
        rate: The chance that a client takes part in a round.
        delta: The probability with which the promise may fail.
        most: The epsilon that all releases of the run may cost together.
    """

    clip: float
    noise: float
    rate: float
    delta: float
    most: float = math.inf

    @classmethod
    def of(cls, config: RunConfig, measured: Sequence[str]) -> "Privacy | None":
        """Return the promise that options ask for; None where nothing is promised.

        Args:
            config: The options of the run.
            measured: The kinds of scores that are measured on clients' data.

        Raises:
            ConfigError: When the options contradict each other, or when others reveal what the
                noise hides.
        """
        if not config.noise_multiplier and not config.epsilon:
            return None
        _check(config, measured)
        rate = (config.sample_clients or config.clients) / config.clients
        noise = config.noise_multiplier
        if config.epsilon:
            noise = noise_for(config.epsilon, config.delta, rate, config.rounds)
        if not fits_sums(noise, config.clip_norm, FRACTION_BITS):
            raise ConfigError(
                f"noise-multiplier = {noise:.3g} times clip-norm = {config.clip_norm:.3g} is "
                f"{noise * config.clip_norm:.3g}, and sums can hold noise below "
                f"{2.0 ** (SUM_BITS - FRACTION_BITS) / REACH:.3g}: lower clip-norm"
            )
        return cls(config.clip_norm, noise, rate, config.delta, config.epsilon or math.inf)

    def epsilon(self, releases: Iterable[int]) -> float:
        """Return the epsilon of all releases, by Opacus and Gopi et al. (NeurIPS 2021).

        Releases of one round are of the same draw of clients. Those who know k noisy sums of it
        know no more than one with k times less variance (the sums of normal mechanisms compose to
        one; sampling then acts once), so k releases count as one with noise z / sqrt(k).

        Args:
            releases: How often each round was released.
        """
        alike = Counter(n for n in releases if n)
        history = tuple(
            (self.noise / math.sqrt(often), self.rate, rounds)
            for often, rounds in sorted(alike.items())
        )
        return _epsilon(history, self.delta)


def fits_sums(noise: float, clip: float, fraction_bits: int) -> bool:
    """Tell whether noise stays within the bits that sums have for it, so that nothing wraps.

    Args:
        noise: Its standard deviation, in units of ``clip``.
        clip: The longest change of a client.
        fraction_bits: How many bits of the sums are fractions.
    """
    return noise * clip * REACH < 2.0 ** (SUM_BITS - fraction_bits)


def _check(config: RunConfig, measured: Sequence[str]) -> None:
    """Raise ConfigError where options contradict each other or reveal what the noise hides."""
    if config.noise_multiplier and config.epsilon:
        raise ConfigError(
            f"noise-multiplier = {config.noise_multiplier} and epsilon = {config.epsilon} both "
            "decide the noise: set one of them to 0"
        )
    if 0 < config.noise_multiplier < LEAST:
        raise ConfigError(
            f"noise-multiplier = {config.noise_multiplier} promises nothing: set it to {LEAST} or "
            "more, or to 0 for no noise"
        )
    if not config.clip_norm:
        raise ConfigError("noise is measured in clip-norm: set it above 0, to 1.0 say")
    if not 0 < config.delta < 1 / config.clients:
        raise ConfigError(
            f"delta = {config.delta} must be above 0, and below 1 / clients = {1 / config.clients}"
        )
    if config.aggregation != "mean":
        raise ConfigError(
            f"aggregation = {config.aggregation!r} cannot have noise: its sums have no bound; use "
            "'mean'"
        )
    if measured:
        raise ConfigError(
            f"{' and '.join(measured)} scores are measured on clients' data, and noise does not "
            "hide them: set backward-score and forward-score to magnitude or uniform"
        )
    if config.compensation:
        raise ConfigError(
            "compensation sends means over clients' data, and noise does not hide them: set it to "
            "false"
        )


@lru_cache(maxsize=1024)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Return the epsilon of rounds that are given as (noise, rate, how many)."""
    if not history:
        return 0.0
    loose, tight = _accountants()
    loose.history = tight.history = list(history)
    # Opacus warns of its orders and of logarithms of 0; its bounds are right all the same.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        epsilon = float(loose.get_epsilon(delta))
        if epsilon < LARGE:
            epsilon = min(epsilon, float(tight.get_epsilon(delta)))
    return epsilon


@lru_cache(maxsize=16)
def noise_for(epsilon: float, delta: float, rate: float, rounds: int) -> float:
    """Return the least noise that keeps epsilon, to a thousandth.

    Args:
        epsilon: What all rounds may cost together.
        delta: The probability with which the promise may fail.
        rate: The chance that a client takes part in a round.
        rounds: Rounds of the run.

    Raises:
        ConfigError: When no noise keeps it.
    """
    low, high = LEAST, 1.0

    def cost(noise: float) -> float:
        return _epsilon(((noise, rate, rounds),), delta)

    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > 2**20:
            raise ConfigError(f"epsilon = {epsilon} cannot be kept with delta = {delta}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        kept = cost(middle) <= epsilon
        low, high = (low, middle) if kept else (middle, high)
    return high


def _accountants() -> tuple[Any, Any]:
    """Return the accountants of Opacus: of the loose bound, and of the tight one."""
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError:
        raise ConfigError(
            "noise-multiplier and epsilon need Opacus to account for them: "
            "pip install 'd2ft-fl[privacy]'"
        ) from None
    return RDPAccountant(), PRVAccountant()


def drawn(privacy: Privacy, key: bytes, round_number: int, clients: Iterable[int]) -> list[int]:
    """Return who takes part in a round, in order: each client by itself with the chance ``rate``.

    Args:
        privacy: What the run promises.
        key: The key of the run's noise.
        round_number: The round, counted from 1.
        clients: All clients.
    """
    ordered = sorted(clients)
    if not ordered:
        return ordered
    draws = Noise(key, "draw", round_number).uniform(ordered[-1] + 1)
    return [client for client in ordered if draws[client] < privacy.rate]
