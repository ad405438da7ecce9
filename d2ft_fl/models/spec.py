"""Which model a run builds."""

from dataclasses import dataclass
from typing import Any

GLYPH_NAME = "vit_glyphs"


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


@dataclass(frozen=True)
class ModelSpec:
    """What to build.

    Attributes:
        name: ``vit_glyphs`` or the name of a plain timm ViT.
        arguments: More keyword arguments of ``timm.create_model``.
        pretrained: Weights: ``bundled``, ``hub``, ``none``, or the path of a safetensors file.
        image_size: Side in pixels; 0 keeps the model's own.
        classes: Outputs of the classifier.
        seed: Seed of everything that no weights file sets.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    pretrained: str
    image_size: int
    classes: int
    seed: int

    def timm_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``timm.create_model`` that build this model."""
        base: dict[str, Any] = (
            dict(GLYPH_VIT) if self.name == GLYPH_NAME else {"model_name": self.name}
        )
        if self.image_size:
            base["img_size"] = self.image_size
        return {**base, **dict(self.arguments), "num_classes": self.classes}
