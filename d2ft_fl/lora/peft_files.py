"""Names of peft's files and in them: what writing and reading an adapter have in common.

adapter_model.safetensors   ``base_model.model.<module>.lora_A.weight``, its B, and the classifier
adapter_config.json         peft's ``LoraConfig``

peft's rules of matching names (``peft.tuners.tuners_utils.check_target_module_exists``) matter: a
target "proj" would match the convolution ``patch_embed.proj`` too, so that ours are whole names.
"""

import re
from collections.abc import Iterable

from d2ft_fl.lora.config import weights
from d2ft_fl.subnets.architecture import Architecture

PREFIX = "base_model.model."  # peft's, before the model's own names
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def target_pattern(arch: Architecture, targets: Iterable[str]) -> str:
    r"""Return a regular expression of some targets' modules: ``blocks\.\d+\.(attn\.qkv|...)``."""
    wanted, (start, _) = set(targets), weights(arch)[0].name.split("0", 1)
    of_first = {p.role.split(".")[0]: p for p in weights(arch) if p.block == 0}
    names = [
        re.escape(p.name.removeprefix(f"{start}0.").removesuffix(".weight"))
        for target, p in of_first.items()
        if target in wanted
    ]
    return rf"{re.escape(start)}\d+\.({'|'.join(names)})"


def classifier_names(arch: Architecture) -> list[str]:
    """Return the names of the classifier's parameters."""
    return [p.name for p in arch.parameters if arch.is_classifier(p)]
