"""One factory for every model: the family that knows a model's name builds its adapter."""

from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.family import Family
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.models.timm_family import TIMM

_families: list[Family] = [TIMM]


def register(family: Family) -> None:
    """Add a family; the one that was registered last is asked first."""
    _families.insert(0, family)


def family_of(name: str) -> Family:
    """Return the family that knows a model.

    Args:
        name: Of the model.

    Raises:
        ConfigError: When no family knows it.
    """
    for family in _families:
        if family.knows(name):
            return family
    names = " or ".join(family.names for family in _families)
    reasons = (family.objection(name) for family in _families)
    reason = next((f"{reason}; " for reason in reasons if reason), "")
    raise ConfigError(f"model {name!r} is not supported: {reason}use {names}")


def build_adapter(spec: ModelSpec) -> ModelAdapter:
    """Build a model, load its weights, and return its adapter; the model is in evaluation mode.

    Raises:
        ConfigError: When no family knows the model, it is not supported, or weights do not fit it.
    """
    return family_of(spec.name).build(spec)
