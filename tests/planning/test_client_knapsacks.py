"""What clients' knapsacks consist of, and what their plans cost, against the cost model."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.costs.machine_speed import standard
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.planning import client_knapsacks
from d2ft_fl.planning.assignment import Participant
from d2ft_fl.planning.client_knapsacks import ClientKnapsacks, cached_of, costs_of
from d2ft_fl.planning.objective import Objective
from d2ft_fl.planning.problem import Solution
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build, cost_model, random_schedule

_, ARCH = build(depth=2, num_heads=3)
LORA = with_lora(ARCH, Lora(rank=4))
EXAMPLES = (20, 7, 20)
HASTY = Budget(speed=1e9, bandwidth_up=1e6, deadline=5.0)
CURVE = replace(standard(), passes=9.0, branch=1.0)
TICKS = 2**40


def clients_with(*budgets, cached=(None, None, None)):
    nothing = np.zeros(4, dtype=np.int64)
    return [
        Participant(i, EXAMPLES[i], budget, nothing, cached[i])
        for i, budget in enumerate(budgets or [Budget()] * 3)
    ]


def knapsacks(arch=ARCH, slots=3, active=2, rotation=5, clients=None, **options):
    objective = Objective(cost_model(arch, slots, batch_size=8), **options)
    backward, forward = np.random.default_rng(0).random((2, 3, 6))
    own = clients or clients_with()
    return ClientKnapsacks(objective, own, active, rotation, backward, forward[:1])


# -- what the solver is shown ----------------------------------------------------------------


def test_clients_with_as_many_examples_share_a_table():
    found = knapsacks()
    tables, which = found.tables
    assert which.tolist() == [0, 1, 0]
    for table, examples in zip(tables, (20, 7), strict=True):
        assert table is found.objective.table(examples, 2, 1)  # rotation 5 of 2 slots
    assert found.items.shape == (2, *tables[0].items.shape)
    assert (found.items[1] == tables[1].items).all()
    assert found.examples.tolist() == [20, 7, 20]


def test_what_clients_have_makes_tables_of_their_own():
    has = np.array([[True, False, True], [False, True, False]])
    found = knapsacks(clients=clients_with(*[Budget()] * 3, cached=(None, None, has)))
    tables, which = found.tables
    assert which.tolist() == [0, 1, 2]
    assert tables[2] is found.objective.table(20, 2, 1, has)


def test_beside_one_with_a_deadline_all_have_tables_with_time():
    found = knapsacks(clients=clients_with(Budget(), replace(HASTY, curve=CURVE), HASTY))
    tables, which = found.tables
    assert which.tolist() == [0, 1, 2]
    assert [t.items.shape[-1] for t in tables] == [6, 6, 6]
    assert [t.items[..., 5].any() for t in tables] == [False, True, True]


@pytest.mark.parametrize("frozen_weight", [0.0, 0.5])
def test_blocks_are_groups_and_below_the_lowest_that_trains_forward_is_frozen(frozen_weight):
    found = knapsacks(frozen_weight=frozen_weight)
    structure, patterns = found.structure, found.patterns
    assert structure.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert (structure.levels == patterns.levels).all()
    assert (structure.openings[1] == found.tables[0][1].openings).all()
    if not frozen_weight:
        assert structure.modes is None
        return
    # Case 0: the lowest block may train; case 1: the first block is below.
    assert structure.modes.tolist() == [[0, 0], [1, 0]]
    expected = [[not below for below in patterns.below], list(patterns.below)]
    expected[1][0] = True  # what runs nothing
    assert structure.allowed.tolist() == expected


def test_utilities_by_the_formula():
    """Of training by its rank and slots; of running and of what cuts no gradient, of 3 slots."""
    options = {"forward_weight": 0.7, "frozen_weight": 0.3, "ranks": (1,), "rank_exponent": 2.0}
    found = knapsacks(LORA, **options)
    train, rest = found.utilities
    p = found.patterns
    assert (train.shape, rest.shape) == ((3, 6, len(p.full)), (1, 6, len(p.full)))
    for o in range(len(p.full)):
        a, z, b = p.full[o], p.frozen[o], p.forward[o]
        share = a / 3 * (p.rank[o] / 4) ** 2
        uncut = a + z + (b if p.below[o] else 0)
        runs = (0.7 * (a + z + b) + 0.3 * uncut) / 3
        assert found.share[o] == pytest.approx(share)
        assert train[:, :, o] == pytest.approx(found.backward * share)
        assert rest[:, :, o] == pytest.approx(found.forward * runs)


def test_what_options_may_use_by_hand():
    """A 33rd of memory is the margin; constants come off; an eighth of the time is on top."""
    found = knapsacks()
    tables = [
        SimpleNamespace(constant=np.array([1, 2, 3, 4, 5, 6]), excess=np.array([7, 8, 0, 0, 9, 2])),
        SimpleNamespace(constant=np.arange(6) * 10, excess=np.zeros(6, dtype=np.int64)),
    ]
    found.__dict__["tables"] = tables, np.array([1, 0, 0])
    capacity = np.array([[100, 66, 50, 40], [200, 330, 60, 70], [5, 32, 5, 5]])
    at_most, excess = found._capacities(capacity, np.array([130, 246, 3]))
    assert at_most.tolist() == [
        [100 - 0, 64 - 10, 50 - 20, 40 - 30, 64 - 40, 130 - 50],
        [200 - 1, 320 - 2, 60 - 3, 70 - 4, 320 - 5, 246 - 6],
        [5 - 1, 32 - 2, 5 - 3, 5 - 4, 32 - 5, 3 - 6],
    ]
    assert excess.tolist() == [[0] * 5 + [10], [7, 8, 0, 0, 9, 2 + 30], [7, 8, 0, 0, 9, 2]]
    for table in tables:
        table.constant, table.excess = table.constant[:5], table.excess[:5]
    for part, whole in zip(found._capacities(capacity, None), (at_most, excess), strict=True):
        assert part.tolist() == whole[:, :5].tolist()
    assert tables[0].excess.tolist() == [7, 8, 0, 0, 9]


# -- what it chooses -------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_weight", [0.0, 0.5])
def test_choices_become_operations_slot_by_slot(frozen_weight):
    """Patterns begin one slot later from head to head and block to block; -1 is nothing."""
    found = knapsacks(LORA, ranks=(1,), frozen_weight=frozen_weight)
    patterns = found.patterns
    options = np.flatnonzero(~patterns.below)
    choice = np.random.default_rng(1).choice(options, (4, 6))
    choice[3, 2:] = -1
    operations, ranks = found._materialise(choice)
    assert (operations.shape, ranks.shape) == ((4, 3, 2, 3), (4, 2, 3))
    for c, s, b, h in np.ndindex(operations.shape):
        option = max(0, choice[c, 3 * b + h])
        expected = patterns.operations[option, (b + h + 5) % 2, s]
        nothing_below = not (operations[c, s, : b + 1] == Operation.FULL).any()
        if expected == Operation.FROZEN and nothing_below:
            expected = Operation.FORWARD_ONLY
        assert operations[c, s, b, h] == expected
        assert ranks[c, b, h] == patterns.rank[option]
    assert frozen_weight == 0 or (operations == Operation.FROZEN).any()


def asked(monkeypatch, found, *arguments):
    """The solver that a choice is asked of, and what it is given."""
    given = []
    for name in ("solve", "solve_spread", "solve_two_stages"):

        def solver(*args, name=name, **options):
            given.append((name, args, options))

        monkeypatch.setattr(client_knapsacks, name, solver)
    found._choose(*arguments)
    return given[0]


SHOWN, WHO = np.arange(10).reshape(2, 5), np.array([2, 1])


def test_each_client_alone_maximises_all_utility(monkeypatch):
    found = knapsacks()
    train, rest = found.utilities
    name, (values, costs, shown, structure, which), options = asked(monkeypatch, found, SHOWN, WHO)
    assert (name, options) == ("solve", {"effort": 1})
    assert (values == train[WHO] + rest).all()
    assert costs is found.items
    assert shown is SHOWN
    assert structure is found.structure
    assert which.tolist() == [0, 1]


def test_of_two_clients_one_has_its_own_utility(monkeypatch):
    found = knapsacks(clients=clients_with(Budget(), Budget()))
    object.__setattr__(found, "backward", found.backward[:2])
    train, rest = found.utilities
    _, (values, *_), _ = asked(monkeypatch, found, SHOWN[:1], np.array([1]))
    assert (values == train[[1]] + rest).all()


def test_two_stages_know_what_trains_and_what_runs(monkeypatch):
    found = knapsacks(method="two-stage")
    train, rest = found.utilities
    name, given, options = asked(monkeypatch, found, SHOWN, WHO)
    assert (name, options) == ("solve_two_stages", {})
    assert (given[0] == train[WHO]).all()
    assert given[1] is rest
    assert given[2] is found.share
    assert given[3].tolist() == [b == 0 for b in found.patterns.forward]
    assert given[4] is found.items
    assert given[5] is SHOWN
    assert given[6] is found.structure
    assert given[7].tolist() == [0, 1]


SPREAD = {"coupling": "spread", "spread_clients": 2.5, "least_clients": 1}


def test_coupled_clients_count_by_their_examples(monkeypatch):
    found = knapsacks(**SPREAD)
    name, given, options = asked(monkeypatch, found, SHOWN, WHO)
    assert (name, options) == ("solve_spread", {})
    assert given[0] is found.utilities[1]
    spread = given[3]
    assert spread.train == pytest.approx(found.backward.sum(axis=0) / 3)
    assert spread.share is found.share
    assert spread.weight == pytest.approx([20 / (47 / 3), 7 / (47 / 3)])
    assert (spread.reference, spread.least) == (2.5, 1)
    assert given[1] is found.items
    assert given[2] is SHOWN
    assert given[4] is found.structure
    assert given[5].tolist() == [0, 1]


def test_a_later_choice_takes_returns_as_they_are_and_keeps_who_is_needed(monkeypatch):
    """Of subnet 0 all are trainers, of 1 client 2 alone, of 3 client 1; client 0 can do nothing."""
    found = knapsacks(**SPREAD)
    share = found.share
    full, half = int(share.argmax()), int(np.flatnonzero((share > 0) & (share < share.max()))[0])
    choice = np.zeros((3, 6), dtype=np.int64)
    choice[0], choice[1:, 0], choice[2, 1], choice[1, 3] = -1, full, full, half
    coupled = Solution(choice, np.array([-np.inf, 1.0, 2.0]), None)
    object.__setattr__(coupled, "marginal", np.linspace(0.3, 0.9, 6))
    name, given, options = asked(monkeypatch, found, SHOWN, WHO, coupled)
    assert (name, options) == ("solve", {"effort": 1})
    rest, mean = found.utilities[1], found.backward.sum(axis=0) / 3
    for row, (client, examples) in enumerate([(2, 20), (1, 7)]):
        for i in range(6):
            slope = mean[i] * (0.3 + 0.12 * i) * examples / (47 / 3)
            needed = (client, i) in [(2, 1), (1, 3)]
            expected = slope * share + needed * found.backward.max() * (share > 0)
            assert given[0][row, i] == pytest.approx(expected + rest[0, i])
    assert given[1] is found.items
    assert given[2] is SHOWN
    assert given[3] is found.structure
    assert given[4].tolist() == [0, 1]


# -- what that costs -------------------------------------------------------------------------


def plans(arch, slots=3, count=2):
    schedules = [random_schedule(arch, slots, seed) for seed in range(count)]
    ranks = np.random.default_rng(0).integers(1, 5, (count, arch.blocks, arch.heads))
    return np.stack([s.operations for s in schedules]), ranks


CAPACITY = np.array([[10, 20, 30, 40], [10**6, 10**5, 1, 1], [10**9, 10**7, 1, 1]])
LATE = np.array([TICKS, TICKS - 5, TICKS - 9])


def test_where_prices_are_exact_only_memory_is_looked_at():
    found = knapsacks()
    operations, ranks = plans(ARCH)
    over = found._over(operations, ranks, np.array([2, 1]), CAPACITY, LATE)
    for row, (client, examples) in enumerate([(2, 20), (1, 7)]):
        memory = found.objective.costs.memory(Schedule(operations[row]), examples)
        more = memory - CAPACITY[client, 1]
        assert over[row].tolist() == [0, more, 0, 0, more]


@pytest.mark.parametrize("ranks_on_offer", [(), (1, 2, 3)])
def test_where_some_prices_are_in_excess_flops_are_looked_at_too(ranks_on_offer):
    found = knapsacks(LORA, ranks=ranks_on_offer)
    found.tables[0][0].excess[:] = 0  # of one of them
    operations, ranks = plans(LORA)
    over = found._over(operations, ranks, np.array([2, 1]), CAPACITY, LATE)
    for row, (client, examples) in enumerate([(2, 20), (1, 7)]):
        own = ranks[row] if ranks_on_offer else None
        cost = found.objective.costs.cost(Schedule(operations[row], own), examples)
        flops, memory = cost.flops - CAPACITY[client, 0], cost.memory - CAPACITY[client, 1]
        assert over[row].tolist() == [flops, memory, 0, 0, memory]


def test_of_those_with_a_deadline_time_is_looked_at_in_ticks_up_to_twice_as_many():
    slow = Budget(speed=1.0, deadline=1.0)
    found = knapsacks(clients=clients_with(slow, Budget(speed=1.0), HASTY))
    operations, ranks = plans(ARCH, count=3)
    over = found._over(operations, ranks, np.array([2, 1, 0]), CAPACITY, LATE)
    cost = found.objective.costs.cost(Schedule(operations[0]), 20)
    share = HASTY.seconds(cost) / HASTY.deadline
    assert 0 < share < 1
    flops, memory = cost.flops - CAPACITY[2, 0], cost.memory - CAPACITY[2, 1]
    time = math.ceil(TICKS * share) - LATE[2]
    assert over[0].tolist() == [flops, memory, 0, 0, memory, time]
    assert over[1, 5] == 0
    assert over[2, 5] == 2 * TICKS - LATE[0]


def has(*places):
    cached = np.zeros((2, 3), dtype=bool)
    cached.flat[list(places)] = True
    return cached


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("arch", [ARCH, LORA])
def test_costs_are_those_of_each_client_on_its_own_machine(arch, timed):
    costs = cost_model(arch, 3, batch_size=8)
    clients = clients_with(
        replace(HASTY, curve=CURVE), Budget(curve=CURVE), HASTY, cached=(None, has(0, 4), None)
    )
    operations, ranks = plans(arch, count=3)
    stated = ranks if arch.rank else None
    found = costs_of(costs, clients, operations, np.array(EXAMPLES), stated, timed)
    for i, client in enumerate(clients):
        schedule = Schedule(operations[i], ranks[i] if arch.rank else None)
        own = costs.on(client.budget.curve)
        # Beside one that has something, nothing is written out.
        exact = own.cost(schedule, EXAMPLES[i], has(0, 4) if i == 1 else has())
        assert exact.work > 0
        counts = timed or client.budget.deadline is not None
        assert found[i] == replace(exact, work=exact.work if counts else 0)


def test_what_clients_have_is_nothing_where_they_do_not_say():
    operations = np.zeros((3, 1, 2, 3), dtype=np.int8)
    clients = clients_with(*[Budget()] * 3, cached=(None, has(1, 5), None))
    assert cached_of(clients, operations).tolist() == [
        has().tolist(), has(1, 5).tolist(), has().tolist()
    ]  # fmt: skip
    assert cached_of(clients_with(), operations) is None
