"""Building timm's plain vision transformers, and loading weights into them."""

from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from d2ft_fl.errors import ConfigError, first_line
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec
from d2ft_fl.models.timm_check import check, objection, unseen
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.models.weight_names import as_timm_names
from d2ft_fl.models.weights import read_weights
from d2ft_fl.util.spelling import meant

# The bundled model: 6 blocks x 6 heads, pretrained by experiments/pretrain_glyphs.py.
GLYPH_VIT: dict[str, Any] = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 6,
}
OVERLAY = "pretrained_cfg_overlay"  # an argument of timm.create_model

# Arguments of ``timm.create_model`` that would read files or the network.
ELSEWHERE = {
    "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
    "cache_dir",
}  # fmt: skip


def objection_to(name: str) -> str:
    """Return why a model of timm is not a plain ViT; empty where timm has no such model."""
    if not timm.is_model(name):
        return ""
    with torch.device("meta"):  # without any values
        return objection(timm.create_model(name)) or ""


def timm_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return the keyword arguments of ``timm.create_model`` that build a model.

    Raises:
        ConfigError: When ``model-args`` would take weights from elsewhere.
    """
    if odd := sorted({name for name, _ in spec.arguments} & ELSEWHERE):
        raise ConfigError(
            f"model-args sets {odd[0]!r}; which model it is, and where its weights come from, say "
            "model and pretrained"
        )
    base: dict[str, Any] = dict(GLYPH_VIT) if spec.name == GLYPH_NAME else {"model_name": spec.name}
    if spec.image_size:
        base["img_size"] = spec.image_size
    return {**base, **dict(spec.arguments), "num_classes": spec.classes}


def build_timm(spec: ModelSpec) -> TimmViT:
    """Build a vision transformer and load its weights; a classifier of another size starts afresh.

    Raises:
        ConfigError: When the model is not a plain ViT, or the weights do not fit it.
    """
    vit = check(_create(spec, pretrained=False), spec.name)
    if spec.pretrained == "hub":
        vit = check(_create(spec, pretrained=True), spec.name)
    notes = unseen(vit)
    if spec.pretrained not in ("hub", "none"):
        state, renamed = as_timm_names(read_weights(spec), vit.state_dict())
        load_weights(vit, state, spec)
        notes += renamed
    arguments = timm_arguments(spec)
    if spec.class_names:  # timm's own place for them: model.pretrained_cfg["label_names"]
        arguments[OVERLAY] = {"label_names": list(spec.class_names)}
    return TimmViT(vit.eval(), arguments, tuple(notes))


def _create(spec: ModelSpec, pretrained: bool) -> torch.nn.Module:
    """Create timm's model, with weights of the hub where asked: timm fits them to size and classes.

    Raises:
        ConfigError: When it cannot be built, or its weights cannot be had.
    """
    if pretrained and spec.name == GLYPH_NAME:
        raise ConfigError(
            f"pretrained = 'hub' has no weights of model {GLYPH_NAME!r}; use 'bundled' or 'none'"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            return timm.create_model(**timm_arguments(spec), pretrained=pretrained)
        except Exception as error:  # timm and the hub raise many kinds
            if pretrained:
                raise ConfigError(
                    f"pretrained = 'hub': the weights of model {spec.name!r} cannot be had: "
                    f"{first_line(error)}; check the name and the network, or use the path of a "
                    "safetensors file"
                ) from None
            if not timm.is_model(spec.name):
                near = meant(spec.name, timm.list_models(["vit_*", "deit*"]))
                raise ConfigError(
                    f"model {spec.name!r} is unknown to timm {timm.__version__}{near}; see "
                    "timm.list_models('vit*')"
                ) from None
            raise ConfigError(f"model {spec.name!r} cannot be built: {first_line(error)}") from None


def load_weights(model: VisionTransformer, state: dict[str, Tensor], spec: ModelSpec) -> None:
    """Copy a state dict in: position embedding resampled, classifier kept only if it fits.

    Raises:
        ConfigError: For a missing or surplus tensor, whole numbers, or a shape that disagrees.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"weights {spec.pretrained!r}: {name!r} holds {kind}, not floating-point numbers; "
                "use weights that are not quantized"
            )
    state = {name: tensor.float() for name, tensor in state.items()}
    wanted = model.state_dict()
    if {"pos_embed"} <= state.keys() & wanted.keys() and (
        state["pos_embed"].shape != wanted["pos_embed"].shape
    ):
        _resample_position(model, state, spec)
    head = {name for name in wanted if name.startswith("head.")}
    if any(name not in state or state[name].shape != wanted[name].shape for name in head):
        for name in head:
            state[name] = wanted[name]
    for name, tensor in wanted.items():
        if name not in state:
            raise ConfigError(f"weights {spec.pretrained!r} lack {name!r} of model {spec.name!r}")
        if state[name].shape != tensor.shape:
            raise ConfigError(
                f"weights {spec.pretrained!r}: {name!r} has shape {list(state[name].shape)}, "
                f"but model {spec.name!r} wants {list(tensor.shape)}"
            )
    if surplus := sorted(state.keys() - wanted.keys()):
        raise ConfigError(
            f"weights {spec.pretrained!r} hold {surplus[0]!r}, which model {spec.name!r} has not"
        )
    model.load_state_dict(state)


def _resample_position(model: VisionTransformer, state: dict[str, Tensor], spec: ModelSpec) -> None:
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    old, new = state["pos_embed"], model.state_dict()["pos_embed"]
    patches = old.shape[1] - prefix if old.dim() == 3 else 0
    fits = patches > 0 and round(patches**0.5) ** 2 == patches and old.shape[2] == new.shape[2]
    if not fits or 0 in model.patch_embed.grid_size:
        raise ConfigError(
            f"weights {spec.pretrained!r}: 'pos_embed' has shape {list(old.shape)}, which cannot "
            f"be resampled to {list(new.shape)} of model {spec.name!r}"
        )
    state["pos_embed"] = resample_abs_pos_embed(
        old, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix
    )
