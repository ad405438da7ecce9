"""LoRA as an ordinary adapter of peft: a folder that ``PeftModel.from_pretrained`` loads.

adapter_model.safetensors   ``base_model.model.<module>.lora_A.weight``, its B, and the classifier
adapter_config.json         peft's ``LoraConfig``

An adapter is added to the weights W that a run began with. A run that took its first factors
out of them (FeDeRA, arXiv 2404.18848; PiSSA, arXiv 2404.02948) ends at ``W + s (B A - B0 A0)``,
which is a product of twice the rank, ``s [B, -B0] [A; A0]``: peft converts PiSSA's likewise. One
whose base weights changed themselves (FLoRA, arXiv 2409.05976, adds factors to them) ends at
``W + change``, and the change is factored by SVD, each weight with a rank of its own.

peft takes seconds to import, so that only what writes a configuration imports it. Its rules of
matching names (``peft.tuners.tuners_utils.check_target_module_exists``, ``get_pattern_key``) matter
twice: a target "proj" would match the convolution ``patch_embed.proj`` too, so that ours are whole
names, and patterns of ranks are regular expressions.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import FACTORS, Lora, delta, factor_name, targeted, weights
from d2ft_fl.subnets.architecture import Architecture

PREFIX = "base_model.model."  # peft's, before the model's own names
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PRECISION = 1e-7  # of a change's largest singular value: what float32 tells from nothing

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

Pairs = dict[str, tuple[Tensor, Tensor]]  # by weight: A [rank, in] and B [out, rank]


# -- writing ---------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    arch: Architecture,
    lora: Lora,
    state: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None = None,
    base: str = "",
    changes: Mapping[str, Tensor] | None = None,
) -> int:
    """Write an adapter of the weights that a run began with; returns its (largest) rank.

    Args:
        arch: With factors; see :func:`d2ft_fl.lora.config.with_lora`.
        state: Factors and classifier by name; base weights, where given, say what is lost in their
            rounding.
        initial: The factors that were taken out of the base weights before the run.
        base: What the adapter belongs to: a model's name, or the path of its weights.
        changes: By weight, what is to be added to it, in place of factors.
    """
    from peft import LoraConfig

    pairs = (
        _factors(arch, state, initial or {})
        if changes is None
        else _factored(arch, lora, state, changes)
    )
    tensors = {
        factor_name(weight, factor): tensor
        for weight, pair in pairs.items()
        for factor, tensor in zip(FACTORS, pair, strict=True)
    }
    tensors |= {name: state[name] for name in _classifier(arch)}
    ranks = {weight.removesuffix(".weight"): len(a) for weight, (a, _) in pairs.items()}
    config = LoraConfig(
        target_modules=target_pattern(arch, {arch.by_name[w].role.split(".")[0] for w in pairs}),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        modules_to_save=[arch.classifier],
        base_model_name_or_path=base or None,
        inference_mode=True,
        **_ranks(lora, ranks),
    )
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {PREFIX + n: t.detach().float().cpu().contiguous() for n, t in tensors.items()},
        folder / TENSORS,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    return max(ranks.values())


def target_pattern(arch: Architecture, targets: Iterable[str]) -> str:
    r"""A regular expression of the modules of some targets: ``blocks\.\d+\.(attn\.qkv|...)``."""
    wanted, (start, _) = set(targets), weights(arch)[0].name.split("0", 1)
    of_first = {p.role.split(".")[0]: p for p in weights(arch) if p.block == 0}
    names = [
        re.escape(p.name.removeprefix(f"{start}0.").removesuffix(".weight"))
        for target, p in of_first.items()
        if target in wanted
    ]
    return rf"{re.escape(start)}\d+\.({'|'.join(names)})"


def total_changes(
    arch: Architecture,
    state: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """By weight, all that a run added to it: ``changed + s (B A - B0 A0)``, in double precision."""
    found = {name: change.double() for name, change in changed.items()}
    for weight, a, b in targeted(arch):
        total = delta(state[a.name], state[b.name], arch.scaling)
        if a.name in initial:
            total = total - delta(initial[a.name], initial[b.name], arch.scaling)
        found[weight.name] = found.get(weight.name, 0.0) + total
    return found


def _factors(
    arch: Architecture, state: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> Pairs:
    """A run's factors beside those it began with; see the module's docstring."""
    pairs = {}
    for weight, a, b in targeted(arch):
        pair = state[a.name], state[b.name]
        if a.name in initial:
            pair = (
                torch.cat([pair[0], initial[a.name].to(pair[0])]),
                torch.cat([pair[1], -initial[b.name].to(pair[1])], dim=1),
            )
        pairs[weight.name] = pair
    return pairs


def _factored(
    arch: Architecture,
    lora: Lora,
    state: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
) -> Pairs:
    """Changes as products. A weight of these targets that has no change gets a product of zeros."""
    known = {p.name: p for p in weights(arch)}
    if surplus := sorted(changes.keys() - known.keys()):
        raise ConfigError(
            f"a change of {surplus[0]!r} cannot be part of an adapter; only those of "
            f"{', '.join(arch.possible_targets)} of a block can: export the whole model instead"
        )
    targets = {known[name].role.split(".")[0] for name in changes} | set(lora.targets_in(arch))
    return {
        p.name: _product(changes.get(p.name, torch.zeros(p.shape)), state.get(p.name), lora.scaling)
        for p in known.values()
        if p.role.split(".")[0] in targets
    }


def _product(change: Tensor, weight: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """(A, B) of the smallest rank, at least 1, with ``scaling * B A = change`` in float32.

    A change that was had by subtracting float32 weights holds their rounding, a random matrix with
    singular values up to eps * (sqrt(out) + sqrt(in)) * rms(W). Without a cut there, every such
    change would have full rank.
    """
    u, values, v = torch.linalg.svd(change.double(), full_matrices=False)
    least = PRECISION * values[0]
    if weight is not None:
        noise = torch.finfo(torch.float32).eps * weight.double().square().mean().sqrt()
        least = torch.maximum(least, noise * sum(side**0.5 for side in weight.shape))
    rank = max(1, int((values > least).sum()))
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _ranks(lora: Lora, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Ranks by module as ``LoraConfig`` spells them; alphas grow along, so that scaling stays."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": _alpha(lora, common),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(lora, rank) for module, rank in others.items()},
    }


def _alpha(lora: Lora, rank: int) -> float:
    """The alpha with which another rank has the same scaling; whole numbers as such, as in peft."""
    grown = rank / lora.rank
    alpha = lora.alpha * (grown**0.5 if lora.rslora else grown)
    return int(alpha) if alpha == int(alpha) else alpha


def _classifier(arch: Architecture) -> list[str]:
    return [p.name for p in arch.parameters if arch.is_classifier(p)]


# -- reading ---------------------------------------------------------------------------------


def read_adapter(folder: Path, arch: Architecture) -> tuple[Lora, dict[str, Tensor]]:
    """What an adapter tunes, and its tensors by our names, in float32, to start a run from.

    The classifier is among them where the adapter has one of as many classes as the model.

    Args:
        arch: Of the model, without factors.

    Raises:
        ConfigError: When it cannot be read, is more than LoRA of the products of a
            block that may have factors, or belongs to another model.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder)
        _check_config(config, arch.classifier)
        found = _read_tensors(folder)
        prefix = f"{arch.classifier}."
        head = {n: t for n, t in found.items() if n.startswith(prefix) and ".lora_" not in n}
        factors = {n: t for n, t in found.items() if n not in head}
        lora = _lora(config, arch, _modules(arch, factors))
        _check_shapes(arch, lora, factors)
        for name, tensor in found.items():
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
    """The tensors in float32, without peft's prefix."""
    try:
        tensors = safetensors.torch.load_file(folder / TENSORS)
    except FileNotFoundError:
        raise ConfigError(f"it lacks {TENSORS!r}; save the adapter again, as safetensors") from None
    except (SafetensorError, OSError) as error:
        text = str(error).splitlines()[0]
        raise ConfigError(
            f"{TENSORS!r} is not safetensors: {text}; save the adapter again"
        ) from None
    return {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}


