"""Names that a checkpoint's tensors have elsewhere, as those of timm's vision transformers.

Training code puts a wrapper's name before all of them (``module.`` of DataParallel, ``_orig_mod.``
of torch.compile, ``model.`` or ``backbone.`` of a trainer), and Hugging Face's ViT and DeiT have
names of their own, with queries, keys and values apart.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
_BASE = r"^(?:vit\.|deit\.)?"
_BLOCK = _BASE + r"(?:encoder\.layer|layers)\.(\d+)\."
# Hugging Face's names, those of files and those of modules, and what timm calls each.
_RENAMED = {
    _BASE + r"embeddings\.cls_token$": "cls_token",
    _BASE + r"embeddings\.distillation_token$": "dist_token",
    _BASE + r"embeddings\.position_embeddings$": "pos_embed",
    _BASE + r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    _BLOCK + r"layernorm_before\.": r"blocks.\1.norm1.",
    _BLOCK + r"layernorm_after\.": r"blocks.\1.norm2.",
    _BLOCK + r"attention\.(?:output\.dense|o_proj)\.": r"blocks.\1.attn.proj.",
    _BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.": r"blocks.\1.mlp.fc1.",
    _BLOCK + r"(?:output\.dense|mlp\.fc2)\.": r"blocks.\1.mlp.fc2.",
    _BASE + r"layernorm\.": "norm.",
    r"^(?:cls_)?classifier\.": "head.",
    r"^distillation_classifier\.": "head_dist.",
}
_PART = re.compile(
    _BLOCK + r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)$"
)
_PARTS = {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2}
_UNUSED = re.compile(_BASE + r"pooler\.")  # a layer behind ViTModel that its classifiers go without


def as_timm_names(
    state: Mapping[str, Tensor], wanted: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a checkpoint under a model's names, as far as it has them, and lines on what was done.

    Args:
        state: Tensors by their names in the file.
        wanted: The names that the model has.
    """
    notes = []
    state, stripped = _unwrapped(state, wanted)
    if stripped:
        notes.append(f"names of weights begin with {' and '.join(map(repr, stripped))}: left out")
    if any("embeddings.patch_embeddings.projection." in name for name in state):
        state = _of_hugging_face(state)
        notes.append("names of weights are those of Hugging Face's ViT: renamed to timm's")
    return dict(state), notes


def _unwrapped(
    state: Mapping[str, Tensor], wanted: Collection[str]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Take wrappers' names off; return also which."""
    stripped: dict[str, None] = {}
    names = {}
    for name in state:
        short = name
        while short not in wanted and (w := next(filter(short.startswith, WRAPPERS), None)):
            short = short.removeprefix(w)
            stripped[w] = None
        names[name] = short
    if len(set(names.values())) < len(names):  # two of them would become one
        return state, []
    return {names[name]: tensor for name, tensor in state.items()}, list(stripped)


def _of_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if part := _PART.match(name):
            block, role, kind = part.groups()
            parts.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[_PARTS[role]] = tensor
        elif not _UNUSED.match(name):
            out[_renamed(name)] = tensor
    for name, tensors in parts.items():
        if len(tensors) == len(set(_PARTS.values())):
            out[name] = torch.cat([tensors[place] for place in sorted(tensors)])
    return out


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED.items():
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name
