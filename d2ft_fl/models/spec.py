"""Which model a run builds."""

from dataclasses import dataclass
from typing import Any

GLYPH_NAME = "vit_glyphs"  # the bundled model


@dataclass(frozen=True)
class ModelSpec:
    """What to build.

    Attributes:
        name: ``vit_glyphs`` or the name of a plain timm ViT.
        arguments: More keyword arguments of the library's constructor.
        pretrained: Weights: ``bundled``, ``hub``, ``none``, or the path of a safetensors file.
        image_size: Side in pixels; 0 keeps the model's own.
        classes: Outputs of the classifier.
        seed: Seed of everything that no weights file sets.
        class_names: Names of the classes by their numbers, for who loads the model; or empty.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    pretrained: str
    image_size: int
    classes: int
    seed: int
    class_names: tuple[str, ...] = ()
