"""What strategies say of themselves: where a method comes from, and which budgets it keeps.

A strategy is a module with ``schedule(round)``. It may also say

    PAPER    "Authors, Title, venue and year, address" of what it follows
    KEEPS    the budgets that it promises to keep, of ``budgets.LIMITS``; all, if it says nothing
    SCORES   the kinds of scores that it looks at; those that are configured, if it says nothing
    STAGED   whether it divides a run into stages, with ``round.stage``
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from d2ft_fl.budgets.budget import LIMITS
from d2ft_fl.errors import ConfigError
from d2ft_fl.planning.importance import KINDS
from d2ft_fl.util.plugins import load_module

STRATEGIES = (
    "d2ft",
    "d2ft-paper",
    "random",
    "fedavg",
    "fewer-examples",
    "fewer-tokens",
    "accumulate",
    "linear-probe",
    "caff",
    "slt",
    "progfed",
    "cyclic",
    "depthfl",
    "heterofl",
    "fjord",
    "fedrolex",
    "federated-dropout",
    "pruning-magnitude",
    "pruning-gradient",
    "moe",
)


@dataclass(frozen=True)
class Method:
    """What a strategy says of itself.

    Attributes:
        name: As it is configured. paper: What it follows; empty if nothing.
        keeps: Budgets that it promises to keep, of ``LIMITS``.
        scores: Kinds of scores that it looks at; None for those that are configured.
        staged: Whether its rounds depend on how many there are, unless ``stage-rounds`` says it.
        text: What it does, and where it deviates: its docstring.
    """

    name: str
    paper: str
    keeps: tuple[str, ...]
    scores: tuple[str, ...] | None
    text: str
    staged: bool = False

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return self.text.split("\n")[0]

    @property
    def kept(self) -> str:
        """The budgets that it keeps, in words."""
        if self.keeps_budgets:
            return "all"
        return ", ".join(limit.replace("_", " ") for limit in self.keeps) or "none"

    @property
    def keeps_budgets(self) -> bool:
        """Whether it promises to keep every budget."""
        return set(self.keeps) == set(LIMITS)

    def to_json(self) -> Mapping[str, Any]:
        """As a mapping."""
        return {
            "name": self.name,
            "paper": self.paper,
            "keeps_budgets": self.keeps_budgets,
            "keeps": list(self.keeps),
            "text": self.text,
        }


def load_strategy(name: str) -> ModuleType:
    """A strategy's module, by name or dotted path.

    Raises:
        ConfigError: When there is none such, or it is not one.
    """
    module = load_module("strategies", name, "strategy", STRATEGIES)
    if not callable(getattr(module, "schedule", None)):
        raise ConfigError(f"strategy = {name!r} has no function schedule(round)")
    method_of(module, name)
    return module


def method_of(module: Any, name: str) -> Method:
    """What a strategy's module says.

    Raises:
        ConfigError: When it names budgets or scores that there are not.
    """
    keeps = tuple(getattr(module, "KEEPS", LIMITS))
    scores = getattr(module, "SCORES", None)
    for what, said, known in (("KEEPS", keeps, LIMITS), ("SCORES", scores or (), KINDS)):
        for one in said:
            if one not in known:
                raise ConfigError(
                    f"strategy = {name!r}: {what} names {one!r}; use of {', '.join(known)}"
                )
    return Method(
        name,
        " ".join(getattr(module, "PAPER", "").split()),
        tuple(limit for limit in LIMITS if limit in keeps),
        None if scores is None else tuple(scores),
        (module.__doc__ or "").strip(),
        bool(getattr(module, "STAGED", False)),
    )


def find(name: str) -> Method:
    """A strategy by name.

    Raises:
        ConfigError: See :func:`load_strategy`.
    """
    return method_of(load_strategy(name), name)


def methods() -> list[Method]:
    """The strategies that come with the project, in the order in which they are listed."""
    return [find(name) for name in STRATEGIES]
