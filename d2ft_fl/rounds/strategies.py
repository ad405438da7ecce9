"""Strategies decide which client runs what in a round.

A strategy is written as a module with a function ``schedule(context)`` and up to four constants:

``PAPER``
    "Authors, Title, venue and year, address" of what the strategy follows.
``KEEPS``
    The budgets that it promises to keep, of :data:`~d2ft_fl.budgets.budget.LIMITS`; by default all.
``SCORES``
    The kinds of importance scores that it reads; by default the configured ones.
``STAGED``
    Whether it divides a run into stages, with ``context.stage``.

:func:`load_strategy` makes a :class:`Strategy` of such a module, the only form in which other code
knows strategies. :func:`declared_strategy` makes one of a built-in module that is read and not
imported, for a list: a strategy's imports bring PyTorch in. So constants of built-in strategies are
literals.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from d2ft_fl.budgets.budget import LIMITS
from d2ft_fl.config.choices import SCORES
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.plugins import load_module, source_of

if TYPE_CHECKING:
    from d2ft_fl.planning.assignment import Assignment

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
CONSTANTS = ("PAPER", "KEEPS", "SCORES", "STAGED")


@dataclass(frozen=True)
class Strategy:
    """Decides which client runs what, and declares what it needs and promises.

    Attributes:
        name: The strategy as it is configured.
        schedule: Called once a round on the server, with a
            :class:`~d2ft_fl.rounds.context.Round`, before anything is sent. Returns exactly one
            :class:`~d2ft_fl.planning.assignment.Assignment` for each of ``context.clients``, in any
            order. It may rely on clients being sorted by number, on budgets being resolved to
            amounts, and on ``context.scores`` of the kinds in :attr:`scores`. It must depend on
            nothing but ``context`` and ``context.generator``: a resumed run calls it again and
            expects equal answers. Whatever it raises ends the run with one line that names the
            strategy and the round. Under differential privacy it also plans for clients that are
            not drawn afterwards.
        paper: The publication that it follows; empty if there is none.
        keeps: The budgets, in the order of :data:`~d2ft_fl.budgets.budget.LIMITS`, that every
            assignment keeps. The server checks them after each call of :attr:`schedule`, clients
            check them again before they train.
        scores: The kinds of importance scores that it reads, which decide what clients measure.
            None stands for ``backward-score`` and ``forward-score``.
        staged: Whether its rounds depend on how many rounds a run has. With ``stage-rounds`` above
            0 they do not.
        text: What it does, and where it deviates from the paper: the module's docstring.
    """

    name: str
    schedule: Callable[..., list["Assignment"]]
    paper: str = ""
    keeps: tuple[str, ...] = LIMITS
    scores: tuple[str, ...] | None = None
    staged: bool = False
    text: str = ""

    @property
    def summary(self) -> str:
        """The first line of :attr:`text`."""
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
        """Return what ``d2ft strategies --json`` prints of the strategy."""
        return {
            "name": self.name,
            "paper": self.paper,
            "keeps_budgets": self.keeps_budgets,
            "keeps": list(self.keeps),
            "text": self.text,
        }


def load_strategy(name: str) -> Strategy:
    """Load a strategy by its name, or by the dotted path of a module.

    Args:
        name: One of :data:`STRATEGIES`, or a dotted path.

    Raises:
        ConfigError: When there is no such module, or it is not a strategy.
    """
    return strategy_of(load_module("strategies", name, "strategy", STRATEGIES), name)


def strategy_of(module: Any, name: str) -> Strategy:
    """Make a strategy of a module.

    Args:
        module: An object with ``schedule`` and the constants; see this module's docstring.
        name: The strategy as it is configured, for messages.

    Raises:
        ConfigError: When there is no function ``schedule``, or when the constants name budgets or
            scores that do not exist.
    """
    schedule = getattr(module, "schedule", None)
    if not callable(schedule):
        raise ConfigError(f"strategy = {name!r} has no function schedule(context)")
    scores = getattr(module, "SCORES", None)
    keeps = _known(name, "KEEPS", getattr(module, "KEEPS", LIMITS), LIMITS)
    return Strategy(
        name=name,
        schedule=schedule,
        paper=" ".join(getattr(module, "PAPER", "").split()),
        keeps=tuple(limit for limit in LIMITS if limit in keeps),
        scores=None if scores is None else _known(name, "SCORES", scores, SCORES),
        staged=bool(getattr(module, "STAGED", False)),
        text=(module.__doc__ or "").strip(),
    )


def _known(name: str, constant: str, values: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values of a strategy's constant, once all of them are allowed."""
    for value in values:
        if value not in allowed:
            raise ConfigError(
                f"strategy = {name!r}: {constant} names {value!r}; use of {', '.join(allowed)}"
            )
    return tuple(values)


def declared_strategy(name: str) -> Strategy:
    """Read what a built-in strategy declares; its module is imported when it first schedules.

    Args:
        name: One of :data:`STRATEGIES`.
    """
    tree = ast.parse(source_of("strategies", name))
    constants = {
        target.id: ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in CONSTANTS
    }

    def schedule(context: Any) -> list["Assignment"]:
        return load_strategy(name).schedule(context)

    module = SimpleNamespace(**constants, schedule=schedule, __doc__=ast.get_docstring(tree))
    return strategy_of(module, name)


def builtin_strategies() -> list[Strategy]:
    """Return what the built-in strategies declare, in the order in which they are listed."""
    return [declared_strategy(name) for name in STRATEGIES]
