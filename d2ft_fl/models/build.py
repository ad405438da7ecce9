"""Building, loading and exporting models."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from d2ft_fl.errors import ConfigError
from d2ft_fl.models import timm_vit
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec

GLYPH_WEIGHTS = Path(__file__).parents[1] / "assets" / "vit_glyphs.json"
PREFIXES = ("vit_", "deit_")


def build_model(spec: ModelSpec) -> VisionTransformer:
    """Build the model and load its weights; a classifier of another size starts afresh.

    Raises:
        ConfigError: When the model is not a plain ViT, or the weights do not fit it.
    """
    if spec.name != GLYPH_NAME and not spec.name.startswith(PREFIXES):
        raise ConfigError(
            f"model {spec.name!r} is not supported: use {GLYPH_NAME!r} or a plain timm ViT "
            "(vit_* or deit_*)"
        )
    vit = timm_vit.check(_create(spec, pretrained=False), spec.name)
    if spec.pretrained == "hub":
        vit = timm_vit.check(_create(spec, pretrained=True), spec.name)
    elif spec.pretrained != "none":
        load_weights(vit, read_weights(spec), spec)
    return vit.eval()


def _create(spec: ModelSpec, pretrained: bool) -> torch.nn.Module:
    """timm's model, its weights from the hub where asked for; timm fits them to size and classes.

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
            return timm.create_model(**spec.timm_arguments(), pretrained=pretrained)
        except Exception as error:  # timm and the hub raise many kinds
            if pretrained:
                raise ConfigError(
                    f"pretrained = 'hub': the weights of model {spec.name!r} cannot be had: "
                    f"{_first(error)}; check the name and the network, or use the path of a "
                    "safetensors file"
                ) from None
            raise ConfigError(f"model {spec.name!r} cannot be built: {_first(error)}") from None


def read_weights(spec: ModelSpec) -> dict[str, Tensor]:
    """The weights that a specification names, as a state dict.

    Raises:
        ConfigError: When they cannot be read.
    """
    if spec.pretrained == "bundled":
        if spec.name != GLYPH_NAME:
            raise ConfigError(
                f"pretrained = 'bundled' belongs to model {GLYPH_NAME!r}, not {spec.name!r}; "
                "use 'hub', 'none' or the path of a safetensors file"
            )
        return load_weights_json(GLYPH_WEIGHTS)
    try:
        return safetensors.torch.load_file(spec.pretrained)
    except FileNotFoundError:
        raise ConfigError(
            f"weights file {spec.pretrained!r} does not exist; use 'bundled', 'hub', 'none' or the "
            "path of a safetensors file"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"weights file {spec.pretrained!r} is not safetensors: {_first(error)}"
        ) from None


def load_weights(model: VisionTransformer, state: dict[str, Tensor], spec: ModelSpec) -> None:
    """Copy a state dict in: position embedding resampled, classifier kept only if it fits.

    Raises:
        ConfigError: For a missing or surplus tensor, or a shape that disagrees.
    """
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


def save_weights_json(path: Path, state: Mapping[str, Tensor]) -> int:
    """Write a state dict as JSON of base64 float16, which travels in a Flower app bundle."""
    tensors = {
        name: {"shape": list(t.shape), "float16": base64.b64encode(_half(t)).decode()}
        for name, t in state.items()
    }
    return path.write_text(json.dumps(tensors) + "\n")


def _half(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().astype("<f2").tobytes()


def load_weights_json(path: Path) -> dict[str, Tensor]:
    """Read what :func:`save_weights_json` wrote, as float32."""
    try:
        return {
            name: torch.from_numpy(
                np.frombuffer(base64.b64decode(entry["float16"]), dtype="<f2")
                .astype(np.float32)
                .reshape(entry["shape"])
            )
            for name, entry in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, KeyError, binascii.Error) as error:
        raise ConfigError(f"bundled weights cannot be read: {_first(error)}") from None


def export(folder: Path, weights: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Write ``model.safetensors``, and ``model.json``: how ``timm.create_model`` builds it."""
    safetensors.torch.save_file(
        {n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors"
    )
    (folder / "model.json").write_text(json.dumps(spec.timm_arguments(), indent=2) + "\n")


def _first(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
