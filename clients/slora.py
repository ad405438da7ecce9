"""SLoRA: sparse fine-tuning first; its change initialises LoRA's factors.

In the first ``slora-rounds`` rounds the assigned slices of the targeted weights train themselves.
Then what they changed is factorised, the weights return to what they were, and factors train.

Babakniya et al., SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models, 2023, arXiv
2308.06522. Deviates: the paper's first stage trains a random mask of the weights; here a client
trains the slices that its strategy assigns.
"""

from collections.abc import Mapping

from torch import Tensor

from d2ft_fl import (
    Architecture,
    ConfigError,
    Lora,
    factors_of_update,
    targeted_weights,
    targets_alone,
)

from .base import Tuning


class SparseStage(Tuning):
    """The first stage, before the rounds of the next class in order of inheritance.

    That class counts its rounds from 1, without those of the stage.
    """

    def check_options(self) -> None:
        """Refuse a run that ends before the stage does."""
        super().check_options()
        config = self.config
        if config.slora_rounds >= config.rounds:
            raise ConfigError(
                f"slora-rounds = {config.slora_rounds} must be below rounds = {config.rounds}, so "
                "that rounds of LoRA follow"
            )

    def architecture(self, arch: Architecture, round_number: int) -> Architecture:
        """Return the targeted weights as what trains in the stage, and factors after it."""
        stage = self.config.slora_rounds
        if round_number <= stage:
            return targets_alone(arch, Lora.of(self.config))
        return super().architecture(arch, round_number - stage)

    def prepare(
        self,
        weights: Mapping[str, Tensor],
        arch: Architecture,
        round_number: int,
        original: Mapping[str, Tensor],
    ) -> tuple[Mapping[str, Tensor], Mapping[str, float | None]]:
        """Return, after the stage, original weights and factors of what it changed.

        The figure ``slora_discarded`` is the Frobenius norm of what the rank leaves out of the
        change.
        """
        if round_number != self.config.slora_rounds + 1:
            return weights, {}
        names = [weight.name for weight, _, _ in targeted_weights(arch)]
        change = {name: weights[name].double() - original[name].double() for name in names}
        restored = {**weights, **{name: original[name] for name in names}}
        state, discarded = factors_of_update(arch, restored, change)
        return state, {"slora_discarded": discarded}
