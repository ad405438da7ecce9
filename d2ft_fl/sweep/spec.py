"""The file of a sweep: what varies, and how the trials are run.

    name = "digits"                 # of the folder; by default the file's
    config = "default.toml"         # a file of options, or several; relative to this one
    seeds = 5                       # short for [0, 1, 2, 3, 4]; every setting is run with each

    [base]                          # options of all trials
    rounds = 10

    [grid]                          # every combination of these values
    strategy = ["d2ft", "random"]

    [search]                        # random draws, each with the whole grid
    samples = 20
    draw-seed = 0                   # another number draws others
    lr = { min = 1e-4, max = 1e-2, log = true }
    batch-size = { choice = [8, 16, 32] }

    [[group]]                       # more trials, with base, grid, search and seeds of their own
    grid.strategy = ["fedavg"]

    [run]
    at-once = 4                     # trials; by default one a core
    address = ""                    # of a Ray cluster; by default this machine
    asha = { grace-rounds = 2, reduction-factor = 3 }   # stop early what is behind; or true
    keep-models = false             # the final models too

``grid``, ``search`` and ``seeds`` outside of groups make up the first group; a file without any is
one trial, and a file with groups need not have them. What varies wins over a base, a group's base
over the common one, and that over the files of ``config``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2ft_fl.config.renamed import first_name
from d2ft_fl.sweep.draws import Draw
from d2ft_fl.util.toml_lines import Locator


@dataclass(frozen=True)
class Group:
    """Trials that vary together.

    Attributes:
        place: Where its tables stand in the file.
        base: Options of its own, over the common ones.
        grid: Values by option.
        search: Where draws come from, by option.
        samples: How many draws; 0 without a search.
        seeds: What ``seed`` is; none where it does not vary this way.
    """

    place: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    search: Mapping[str, Draw] = field(default_factory=dict)
    samples: int = 0
    draw_seed: int = 0
    seeds: tuple[int, ...] = ()

    def varied(self) -> list[str]:
        """Return the options in which its trials differ, from one another or from other groups'."""
        keys = [*self.base, *self.grid, *self.search]
        return keys + ["seed"] * bool(self.seeds)


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934) by the primary metric.

    Attributes:
        grace_rounds: Rounds that every trial may run; the first rung.
        reduction_factor: A trial goes on from a rung if it is among the best of so many, and the
            next rung is so many times as far.
    """

    grace_rounds: int = 2
    reduction_factor: float = 3.0


@dataclass(frozen=True)
class RunOptions:
    """How trials are run.

    Attributes:
        at_once: Trials; 0 takes one a core.
        address: Of a Ray cluster; empty is this machine.
        asha: Early stopping, where wanted.
        keep_models: Whether final models stay.
    """

    at_once: int = 0
    address: str = ""
    asha: Asha | None = None
    keep_models: bool = False


@dataclass(frozen=True)
class Sweep:
    """A sweep as asked for, its paths absolute.

    Attributes:
        base: Options that all trials have in common.
        at: Names lines of its file.
        given: Where each option of ``base`` was given, for messages.
    """

    name: str
    base: Mapping[str, Any]
    groups: tuple[Group, ...]
    run: RunOptions
    at: Locator = field(compare=False)
    given: Mapping[str, str] = field(compare=False)


def place_name(at: Locator, place: tuple[str, ...]) -> str:
    """Write a place in a file for people: ``mine.toml:3: grid.lr``.

    Args:
        at: Finds lines of the file.
        place: Tables and key, options by their present names; the file may have an old one.
    """
    written = place if at.has(*place) else tuple(map(first_name, place))
    return f"{at(*written)}: {'.'.join(part for part in place if not part.isdecimal())}"
