"""LoRA: of what is assigned, low-rank factors train, and the classifier.

With ``slora-rounds`` the first rounds fine-tune the assigned slices of the targeted weights
themselves, and what they change begins the factors (SLoRA, arXiv 2308.06522).
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from d2ft_fl import (
    Architecture,
    Components,
    Kind,
    TrainingOptions,
    begin_factors,
    factors_of_update,
    frozen_factors,
    save_lora,
    targeted_weights,
    targets_alone,
    unchanging_factors,
    with_lora,
    without_lora,
)


def architecture(arch: Architecture, components: Components, round_number: int) -> Architecture:
    """What trains in a round."""
    lora = components.lora
    if round_number <= components.config.slora_rounds:
        return targets_alone(arch, lora)
    mode = components.config.lora_aggregation
    targets = lora.targets_in(arch)
    still = frozen_factors(mode, arch, targets, round_number - components.config.slora_rounds)
    return with_lora(arch, lora, still, unchanging_factors(mode, arch, targets))


def prepare(
    weights: Mapping[str, Tensor],
    arch: Architecture,
    components: Components,
    round_number: int,
    original: Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """The state before a round, and what there is to say of it: where factors begin, with them.

    Args:
        weights: The state so far. original: The weights that the run began with.
    """
    if round_number != components.config.slora_rounds + 1:
        return weights, {}
    if components.config.slora_rounds:
        names = [weight.name for weight, _, _ in targeted_weights(arch)]
        change = {name: weights[name].double() - original[name].double() for name in names}
        own = {**weights, **{name: original[name] for name in names}}
        state, discarded = factors_of_update(arch, own, change)
        return state, {"slora_discarded": discarded}
    if components.config.lora_adapter:
        return {**weights, **components.adapter(without_lora(arch))}, {}
    return _begun(weights, arch, components), {}


def _begun(
    weights: Mapping[str, Tensor], arch: Architecture, components: Components
) -> dict[str, Tensor]:
    common = components.config.lora_aggregation == "freeze-common"
    return begin_factors(arch, weights, components.config.lora_init, components.config.seed, common)


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    arch: Architecture,
    components: Components,
    original: Mapping[str, Tensor],
) -> None:
    """Leave in a run's folder what ``d2ft export`` makes an adapter of."""
    names = [weight.name for weight, _, _ in targeted_weights(arch)]
    first, initial = original, {}
    if components.config.lora_init == "federa":
        first = _begun(original, arch, components)
        initial = {p.name: first[p.name] for p in arch.parameters if p.factor}
    changed = {}
    if components.config.lora_aggregation == "stack":
        changed = {name: weights[name].double() - first[name].double() for name in names}
    save_lora(folder, arch, components.lora, weights, initial, changed)


def learning_rate(kind: Kind, factor: bool, options: TrainingOptions) -> float:
    """``head-lr`` of the classifier, ``lora-lr`` of factors, ``lr`` of weights (SLoRA's stage)."""
    if kind is Kind.FINAL:
        return options.head_lr
    return options.lora_lr if factor else options.lr
