"""What is offered to a planner, and what ranks are worth."""

from itertools import product

import numpy as np
import pytest

from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.planning import objective
from d2ft_fl.planning.objective import Objective
from d2ft_fl.planning.patterns import Patterns
from d2ft_fl.planning.pricing import table_of
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build, cost_model

_, ARCH = build(depth=2, num_heads=3)
LORA = with_lora(ARCH, Lora(rank=4))


def of(arch=ARCH, slots=2, **options):
    return Objective(cost_model(arch, slots, batch_size=8), **options)


def test_by_default_training_counts_as_running_and_a_rank_by_its_root():
    plain = of()
    assert (plain.forward_weight, plain.frozen_weight, plain.rank_exponent) == (1.0, 0.0, 0.5)
    assert (plain.spread_clients, plain.least_clients) == (2.0, 1)


@pytest.mark.parametrize(
    "arch,ranks,offered",
    [
        (ARCH, (), (0,)),
        (ARCH, (2,), (0,)),
        (LORA, (), (4,)),
        (LORA, (2,), (2, 4)),
        (LORA, (3, 1), (1, 3, 4)),
        (LORA, (0, 4, 5, -1), (4,)),
    ],
)
def test_ranks_on_offer_are_those_below_the_largest_and_it(arch, ranks, offered):
    found = of(arch, ranks=ranks)
    assert found.offered == offered
    assert found.several_ranks == (len(offered) > 1)
    assert (found.stated_ranks(np.ones(3)) is None) == (len(offered) == 1)


@pytest.mark.parametrize(
    "weight,method,frozen",
    [(0.0, "joint", False), (0.5, "joint", True), (0.5, "two-stage", False)],
)
def test_frozen_is_offered_where_it_is_worth_anything(weight, method, frozen):
    found = of(LORA, 3, frozen_weight=weight, method=method).patterns(2)
    assert found is Patterns.of(3, 2, frozen, (4,))
    assert found.below.any() == frozen


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_a_rank_is_worth_its_share_of_the_largest_to_a_power(exponent):
    found = of(LORA, ranks=(1, 3), rank_exponent=exponent)
    shares = found.rank_utility(found.patterns(1))
    ranks = found.patterns(1).rank
    assert set(ranks.tolist()) == {0, 1, 3, 4}
    assert shares == pytest.approx([(r / 4) ** exponent for r in ranks.tolist()])
    own = np.array([[1, 3, 4], [4, 4, 1]])
    schedule = Schedule(np.full((2, 2, 3), Operation.FULL, dtype=np.int8), own)
    expected = [[(r / 4) ** exponent for r in row] for row in own.tolist()]
    assert found.rank_share(schedule) == pytest.approx(np.array(expected))


def test_without_ranks_training_counts_whole():
    schedule = Schedule(np.full((2, 2, 3), Operation.FULL, dtype=np.int8))
    stated = Schedule(schedule.operations, np.ones((2, 3), dtype=np.int64))
    for found, one in [(of(), schedule), (of(), stated), (of(LORA, ranks=(2,)), schedule)]:
        assert found.rank_share(one).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert of().rank_utility(of().patterns(1)).tolist() == [1, 1, 1]


def test_a_table_prices_what_it_is_asked_for():
    found, cached = of(slots=3), np.array([[True, False, True], [False, True, False]])
    for examples, active, rotation, has in product((7, 20), (2, 3), (0, 1), (None, cached)):
        mine = found.table(examples, active, rotation, has)
        own = table_of(found.costs, found.patterns(active), examples, active, rotation, has)
        for part in ("items", "openings", "constant", "excess"):
            assert np.array_equal(getattr(mine, part), getattr(own, part))
        assert found.table(examples, active, rotation, has) is mine


def test_so_many_tables_are_kept(monkeypatch):
    monkeypatch.setattr(objective, "TABLES", 2)
    found = of()
    first, second = found.table(7, 1, 0), found.table(7, 2, 0)
    assert found.table(7, 1, 0) is first
    assert found.table(7, 2, 0) is second
    third = found.table(8, 2, 0)
    assert found.table(8, 2, 0) is third
    assert found.table(7, 1, 0) is not first
