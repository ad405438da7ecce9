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

from d2ft_fl.budgets import LIMITS
from d2ft_fl.errors import ConfigError
from d2ft_fl.plugins import load_module
from d2ft_fl.scores import KINDS

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


_HEAD = """# Methods

Every method runs on the one engine. A strategy decides which client runs which heads, a way of
tuning (whole, or LoRA) how they are trained, the server's optimiser how averaged updates are
applied. So methods that were published apart are compared under the same budgets, enforced and
measured, with the same data and seeds.

This page is what `d2ft strategies --markdown` prints: each strategy's own words. A layer is all
heads of a block.

"""
_TAIL = """# Methods that are options

LoRA methods were published with everyone training everything: `strategy = "fedavg"`. Any other strategy
combines with them too.

| method | options |
| --- | --- |
| FedProx (Li et al., MLSys 2020, arXiv 1812.06127) | `proximal = 0.01`, with any strategy |
| FedFT-EDS (Shi et al., 2024, arXiv 2501.00170) | `strategy = "caff"`, `data-share = 0.5`, `data-selection = "entropy"`: half of the examples, those of highest entropy under the global model, whose forward pass over all of them is charged. The paper trains a fixed upper part of the model. |
| FedAvgM (Hsu et al., 2019, arXiv 1909.06335) | `server-optimizer = "fedavgm"`, moments per slice |
| FedAdam, FedYogi (Reddi et al., ICLR 2021, arXiv 2003.00295) | `server-optimizer = "fedadam"` or `"fedyogi"`, `server-lr = 0.01` or so; moments per slice, no bias correction, as in the paper |
| FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644) | `tuning = "lora"` |
| FeDeRA (Yan et al., 2024, arXiv 2404.18848) | `tuning = "lora"`, `lora-init = "federa"` |
| SLoRA (Babakniya et al., 2023, arXiv 2308.06522) | `tuning = "lora"`, `slora-rounds = 3` |
| RoLoRA (Chen et al., 2024, arXiv 2409.02346) | `tuning = "lora"`, `lora-aggregation = "alternate"` |
| FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313) | `tuning = "lora"`, `lora-aggregation = "freeze-a"` |
| FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976) | `tuning = "lora"`, `lora-aggregation = "stack"` |
| FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505) | `tuning = "lora"`, `lora-aggregation = "product"`, `lora-ranks = "2, 4"` |
"""  # noqa: E501


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


def to_markdown(found: list[Method]) -> str:
    """A page of strategies."""
    rows = [f"| [`{m.name}`](#{m.name}) | {m.summary} | {m.kept} |" for m in found]
    sections = [
        f"## {m.name}\n\n{m.text}\n\n" + (f"*{m.paper}*\n\n" if m.paper else "") for m in found
    ]
    return (
        _HEAD
        + "\n".join(["| strategy | | budgets kept |", "| --- | --- | --- |", *rows])
        + ("\n\n" + "".join(sections) + _TAIL)
    )
