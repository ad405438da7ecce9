"""One factory for every model: the family that knows a model's name builds its adapter."""

from collections.abc import Callable
from dataclasses import dataclass

from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec


@dataclass(frozen=True)
class Family:
    """Models of one library that one adapter serves.

    Attributes:
        names: What to write as ``model``, for people: part of an error's text.
        knows: Whether a model of this name is of the family.
        build: Builds the model that a specification names, loads its weights, and returns its
            adapter, or raises ConfigError. It is to import the library it needs itself, so that
            other families do without.
    """

    names: str
    knows: Callable[[str], bool]
    build: Callable[[ModelSpec], ModelAdapter]


_families: list[Family] = []


def register(family: Family) -> None:
    """Add a family; the one that was registered last is asked first."""
    _families.insert(0, family)


def build_adapter(spec: ModelSpec) -> ModelAdapter:
    """Build a model, load its weights, and return its adapter; the model is in evaluation mode.

    Raises:
        ConfigError: When no family knows the model, it is not supported, or weights do not fit it.
    """
    for family in _families:
        if family.knows(spec.name):
            return family.build(spec)
    names = " or ".join(family.names for family in _families)
    raise ConfigError(f"model {spec.name!r} is not supported: use {names}")


def _build_timm(spec: ModelSpec) -> ModelAdapter:
    from d2ft_fl.models.timm_build import build_timm

    return build_timm(spec)


register(
    Family(
        names=f"{GLYPH_NAME!r} or a plain timm ViT (vit_* or deit_*)",
        knows=lambda name: name == GLYPH_NAME or name.startswith(("vit_", "deit_")),
        build=_build_timm,
    )
)
