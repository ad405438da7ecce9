"""timm's plain vision transformers as a family; timm is imported when a model is built."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.models.family import Family
from d2ft_fl.models.spec import GLYPH_NAME, ModelSpec


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Have a module look as if it was not installed, while others are imported that can do without.

    timm imports Weights & Biases where that is there: 0.4 s and 15 MB in every worker process.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _knows(name: str) -> bool:
    return name == GLYPH_NAME or name.startswith(("vit_", "deit"))


def _objection(name: str) -> str:
    """Return what in a model of timm is not a plain ViT's; empty where timm has no such model."""
    with _without("wandb"):
        from d2ft_fl.models.timm_build import objection_to

    return objection_to(name)


def _build(spec: ModelSpec) -> ModelAdapter:
    with _without("wandb"):
        from d2ft_fl.models.timm_build import build_timm

    return build_timm(spec)


def _read(entries: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Take the arguments of ``timm.create_model`` apart."""
    arguments = dict(entries)
    classes = int(arguments.pop("num_classes"))
    arguments.pop("pretrained_cfg_overlay", None)  # names of classes
    del arguments["model_name"]  # of the bundled model another than the specification's
    return arguments, classes


def _load(folder: Path) -> tuple[str, ...]:
    tensors, arguments = (str(folder / name) for name in ("model.safetensors", "model.json"))
    return (
        "import json, timm, safetensors.torch; "
        f"model = timm.create_model(**json.load(open({arguments!r})))",
        f"model.load_state_dict(safetensors.torch.load_file({tensors!r}))",
    )


def _create(spec: ModelSpec) -> tuple[str, str]:
    with _without("wandb"):
        from d2ft_fl.models.timm_build import timm_arguments

    arguments = ", ".join(f"{k}={v!r}" for k, v in timm_arguments(spec).items())
    return "import timm", f"timm.create_model({arguments}, pretrained=True)"


TIMM = Family(
    names=f"{GLYPH_NAME!r} or a plain timm ViT (vit_* or deit*)",
    library="timm",
    knows=_knows,
    build=_build,
    read=_read,
    load=_load,
    create=_create,
    objection=_objection,
)
