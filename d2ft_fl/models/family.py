"""What a library's models need of a file beside their adapter: the :class:`Family`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """Models of one library that one adapter serves.

    Functions are to import the library themselves, so that other families do without.

    Attributes:
        names: What to write as ``model``, for people: part of an error's text.
        library: What ``d2ft export --format`` calls whole weights as the library loads them.
        knows: Whether a model of this name is of the family.
        build: Builds the model that a specification names, loads its weights, and returns its
            adapter, or raises ConfigError.
        read: What ``ModelAdapter.export`` wrote into ``model.json`` -> the arguments of the model's
            specification, and its classes; raises KeyError, TypeError or ValueError where that is
            not what it writes.
        load: A folder with what ``ModelAdapter.export`` wrote -> lines of Python after which
            ``model`` is the library's model with these weights.
        create: A specification with weights of the hub -> a line of Python that imports the
            library, and an expression that is the library's model with the hub's weights.
        objection: Why a model that the family does not know is none of its own: of the library's
            other models, what in them does not divide into heads; empty for other names.
    """

    names: str
    library: str
    knows: Callable[[str], bool]
    build: Callable[[ModelSpec], ModelAdapter]
    read: Callable[[Mapping[str, Any]], tuple[dict[str, Any], int]]
    load: Callable[[Path], tuple[str, ...]]
    create: Callable[[ModelSpec], tuple[str, str]]
    objection: Callable[[str], str] = lambda name: ""
