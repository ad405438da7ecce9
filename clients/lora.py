"""LoRA: low-rank factors of the assigned slices train, and the classifier.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685. How
factors are aggregated is in :mod:`d2ft_fl.aggregation.lora_sums`, how they begin in
:mod:`d2ft_fl.lora.init`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from d2ft_fl import (
    MIXED_RANK_AGGREGATIONS,
    PLAIN_BITS,
    Architecture,
    ConfigError,
    Kind,
    Lora,
    RunConfig,
    TrainingOptions,
    begin_factors,
    frozen_factors,
    read_adapter,
    resolve_path,
    save_lora,
    targeted_weights,
    unchanging_factors,
    with_lora,
    without_lora,
)

from .base import Tuning
from .slora import SparseStage


class LoraTuning(Tuning):
    """Train factors of the targeted products, and the classifier."""

    reads = "lora"
    takes_steps = False

    @cached_property
    def lora(self) -> Lora:
        """Which products have factors, and of which rank."""
        return Lora.of(self.config)

    def learning_rate(self, kind: Kind, factor: bool, options: TrainingOptions) -> float:
        """Return ``head-lr`` for the classifier, ``lora-lr`` for factors, ``lr`` for weights."""
        if kind is Kind.FINAL:
            return options.head_lr
        return options.lora_lr if factor else options.lr

    def architecture(self, arch: Architecture, round_number: int) -> Architecture:
        """Return the architecture with the factors that ``lora-aggregation`` trains in a round."""
        # Also of products without factors, of which with_lora makes nothing.
        mode, targets = self.config.lora_aggregation, arch.possible_targets
        resting = frozen_factors(mode, arch, targets, round_number)
        return with_lora(arch, self.lora, resting, unchanging_factors(mode, arch, targets))

    def prepare(
        self,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        round_number: int,
        original: Mapping[str, Tensor],
    ) -> tuple[Mapping[str, Tensor], Mapping[str, float | None]]:
        """Return the state, before the first round with new factors or those of an adapter."""
        if round_number != 1:
            return weights, {}
        if self.config.lora_adapter:
            return {**weights, **self._adapter(without_lora(arch))}, {}
        return self._with_factors(weights, arch), {}

    def _with_factors(self, weights: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
        """Return weights with the factors that ``lora-init`` begins."""
        config = self.config
        common = config.lora_aggregation == "freeze-common"
        return begin_factors(arch, weights, config.lora_init, config.seed, common)

    def _adapter(self, arch: Architecture) -> dict[str, Tensor]:
        """Return the tensors of ``lora-adapter``, once its factors match those of the run.

        The classifier of the adapter is among them where it fits the model.
        """
        written = self.config.lora_adapter
        lora, tensors = read_adapter(resolve_path(written), arch)
        alike = replace(lora, dropout=self.lora.dropout, targets=self.lora.targets) == self.lora
        if not alike or set(lora.targets) != set(self.lora.targets):
            raise ConfigError(
                f"lora-adapter = {written!r} has other factors than the run: set "
                f"lora-rank={lora.rank} lora-alpha={lora.alpha} "
                f"lora-rslora={str(lora.rslora).lower()} lora-targets={', '.join(lora.targets)!r}"
            )
        return tensors

    def save(
        self,
        folder: Path,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        original: Mapping[str, Tensor],
    ) -> None:
        """Write the files from which ``d2ft export`` makes an adapter."""
        names = [weight.name for weight, _, _ in targeted_weights(arch)]
        first, initial = original, {}
        if self.config.lora_init == "federa":
            first = self._with_factors(original, arch)
            initial = {p.name: first[p.name] for p in arch.parameters if p.factor}
        changed = {}
        if self.config.lora_aggregation == "stack":
            changed = {name: weights[name].double() - first[name].double() for name in names}
        save_lora(folder, arch, self.lora, weights, initial, changed)

    def check_model(self, arch: Architecture) -> None:
        """Refuse ranks that are too high for the model, and adapters of other factors."""
        self.lora.check(arch)
        if self.config.lora_adapter:
            self._adapter(arch)

    def check_options(self) -> None:
        """Refuse options that do not go together under LoRA."""
        self._check_ranks()
        if self.config.upload_bits < PLAIN_BITS:
            raise ConfigError(
                f"upload-bits = {self.config.upload_bits} quantizes the weights of heads, which "
                f"LoRA does not train: leave it at {PLAIN_BITS}, or set tuning to 'full'"
            )
        self.lora.check_targets()
        self._check_beginning()
        self._check_aggregation()

    def _check_ranks(self) -> None:
        """Refuse ``lora-ranks`` that cannot be read, or that other options rule out."""
        config = self.config
        if not config.lora_ranks.strip():
            return
        for text in config.lora_ranks.split(","):
            if not text.strip().isdecimal() or not 1 <= int(text) <= config.lora_rank:
                raise ConfigError(
                    f"lora-ranks = {config.lora_ranks!r}: {text.strip()!r} is no whole number from "
                    f"1 to lora-rank = {config.lora_rank}; write ranks like '2, 4'"
                )
        if config.lora_aggregation not in MIXED_RANK_AGGREGATIONS:
            raise ConfigError(
                f"lora-aggregation = {config.lora_aggregation!r} cannot aggregate different ranks: "
                f"use {' or '.join(MIXED_RANK_AGGREGATIONS)}, or leave lora-ranks empty"
            )
        if config.planner == "two-stage":
            raise ConfigError(
                "planner = 'two-stage' knows one rank: use planner = 'joint', or leave lora-ranks "
                "empty"
            )

    def _check_beginning(self) -> None:
        """Refuse options that ask for several beginnings of the factors."""
        config = self.config
        begins = [config.lora_init != "lora", bool(config.lora_adapter), config.slora_rounds > 0]
        if sum(begins) > 1:
            raise ConfigError(
                "lora-init = 'federa', lora-adapter and slora-rounds each say how factors begin: "
                "choose one"
            )
        if config.lora_aggregation == "freeze-common" and any(begins):
            raise ConfigError(
                "lora-aggregation = 'freeze-common' draws the factors that it freezes: leave "
                "lora-init at 'lora', lora-adapter empty and slora-rounds at 0"
            )

    def _check_aggregation(self) -> None:
        """Refuse options that act on means of factors where the mode takes no such means."""
        config, mode = self.config, self.config.lora_aggregation
        if mode not in MIXED_RANK_AGGREGATIONS:
            return
        if config.server_optimizer != "mean":
            raise ConfigError(
                f"server-optimizer = {config.server_optimizer!r} steps factors by their means, "
                f"which lora-aggregation = {mode!r} does not take: use factors, freeze-a, "
                "alternate or freeze-common"
            )
        if config.clip_norm or config.aggregation != "mean":
            asked = "clip-norm" if config.clip_norm else "aggregation"
            raise ConfigError(
                f"{asked} acts on factors, which lora-aggregation = {mode!r} does not aggregate: "
                "use factors, freeze-a, alternate or freeze-common"
            )


class SLoraTuning(SparseStage, LoraTuning):
    """LoRA after a stage of sparse fine-tuning, see :mod:`d2ft_fl.clients.slora`."""


def tuning(config: RunConfig) -> Tuning:
    """Return LoRA, after SLoRA's first stage where ``slora-rounds`` asks for one.

    Args:
        config: The options of the run.
    """
    return SLoraTuning(config) if config.slora_rounds else LoraTuning(config)
