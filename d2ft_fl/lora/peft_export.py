"""Writes LoRA as an adapter of peft: a folder that ``PeftModel.from_pretrained`` loads.

An adapter is added to the weights W that a run began with. A run that took its first factors
out of them (FeDeRA, arXiv 2404.18848; PiSSA, arXiv 2404.02948) ends at ``W + s (B A - B0 A0)``,
which is a product of twice the rank, ``s [B, -B0] [A; A0]``: peft converts PiSSA's likewise. One
whose base weights changed themselves (FLoRA, arXiv 2409.05976, adds factors to them) ends at
``W + change``, and the change is factored by SVD, each weight with a rank of its own. Patterns of
ranks are regular expressions for peft (``get_pattern_key``).

peft takes seconds to import, so that only what writes a configuration imports it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, delta, factor_name, targeted, weights
from d2ft_fl.lora.init import singular
from d2ft_fl.lora.peft_files import PREFIX, TENSORS, classifier_names, target_pattern
from d2ft_fl.subnets.architecture import Architecture

PRECISION = 1e-7  # of a change's largest singular value: what float32 tells from nothing

Pairs = dict[str, tuple[Tensor, Tensor]]  # by weight: A [rank, in] and B [out, rank]


def write_adapter(
    folder: Path,
    arch: Architecture,
    lora: Lora,
    state: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None = None,
    base: str = "",
    changes: Mapping[str, Tensor] | None = None,
) -> int:
    """Write an adapter of the weights that a run began with; return its (largest) rank.

    Args:
        folder: Where to write it; made if it is missing.
        arch: With factors; see :func:`d2ft_fl.lora.config.with_lora`.
        lora: What was tuned, and how.
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
    tensors = {name: state[name] for name in classifier_names(arch)}
    for weight, (a, b) in pairs.items():
        tensors[factor_name(weight, "A")] = a
        tensors[factor_name(weight, "B")] = b
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


def total_changes(
    arch: Architecture,
    state: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return all that a run added, by weight: ``changed + s (B A - B0 A0)``, in float64."""
    changes = {name: change.double() for name, change in changed.items()}
    for weight, a, b in targeted(arch):
        total = delta(state[a.name], state[b.name], arch.scaling)
        if a.name in initial:
            total = total - delta(initial[a.name], initial[b.name], arch.scaling)
        changes[weight.name] = changes.get(weight.name, 0.0) + total
    return changes


def _factors(
    arch: Architecture, state: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> Pairs:
    """Return a run's factors, beside those it began with where these came out of the weights."""
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
    """Return changes as products; a targeted weight without a change gets a product of zeros."""
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
    """Return (A, B) of the smallest rank from 1, with ``scaling * B A = change`` in float32.

    A change that was had by subtracting float32 weights holds their rounding, a random matrix with
    singular values up to eps * (sqrt(out) + sqrt(in)) * rms(W). Without a cut there, every such
    change would have full rank.
    """
    u, values, v = singular(change)
    least = PRECISION * values[0]
    if weight is not None:
        noise = torch.finfo(torch.float32).eps * weight.double().square().mean().sqrt()
        least = torch.maximum(least, noise * sum(side**0.5 for side in weight.shape))
    rank = max(1, int((values > least).sum()))
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _ranks(lora: Lora, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return ranks by module as ``LoraConfig`` has them, and alphas that leave the scaling."""
    common = mode(ranks.values())
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": _alpha(lora, common),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(lora, rank) for module, rank in others.items()},
    }


def _alpha(lora: Lora, rank: int) -> float:
    """Return the alpha with which another rank has as much scaling; an int where it is whole."""
    grown = rank / lora.rank
    alpha = lora.alpha * (grown**0.5 if lora.rslora else grown)
    return int(alpha) if alpha == int(alpha) else alpha
