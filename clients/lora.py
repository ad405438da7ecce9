"""LoRA: of what is assigned, low-rank factors train, and the classifier.

With ``slora-rounds`` the first rounds fine-tune the assigned slices of the targeted weights
themselves, and what they change begins the factors (SLoRA, arXiv 2308.06522).
"""

from d2ft_fl.config import RunConfig
from d2ft_fl.factors import frozen, unchanging
from d2ft_fl.lora import targets_alone, with_lora
from d2ft_fl.subnets import Architecture, Kind
from d2ft_fl.training import LocalOptions


def architecture(arch: Architecture, config: RunConfig, round: int) -> Architecture:
    """What trains in a round."""
    lora = config.lora()
    if round <= config.slora_rounds:
        return targets_alone(arch, lora)
    mode = config.lora_aggregation
    still = frozen(mode, lora.targets, round - config.slora_rounds)
    return with_lora(arch, lora, still, unchanging(mode, lora.targets))


def learning_rate(kind: Kind, options: LocalOptions) -> float:
    """The classifier learns at ``head-lr``, factors at ``lora-lr``."""
    return options.head_lr if kind is Kind.FINAL else options.lora_lr
