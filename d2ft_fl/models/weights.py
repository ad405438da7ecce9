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
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec

GLYPH_WEIGHTS = Path(__file__).parents[1] / "assets" / "vit_glyphs.json"


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
    if pretrained not in NO_PATHS["pretrained"] and not Path(pretrained).exists():
        raise ConfigError(
            f"weights file {pretrained!r} does not exist; use 'bundled', 'hub', 'none' or the "
            "path of a safetensors file"
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
        return safetensors.torch.load_file(spec.pretrained)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"weights file {spec.pretrained!r} is not safetensors: {first_line(error)}"
        ) from None


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
        raise ConfigError(f"bundled weights cannot be read: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
