"""Files of weights: safetensors, and the JSON in which the bundled model travels."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2ft_fl.config.run_config import NO_PATHS
from d2ft_fl.errors import ConfigError, first_line
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec
from d2ft_fl.util.strict_json import write_json

GLYPH_WEIGHTS = Path(__file__).parents[1] / "assets" / "vit_glyphs.json"
LFS_POINTER = b"version https://git-lfs"
PICKLES = (b"PK\x03\x04", b"\x80")  # of torch.save, as it is and as it was


def check_weights(model: str, pretrained: str) -> None:
    """Raise ConfigError where weights cannot be those of a model, or their file is not there.

    Args:
        model: Name of the model.
        pretrained: ``bundled``, ``hub``, ``none`` or an absolute path.
    """
    if pretrained == "bundled" and model != GLYPH_NAME:
        raise ConfigError(
            f"pretrained = 'bundled' belongs to model {GLYPH_NAME!r}, not {model!r}; "
            "use 'hub', 'none' or the path of a safetensors file"
        )
    if pretrained not in NO_PATHS["pretrained"]:
        _check_file(Path(pretrained))


def _check_file(path: Path) -> None:
    """Raise ConfigError unless a file is there and may be safetensors, by how it begins."""
    where = f"weights file {str(path)!r}"
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f"name one of its files: {', '.join(inside)}" if inside else "name a file"
        raise ConfigError(f"pretrained = {str(path)!r} is a folder; {hint}")
    if not path.exists():
        raise ConfigError(
            f"{where} does not exist; use 'bundled', 'hub', 'none' or the path of a safetensors "
            "file"
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    if start.startswith(LFS_POINTER):
        raise ConfigError(f"{where} is the pointer of a file in Git LFS: run `git lfs pull` first")
    if start.startswith(PICKLES) and start[8:9] != b"{":  # which is safetensors, its size first
        raise ConfigError(
            f"{where} is a pickle of PyTorch, which can run code when it is read: write it once as "
            "safetensors, by safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            '"weights.safetensors")'
        )


def read_weights(spec: ModelSpec) -> dict[str, Tensor]:
    """Return the weights that a specification names, as a state dict.

    Raises:
        ConfigError: When they cannot be read.
    """
    check_weights(spec.name, spec.pretrained)
    if spec.pretrained == "bundled":
        return load_weights_json(GLYPH_WEIGHTS)
    try:
        state = safetensors.torch.load_file(spec.pretrained)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"weights file {spec.pretrained!r} is not safetensors: {first_line(error)}"
        ) from None
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ConfigError(
                f"weights file {spec.pretrained!r}: {name!r} holds numbers that are not finite; "
                "use weights whose training did not diverge"
            )
    return state


def save_weights_json(path: Path, state: Mapping[str, Tensor]) -> int:
    """Write a state dict as JSON of base64 float16, which travels in a Flower app bundle."""
    tensors = {
        name: {"shape": list(t.shape), "float16": base64.b64encode(_half(t)).decode()}
        for name, t in state.items()
    }
    return path.write_text(write_json(tensors) + "\n")


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
        raise ConfigError(f"bundled weights cannot be read: {first_line(error)}") from None
