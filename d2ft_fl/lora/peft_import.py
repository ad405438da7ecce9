"""Reads an adapter of peft to start a run from: plain LoRA of products that may have factors."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from d2ft_fl.errors import ConfigError, first_line
from d2ft_fl.lora.config import FACTORS, Lora, factor_name, most_rank, weights
from d2ft_fl.lora.peft_files import CONFIG, PREFIX, TENSORS, classifier_names, target_pattern
from d2ft_fl.subnets.architecture import Architecture

# Initialisations after which an adapter belongs to the weights as they were. All others of peft's
# (pissa, olora, corda, loftq, lora_ga) leave it to be added to changed ones.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Options that make of LoRA something else than W + scaling * B A. Off, they are null, false or [].
VARIANTS = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


def read_adapter(folder: Path, arch: Architecture) -> tuple[Lora, dict[str, Tensor]]:
    """Return what an adapter tunes, and its tensors by our names in float32, to start a run from.

    The classifier is among them where the adapter has one of as many classes as the model.

    Args:
        folder: The adapter's.
        arch: Of the model, without factors.

    Raises:
        ConfigError: When it cannot be read, is more than LoRA of the products of a
            block that may have factors, or belongs to another model.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder)
        _check_config(config, arch.classifier)
        tensors = _read_tensors(folder)
        prefix = f"{arch.classifier}."
        head = {n: t for n, t in tensors.items() if n.startswith(prefix) and ".lora_" not in n}
        factors = {n: t for n, t in tensors.items() if n not in head}
        lora = _lora(config, arch, _modules(arch, factors))
        _check_shapes(arch, lora, factors)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ConfigError(
                    f"{name!r} holds numbers that are not finite; use an adapter whose training "
                    "did not fail"
                )
        return lora, factors | _head(arch, head)
    except ConfigError as error:
        raise ConfigError(f"adapter {str(folder)!r}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError("there is no such folder; name one that holds an adapter of peft")
    try:
        config = json.loads(folder.joinpath(CONFIG).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"it lacks {CONFIG!r}; name a folder that peft's save_pretrained wrote"
        ) from None
    except OSError as error:
        raise ConfigError(f"{CONFIG!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{CONFIG!r} is not JSON: {error}; save the adapter again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{CONFIG!r} is not a JSON object; save the adapter again")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in float32, without peft's prefix."""
    try:
        tensors = safetensors.torch.load_file(folder / TENSORS)
    except FileNotFoundError:
        raise ConfigError(f"it lacks {TENSORS!r}; save the adapter again, as safetensors") from None
    except (SafetensorError, OSError) as error:
        text = first_line(error)
        raise ConfigError(
            f"{TENSORS!r} is not safetensors: {text}; save the adapter again"
        ) from None
    return {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}


def _check_config(config: Mapping[str, Any], classifier: str) -> None:
    """Raise ConfigError unless a configuration is of plain LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ConfigError(f"peft_type = {kind!r} is not 'LORA'; use an adapter of LoRA")
    if (bias := config.get("bias", "none")) != "none":
        raise ConfigError(
            f"bias = {bias!r} trains biases; only 'none' is known: make one with bias='none'"
        )
    for option in VARIANTS:
        if config.get(option):
            raise ConfigError(
                f"{option} = {config[option]!r} is not plain LoRA; make one without {option}"
            )
    if "init_lora_weights" in config and config["init_lora_weights"] not in INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights = {config['init_lora_weights']!r} changes the base weights; save "
            "it with path_initial_model_for_weight_conversion, or use one of "
            f"{', '.join(map(str, INITIALISATIONS))}"
        )
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    if not isinstance(saved, list):
        raise ConfigError(f"modules_to_save = {saved!r} is not a list; save the adapter again")
    if others := [name for name in saved if name != classifier]:
        raise ConfigError(
            f"modules_to_save names {others[0]!r}; only {classifier!r} is known: make one with "
            f"modules_to_save=[{classifier!r}] or without"
        )


def _modules(arch: Architecture, factors: Iterable[str]) -> dict[str, str]:
    """Return target by module, of every block, of what the factors belong to."""
    known = {p.name.removesuffix(".weight"): p.role.split(".")[0] for p in weights(arch)}
    possible = arch.possible_targets
    pattern = target_pattern(arch, possible)
    anywhere, targets = re.compile(pattern), set()
    for name in factors:
        module, part, _ = name.partition(".lora_")
        if not part:
            raise ConfigError(
                f"it holds {name!r}, which is no factor of LoRA; use an adapter of LoRA alone"
            )
        if module not in known and anywhere.fullmatch(module):
            raise ConfigError(
                f"it is for another model: it adapts {module!r}, but the model has {arch.blocks} "
                "blocks; use one that was made for this model"
            )
        if module not in known:
            raise ConfigError(
                f"it adapts {module!r}; only {', '.join(possible)} of a block can be: make one "
                f"with target_modules={pattern!r}"
            )
        targets.add(known[module])
    if not targets:
        raise ConfigError("it holds no factors of LoRA; use an adapter that was trained")
    return {module: target for module, target in known.items() if target in targets}


def _lora(config: Mapping[str, Any], arch: Architecture, modules: Mapping[str, str]) -> Lora:
    """Return the specification of a configuration, peft's defaults where it says nothing."""
    ranks = _of_modules(config, modules, "r", "rank_pattern")
    alphas = _of_modules(config, modules, "lora_alpha", "alpha_pattern")
    for name, values in (("ranks", ranks), ("alphas", alphas)):
        if len(values) > 1:
            raise ConfigError(
                f"it has several {name}, {', '.join(map(str, sorted(values)))}; only one for all "
                "modules is known: make one without rank_pattern and alpha_pattern"
            )
    rank, alpha = int(ranks.pop()), float(alphas.pop())
    targets = tuple(t for t in arch.possible_targets if t in modules.values())
    most = most_rank(arch, targets)
    if not 1 <= rank <= most:
        raise ConfigError(
            f"its r = {rank} does not lie between 1 and {most}, the rank of the smallest product "
            "that it adapts; use one of a smaller rank (FeDeRA's export has twice the run's)"
        )
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"its lora_alpha = {alpha} is no number above 0; save the adapter again")
    dropout = _number(config.get("lora_dropout", 0.0), "lora_dropout")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout = {dropout} must be 0 or more, and below 1")
    return Lora(rank, alpha, targets, bool(config.get("use_rslora")), dropout)