def _check_config(config: Mapping[str, Any], classifier: str) -> None:
    """Raises ConfigError unless a configuration is of plain LoRA."""
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
    if (start := config.get("init_lora_weights", True)) not in INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights = {start!r} changes the base weights; save it with "
            "path_initial_model_for_weight_conversion, or use one of "
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
    """Target by module, of every block, of what the factors belong to."""
    known = {p.name.removesuffix(".weight"): p.role.split(".")[0] for p in weights(arch)}
    possible = arch.possible_targets
    pattern = target_pattern(arch, possible)
    anywhere, found = re.compile(pattern), set()
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
        found.add(known[module])
    if not found:
        raise ConfigError("it holds no factors of LoRA; use an adapter that was trained")
    return {module: target for module, target in known.items() if target in found}


def _lora(config: Mapping[str, Any], arch: Architecture, modules: Mapping[str, str]) -> Lora:
    """The specification of a configuration, peft's defaults where it says nothing."""
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
    most = Lora(targets=targets).most_rank(arch)
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
    """The values of an option over modules: the first pattern that matches decides, as in peft."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{pattern} = {patterns!r} is not a table; save the adapter again")
    try:
        known = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
    except re.error as error:
        raise ConfigError(f"{pattern} holds no regular expression: {error}") from None
    found = set()
    for module in modules:
        hits = (value for key, value in known if key.match(module))
        found.add(_number(next(hits, config.get(option, 8)), option))
    return found


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
    """Raises ConfigError unless there are both factors of every module, of the shapes they need."""
    wanted = {
        factor_name(p.name, factor): (lora.rank, p.shape[1])
        if factor == "A"
        else (p.shape[0], lora.rank)
        for p in weights(arch)
        if p.role.split(".")[0] in lora.targets_in(arch)
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
    """The classifier, unless it is of other classes: like that of other weights, it starts afresh.

    Raises:
        ConfigError: When it is not one of this model.
    """
    wanted = {name: arch.by_name[name].shape for name in _classifier(arch)}
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
