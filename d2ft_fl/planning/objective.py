"""The planner's objective: utilities of plans, options of subnets, and their prices.

A subnet chooses in how many of the round's slots it runs FULL (a), FROZEN (z) and FORWARD_ONLY (b),
a + z + b at most the number of slots; which slots those are rotates from subnet to subnet, so that
the work of a slot is even. One slot gives the four operations. Utilities add up over subnets,

    utility(a, z, b) = [ backward a + forward_weight forward (a + z + b)
                         + frozen_weight forward (a + z) ] / slots

Under LoRA a subnet also chooses among the ranks r that are offered, R the largest: training then
has utility ``backward a (r / R) ** rank_exponent``. That is a choice, not a measurement: with an
exponent of 0 all ranks have the same utility, with 1 it is in proportion.

``frozen_weight = 0`` is D2FT: then FROZEN has no more utility than FORWARD_ONLY and is not offered.
Below the lowest block that trains there is no gradient to cut: FORWARD_ONLY has the utility of
FROZEN there, at its own price. Which block is the lowest is one *case* of the knapsack for each
block.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.errors import ConfigError
from d2ft_fl.planning.cost_tables import Table
from d2ft_fl.planning.patterns import Patterns
from d2ft_fl.planning.pricing import table_of
from d2ft_fl.subnets.schedule import Schedule

TABLES = 1024  # kept, of those that clients differ in


@dataclass(frozen=True)
class Objective:
    """Utilities and prices of options under one cost model.

    Attributes:
        costs: The cost model.
        method: ``two-stage`` as D2FT does it, FULL by backward score first, then FORWARD_ONLY by
            forward score in what is left; or ``joint``, which weighs all operations against each
            other.
        forward_weight: Utility of running a subnet beside training it, at equal scores.
        frozen_weight: Utility of leaving the gradient uncut besides; 0 does without FROZEN.
        coupling: ``spread`` gives diminishing returns over clients; else each has its optimum
            alone.
        spread_clients: With ``spread``, at how many clients one more has half the utility of the
            first.
        least_clients: With ``spread``, how many should train every subnet.
        ranks: Of LoRA, offered besides the architecture's, which is the largest.
        rank_exponent: How the utility of training grows with the rank.
    """

    costs: CostModel
    method: str = "joint"
    forward_weight: float = 1.0
    frozen_weight: float = 0.0
    coupling: str = "none"
    spread_clients: float = 2.0
    least_clients: int = 1
    ranks: tuple[int, ...] = ()
    rank_exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.several_ranks and self.method == "two-stage":
            raise ConfigError("planner = 'two-stage' knows one rank: leave lora-ranks empty")

    @property
    def several_ranks(self) -> bool:
        """Whether subnets may train at different ranks."""
        return len(self.offered) > 1

    @cached_property
    def offered(self) -> tuple[int, ...]:
        """The ranks to choose from, ascending; 0 alone without LoRA."""
        largest = self.costs.arch.rank
        return tuple(sorted({r for r in self.ranks if 0 < r < largest} | {largest}))

    def table(
        self, examples: int, active: int, rotation: int, cached: np.ndarray | None = None
    ) -> Table:
        """Return the prices of options for a number of examples and active slots.

        Args:
            examples: On which the client trains.
            active: Slots that may run anything.
            rotation: By how much patterns are shifted.
            cached: Subnets whose fixed parameters the client has: bool [blocks, heads]; None for
                none.
        """
        key = examples, active, rotation, b"" if cached is None else cached.tobytes()
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                self._tables.clear()
            patterns = self.patterns(active)
            self._tables[key] = table_of(self.costs, patterns, examples, active, rotation, cached)
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[tuple[int, int, int, bytes], Table]:
        return {}

    def patterns(self, active: int) -> Patterns:
        """Return the options of a subnet with a number of active slots."""
        offers = self.frozen_weight > 0 and self.method == "joint"
        return Patterns.of(self.costs.slots, active, offers, self.offered)

    def stated_ranks(self, ranks: np.ndarray) -> np.ndarray | None:
        """Return the ranks that schedules state: None where only one is offered."""
        return ranks if self.several_ranks else None

    def rank_share(self, schedule: Schedule) -> np.ndarray:
        """Return how far training at its rank counts, of each subnet: float64 [blocks, heads]."""
        largest = self.offered[-1]
        if schedule.ranks is None or not largest:
            return np.ones(schedule.operations.shape[1:])
        return (schedule.ranks / largest) ** self.rank_exponent

    def rank_utility(self, patterns: Patterns) -> np.ndarray:
        """Return the utility of training at the ranks of options, as a share: float64 [options]."""
        largest = self.offered[-1]
        return (
            (patterns.rank / largest) ** self.rank_exponent
            if largest
            else np.ones(len(patterns.full))
        )