def _of_modules(
    config: Mapping[str, Any], modules: Iterable[str], option: str, pattern: str
) -> set[float]:
    """Return the values of an option over modules; as in peft the first pattern decides."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{pattern} = {patterns!r} is not a table; save the adapter again")
    try:
        known = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
    except re.error as error:
        raise ConfigError(f"{pattern} holds no regular expression: {error}") from None
    values = set()
    for module in modules:
        hits = (value for key, value in known if key.match(module))
        values.add(_number(next(hits, config.get(option, 8)), option))
    return values


def _number(value: Any, option: str) -> float:
    whole = option == "r"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kind = "whole number" if whole else "number"
        raise ConfigError(f"{option} = {value!r} is not a {kind}; save the adapter again")
    try:
        float(value)
    except OverflowError:
        raise ConfigError(f"{option} is too large a number; save the adapter again") from None
    return value


def _check_shapes(arch: Architecture, lora: Lora, factors: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless there are both factors of every module, of the shapes they need."""
    targets = lora.targets_in(arch)
    wanted = {
        factor_name(p.name, factor): (lora.rank, p.shape[1])
        if factor == "A"
        else (p.shape[0], lora.rank)
        for p in weights(arch)
        if p.role.split(".")[0] in targets
        for factor in FACTORS
    }
    for name, shape in wanted.items():
        if name not in factors:
            raise ConfigError(
                f"it is for another model: it lacks {name!r}; use one that adapts all "
                f"{arch.blocks} blocks of this model"
            )
        if tuple(factors[name].shape) != shape:
            raise ConfigError(
                f"it is for another model: {name!r} has shape {list(factors[name].shape)}, but "
                f"the model and rank {lora.rank} want {list(shape)}"
            )
    if surplus := sorted(factors.keys() - wanted.keys()):
        raise ConfigError(
            f"it holds {surplus[0]!r}, which is no factor of LoRA; use an adapter of LoRA alone"
        )


def _head(arch: Architecture, head: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the classifier, or nothing where it is of other classes, so that it starts afresh.

    Raises:
        ConfigError: When it is not one of this model.
    """
    wanted = {name: arch.by_name[name].shape for name in classifier_names(arch)}
    if not head:
        return {}
    if head.keys() != wanted.keys():
        raise ConfigError(
            f"its classifier holds {', '.join(sorted(head))}, but the model's {', '.join(wanted)}; "
            "use one that was made for this model"
        )
    for name, shape in wanted.items():
        if tuple(head[name].shape[1:]) != shape[1:]:
            raise ConfigError(
                f"it is for another model: {name!r} has shape {list(head[name].shape)}, but the "
                f"model wants {list(shape)}"
            )
    fits = all(tuple(head[name].shape) == shape for name, shape in wanted.items())
    return head if fits else {}
