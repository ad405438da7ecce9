"""Prices of time, by hand: what computing takes as a sum, and ticks of deadlines."""

from types import SimpleNamespace

import numpy as np
import pytest

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.planning import cost_tables
from d2ft_fl.planning.cost_tables import Table, WorkPrices
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build, cost_model

EXAMPLES = 5
TICKS = 2**40


def test_resources_of_the_solver_are_in_order():
    places = [getattr(cost_tables, n) for n in ("FLOPS", "MEMORY", "UP", "DOWN", "LATER", "TIME")]
    assert places == [0, 1, 2, 3, 4, 5]
    assert cost_tables.MEMORIES == [1, 4]
    assert cost_tables.TICKS == TICKS


# -- computing -------------------------------------------------------------------------------


class Additive:
    """A cost model in which work is a sum: of beginning, blocks, live blocks and FLOPs.

    A FULL head takes ``unit`` FLOPs an example and slot, one that is FORWARD_ONLY half of that.
    """

    def __init__(self, blocks, heads, slots, unit, begins, resident, live, per_flop):
        self.arch = SimpleNamespace(blocks=blocks)
        self.shape, self.unit = (slots, blocks, heads), unit
        self.begins, self.resident, self.live, self.per_flop = begins, resident, live, per_flop

    def everything(self):
        return Schedule.filled(Operation.FULL, *self.shape)

    def flops(self, schedule, examples):
        full, forward = (
            (schedule.operations == o).sum() for o in (Operation.FULL, Operation.FORWARD_ONLY)
        )
        return int(self.unit * examples * (full + forward / 2))

    def work(self, operations, examples):
        self.asked = operations
        return np.array([self.work_of(*pair) for pair in zip(operations, examples, strict=True)])

    def work_of(self, operations, examples):
        runs = operations.any(axis=(0, 2))
        trains = (operations == Operation.FULL).any(axis=(0, 2))
        blocks = self.resident * runs.sum() + self.live * trains.cumsum().astype(bool).sum()
        flops = self.flops(Schedule(operations), examples)
        return self.begins + blocks + self.per_flop * flops


@pytest.mark.parametrize("blocks,heads,slots", [(4, 3, 2), (2, 2, 1), (3, 5, 1)])
def test_work_that_is_a_sum_is_priced_exactly(blocks, heads, slots):
    costs = Additive(blocks, heads, slots, 8, 70, 6, 11, 0.5)
    assert WorkPrices.of(costs, EXAMPLES) == WorkPrices(70, 6, 11, 0.5)


def test_prices_are_those_of_four_schedules():
    """One FULL head, also above others, in every block, and everything."""
    costs = Additive(3, 2, 2, 8, 70, 6, 11, 0.5)
    WorkPrices.of(costs, EXAMPLES)
    one = [[0, 0], [0, 0], [0, 3]]
    above = [[0, 1], [0, 1], [0, 3]]
    column = [[0, 3], [0, 3], [0, 3]]
    every = [[3, 3], [3, 3], [3, 3]]
    assert costs.asked.tolist() == [[o, o] for o in (one, above, column, every)]


@pytest.mark.parametrize(
    "parts,expected",
    [
        # Of 4 blocks one is 12, above it 9, column 18: resident none, live (18 - 12) / 3.
        ((10, -1, 3), (10, 0, 2)),
        # 21, 30 and 24: resident 3, and live less than none.
        ((20, 3, -2), (18, 3, 0)),
        # -6, -3 and 6: what is less than nothing is nothing.
        ((-10, 1, 3), (0, 0, 2)),
    ],
)
def test_no_price_is_less_than_nothing(parts, expected):
    """Parts are begins, resident and live."""
    prices = WorkPrices.of(Additive(4, 2, 1, 8, *parts, 0.5), EXAMPLES)
    assert (prices.begins, prices.resident, prices.live) == expected


def test_one_block_has_no_price_of_its_own():
    """One head of 1 FLOP more is what a FLOP takes, and all else belongs to beginning."""
    costs = Additive(1, 2, 1, 1, 70, 6, 11, 0.5)
    assert WorkPrices.of(costs, 1) == WorkPrices(87, 0, 0, 0.5)


def test_one_head_a_block_has_no_price_of_a_flop():
    """Columns are everything: there is nothing to tell FLOPs from blocks by."""
    assert WorkPrices.of(Additive(2, 1, 1, 8, 70, 6, 11, 0.5), 1).per_flop == 0


@pytest.mark.parametrize("slots", [1, 2])
def test_prices_of_a_cost_model_add_up_to_its_work(slots):
    """For one head above others that run forward, in all blocks, and for everything."""
    costs = cost_model(build(depth=3)[1], slots, batch_size=4)
    prices = WorkPrices.of(costs, EXAMPLES)
    assert min(prices.begins, prices.resident, prices.live, prices.per_flop) > 0
    for lower, full in [([0, 0, 0, 0], False), ([1, 0, 0, 0], False), ([3, 0, 0, 0], False),
                        ([3, 3, 3, 3], True)]:  # fmt: skip
        operations = np.zeros((slots, 3, 4), dtype=np.int8)
        operations[:, :2] = lower
        operations[:, 2] = 3 if full else [3, 0, 0, 0]
        blocks = 3 if any(lower) else 1
        live = 3 if 3 in lower else 1
        priced = prices.begins + prices.resident * blocks + prices.live * live
        priced += prices.per_flop * costs.flops(Schedule(operations), EXAMPLES)
        exact = costs.work(operations[None], np.array([EXAMPLES]))[0]
        assert priced == pytest.approx(exact, rel=1e-6)


# -- deadlines -------------------------------------------------------------------------------

# Two subnets with two options, a block with three levels: FLOPs, memory, up, down, later memory.
TABLE = Table(
    np.array([[[0, 9, 0, 0, 9], [8, 9, 2, 3, 9]], [[3, 0, 0, 0, 0], [16, 5, 1, 0, 7]]]),
    np.array([[[0, 7, 0, 1, 7], [2, 7, 3, 0, 7], [4, 7, 5, 0, 7]]]),
    np.array([10, 50, 7, 6, 50]),
    np.array([1, 20, 0, 0, 20]),
)
PRICES = WorkPrices(begins=40, resident=20, live=30, per_flop=2.0)


def times(budget, prices=PRICES):
    """What the sixth resource is; the others stay as they are."""
    timed = TABLE.timed(budget, prices)
    parts = [(getattr(timed, n), getattr(TABLE, n)) for n in ("items", "openings", "constant")]
    parts.append((timed.excess, TABLE.excess))
    for new, old in parts:
        assert new.dtype == np.int64
        assert (new[..., :5] == old).all()
        assert new.shape[-1] == 6
    return [new[..., 5].tolist() for new, _ in parts]


def test_ticks_are_what_computing_and_traffic_take_of_the_deadline():
    """A second has 4 ticks: FLOPs at 2 a tick, bytes up at 1/4, bytes down at 1/8 a tick.

    A FLOP takes two of the machine's, so that it is a tick; the constant's 40 FLOPs besides are 20.
    """
    budget = Budget(speed=8.0, bandwidth_up=1.0, bandwidth_down=0.5, deadline=TICKS / 4)
    items, openings, constant, excess = times(budget)
    assert items == [[0, 8 + 8 + 24], [3, 16 + 4]]
    assert openings == [[0 + 8 + 10, 2 + 12 + 15, 4 + 20]]
    assert constant == 10 + 28 + 48 + 20
    assert excess == 1


def test_ticks_are_rounded_up():
    """A quarter of a tick a second, at a byte a second."""
    budget = Budget(bandwidth_up=1.0, deadline=4.0 * TICKS)
    items, openings, constant, excess = times(budget)
    assert items == [[0, 1], [0, 1]]
    assert openings == [[0, 1, 2]]
    assert (constant, excess) == (2, 0)


def test_without_a_deadline_nothing_takes_ticks():
    items, openings, constant, excess = times(Budget(speed=8.0, bandwidth_up=1.0))
    assert items == [[0, 0], [0, 0]]
    assert openings == [[0, 0, 0]]
    assert (constant, excess) == (0, 0)


@pytest.mark.parametrize("deadline", [0.5, 1e-300])
def test_what_takes_longer_than_the_deadline_takes_one_tick_more(deadline):
    """At a FLOP a second; what is nothing takes none."""
    items, openings, constant, excess = times(
        Budget(speed=1.0, deadline=deadline), WorkPrices(0.0, 0.0, 0.0, 1.0)
    )
    assert items == [[0, TICKS + 1], [TICKS + 1] * 2]
    assert openings == [[0, TICKS + 1, TICKS + 1]]
    assert (constant, excess) == (TICKS + 1, TICKS + 1)
