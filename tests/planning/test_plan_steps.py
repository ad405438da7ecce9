"""How a round's plan comes about: probes first, fewer slots where nothing trains, exact costs."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes, probes_cost, round_cost
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import RunError
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.planning import planner
from d2ft_fl.planning.assignment import Assignment, Participant
from d2ft_fl.planning.planner import Drafts, Planner, _scores_of, _ticks
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build, cost_model

_, ARCH = build(depth=2, num_heads=3)
LORA = with_lora(ARCH, Lora(rank=4))
TICKS = 2**40
ENDLESS = np.full(4, UNLIMITED)
ONES = np.ones((2, 3))


def model(arch=ARCH, slots=2, compensated=False):
    return replace(cost_model(arch, slots, batch_size=8), compensated=compensated)


def client(number=0, examples=20, capacity=ENDLESS, budget=None, cached=None):
    return Participant(number, examples, budget or Budget(), np.asarray(capacity), cached)


# -- drafts ----------------------------------------------------------------------------------


def test_drafts_begin_with_nothing():
    drafts = Drafts.empty(4, 3, 2, 5)
    assert (drafts.operations.shape, drafts.ranks.shape) == ((4, 3, 2, 5), (4, 2, 5))
    assert drafts.gaps.tolist() == [0.0] * 4
    assert drafts.untrained().tolist() == [0, 1, 2, 3]


def operations_of(*values):
    """Schedules of two slots and one block of two heads; one head does something in one slot."""
    operations = np.zeros((len(values), 2, 1, 2), dtype=np.int8)
    operations[:, 1, 0, 1] = values
    return operations


def test_untrained_are_those_without_anything_full():
    drafts = Drafts(operations_of(3, 0, 1, 3, 2), None, None)
    assert drafts.untrained().tolist() == [1, 2, 4]


def test_drafts_take_over_what_trains_and_what_replaces_nothing():
    """Before: nothing, nothing, forward, forward, FULL; 5 is not asked about."""
    drafts = Drafts(operations_of(0, 0, 1, 1, 3, 0), np.zeros((6, 1, 2), int), np.zeros(6))
    part = np.array([1, 0, 2, 3, 4])
    ranks = np.arange(1, 6)[:, None, None] * np.ones((1, 2), int)
    drafts.improve(part, operations_of(1, 0, 2, 3, 3), ranks, np.arange(1, 6) / 8)
    assert drafts.operations[:, 1, 0, 1].tolist() == [0, 1, 1, 3, 3, 0]
    assert drafts.ranks[:, 0, 0].tolist() == [0, 1, 0, 4, 5, 0]
    assert drafts.gaps.tolist() == [0, 0.125, 0, 0.5, 0.625, 0]
    drafts.fill(np.array([True, False, False, False, False, False]), 7)
    assert drafts.operations[0].ravel().tolist() == [3] * 4
    assert drafts.operations[1].ravel().tolist() == [0, 0, 0, 1]
    assert drafts.ranks[:, 0, 1].tolist() == [7, 1, 0, 4, 5, 0]


# -- what plans are made of ------------------------------------------------------------------


def test_scores_are_everybodys_or_each_clients_own():
    own, who = np.arange(24).reshape(4, 2, 3), np.array([2, 0])
    assert _scores_of(own, who).tolist() == [list(range(12, 18)), list(range(6))]
    assert _scores_of(own[1], who).tolist() == [list(range(6, 12))]


def test_ticks_are_the_part_of_the_deadline_that_probes_leave_less_one():
    budget = Budget(speed=4.0, deadline=8.0)
    assert _ticks(budget, None) == TICKS - 1
    assert _ticks(budget, Cost(work=8)) == TICKS * 3 // 4 - 1
    assert _ticks(budget, Cost(work=32)) == -1
    assert _ticks(budget, Cost(work=48)) == -TICKS // 2 - 1
    assert _ticks(budget, Cost(work=4000)) == -TICKS - 1
    assert _ticks(Budget(speed=4.0), Cost(work=8)) == 2**60


def test_so_many_clients_are_solved_for_at_once_and_coupled_ones_together(monkeypatch):
    monkeypatch.setattr(planner, "CHUNK", 3)
    alone, coupled = Planner(model()), Planner(model(), coupling="spread")
    left = np.arange(10, 17)
    parts = [part.tolist() for part in alone._chunks(left)]
    assert parts == [[10, 11, 12], [13, 14, 15], [16]]
    assert [part.tolist() for part in coupled._chunks(left)] == [left.tolist()]
    assert [part.tolist() for part in coupled._chunks(left[:1])] == [[10]]
    assert list(coupled._chunks(left[:0])) == list(alone._chunks(left[:0])) == []


def test_slots_are_given_up_until_something_trains(monkeypatch):
    """Client 9 trains with 3 slots, 5 with 2, 7 with 1; 6 only runs, and 8 never does anything."""
    trains, asked = {9: 3, 5: 2, 7: 1}, []

    class Knapsacks:
        def __init__(self, objective, clients, *arguments):
            self.clients, self.active = [c.client for c in clients], arguments[0]
            asked.append((self.clients, *[np.asarray(a).tolist() for a in arguments]))

        def operations(self, capacity, deadlines):
            asked[-1] += capacity[:, 0].tolist(), deadlines.tolist()
            operations = np.zeros((len(self.clients), 3, 2, 3), dtype=np.int8)
            for row, one in enumerate(self.clients):
                runs = Operation.FORWARD_ONLY if one in (6, 7) else Operation.SHORTCUT
                operations[row, 0] = runs if self.active != trains.get(one) else Operation.FULL
            ranks = np.full((len(self.clients), 2, 3), 4)
            return operations, ranks, np.full(len(self.clients), self.active / 8)

    monkeypatch.setattr(planner, "ClientKnapsacks", Knapsacks)
    monkeypatch.setattr(planner, "CHUNK", 2)
    budget = Budget(deadline=8.0, speed=4.0)
    numbers = [3, 9, 5, 6, 7, 8]
    clients = [client(n, budget=budget if n == 5 else None) for n in numbers]
    who, capacity = np.array([1, 2, 3, 4, 5]), np.arange(20).reshape(5, 4)
    scores = np.arange(36.0).reshape(6, 2, 3)
    found = Planner(model(slots=3))._plan(
        clients, who, capacity, scores, -scores[:1, 0], 4, False, {2: Cost(work=8), 1: Cost()}
    )
    assert [one[:3] for one in asked] == [
        ([9, 5], 3, 4), ([6, 7], 3, 4), ([8], 3, 4),
        ([5, 6], 2, 4), ([7, 8], 2, 4),
        ([6, 7], 1, 4), ([8], 1, 4),
    ]  # fmt: skip
    for of_client, _, _, backward, forward, room, ticks in asked:
        rows = [numbers.index(n) for n in of_client]
        assert backward == scores[rows].reshape(len(rows), 6).tolist()
        assert forward == [[0, -1, -2]]
        assert room == [4 * (row - 1) for row in rows]
        assert ticks == [TICKS * 3 // 4 - 1 if n == 5 else UNLIMITED for n in of_client]
    assert [a.client for a in found] == [9, 5, 6, 7, 8]
    full = [int((a.schedule.operations == Operation.FULL).sum()) for a in found]
    assert full == [6, 6, 0, 6, 0]
    assert [a.gap for a in found] == [3 / 8, None, 3 / 8, 1 / 8, None]
    assert found[4].schedule.sits_out
    assert Planner(model())._plan(clients, who[:0], capacity[:0], scores, scores, 0, True) == []


@pytest.mark.parametrize("ranks", [(), (1, 2)])
@pytest.mark.parametrize("timed", [False, True])
def test_drafts_are_costed_exactly(ranks, timed):
    costs = model(LORA)
    drafts = Drafts.empty(3, 2, 2, 3)
    draw = np.random.default_rng(0)
    drafts.operations[:2] = draw.integers(0, 4, (2, 2, 2, 3))
    drafts.ranks[:] = draw.integers(1, 5, (3, 2, 3))
    drafts.gaps[:] = 0.5, 0.25, 0.125
    clients = [client(4, 20), client(2, 1), client(7, 9)]
    found = Planner(costs, ranks=ranks)._assignments(clients, drafts, timed)
    for i, (one, examples) in enumerate([(4, 20), (2, 1), (7, 9)]):
        stated = drafts.ranks[i] if ranks else None
        a = found[i]
        assert a.client == one
        assert np.array_equal(a.schedule.operations, drafts.operations[i])
        assert np.array_equal(a.schedule.ranks, stated)
        schedule = Schedule(drafts.operations[i], stated)
        assert a.cost == costs.cost(schedule, examples, timed=timed)
        # With fewer examples than slots nothing is certified, nor for sitting out.
        assert a.gap == (0.5 if i == 0 else None)
    assert found[0].cost.flops > 0


@pytest.mark.parametrize(
    "options,certified",
    [
        ({}, True),
        ({"method": "two-stage"}, False),
        ({"compensated": True}, False),
        ({"frozen_weight": 0.5}, False),
        ({"frozen_weight": 0.5, "slots": 1}, True),
        ({"slots": 1}, True),
    ],
)
def test_gaps_are_certified_where_all_has_a_price(options, certified):
    costs = {key: options[key] for key in ("slots", "compensated") if key in options}
    others = {key: value for key, value in options.items() if key not in costs}
    clients = [client(budget=b) for b in (
        None, None, None, Budget(deadline=9.0), Budget(speed=9.0), Budget(deadline=9.0, speed=9.0)
    )]  # fmt: skip
    examples = np.array([1, 2, 3, 2, 2, 2])
    found = Planner(model(**costs), **others)._certified(clients, examples)
    fewest = options.get("slots", 2) == 1
    expected = [fewest, True, True, True, True, False]
    assert found.tolist() == [certified and one for one in expected]


@pytest.mark.parametrize("arch,ranks", [(ARCH, ()), (LORA, ()), (LORA, (1, 2))])
def test_who_affords_everything_is_who_has_exactly_its_cost(arch, ranks):
    costs = model(arch)
    everything = costs.everything()
    stated = np.full((2, 3), 4) if ranks else None
    whole = costs.cost(Schedule(everything.operations, stated), 20)
    budget = Budget(speed=float(whole.work), deadline=1.0)
    budgets = [Budget(), Budget(), Budget(), Budget(), Budget(), budget,
               replace(budget, deadline=0.999)]  # fmt: skip
    capacity = np.stack([whole.vector()] * 7)
    capacity[np.arange(1, 5), np.arange(4)] -= 1
    clients = [client(i, budget=b) for i, b in enumerate(budgets)]
    found = Planner(costs, ranks=ranks)._affording_everything(clients, capacity)
    assert found.tolist() == [True, False, False, False, False, True, False]


def test_who_affords_everything_does_everything_where_skipping_is_charged():
    """The knapsacks charge for skipping in every block, whatever is skipped."""
    costs = model(compensated=True)
    whole = costs.cost(costs.everything(), 20)
    for less in (0, 1):
        room = client(capacity=whole.vector() - [0, 0, 0, less])
        (found,) = Planner(costs).plan([room], ONES, ONES)
        assert (found.cost == whole) == (less == 0)
    adapted = model(LORA, compensated=True)
    (found,) = Planner(adapted, ranks=(1,)).plan([client()], ONES, ONES)
    assert (found.schedule.ranks == 4).all()


# -- probes ----------------------------------------------------------------------------------


def test_probes_are_done_by_who_affords_them_and_the_rest_is_planned_in_what_is_left():
    """Of six clients that would score and view 0 affords both, 1 and 2 viewing, 3 nothing of it.

    After scoring 4 has nothing left to train, and 5 wants nothing. 2 has nothing after viewing.
    """
    costs = model(compensated=True)
    both, viewing = Probes(scored=3, viewed=5, kinds=("fisher",)), Probes(viewed=5)
    spent = {p: probes_cost(costs, p).vector() for p in (both, viewing)}
    assert (spent[both][[0, 2]] > spent[viewing][[0, 2]]).all()
    calls = []

    class Scripted(Planner):
        def _plan(self, clients, who, capacity, backward, forward, rotation, timed, before=None):
            calls.append((who.tolist(), capacity.tolist(), before, self.costs.compensated))
            assert (backward, forward, rotation, timed) == ("backward", "forward", 7, False)
            nothing = [] if before is None else [4, *([2] if 2 in before else [])]
            schedules = [
                Schedule(np.full((2, 2, 3), 0 if i in nothing else 3, dtype=np.int8)) for i in who
            ]
            cost = Cost(11, 12, 13, 14)
            return [
                Assignment(clients[i].client, s, cost) for i, s in zip(who, schedules, strict=True)
            ]

    rich, some = spent[both] + 100, spent[viewing] + 100
    rooms = np.stack([rich, some, some, some - [101, 0, 0, 0], rich, np.full(4, 10**12)])
    clients = [client(20 + i, capacity=room) for i, room in enumerate(rooms)]
    wanted = [both] * 5 + [NO_PROBES]
    found = Scripted(costs).plan(clients, "backward", "forward", 7, wanted, timed=False)

    def left(row, probes):
        flops, memory, up, _ = rooms[row]
        return [flops - spent[probes][0], memory, up - spent[probes][2], UNLIMITED]

    assert calls[0][:2] == ([0, 4], [left(0, both), left(4, both)])
    assert list(calls[0][2]) == [0, 4]
    assert calls[1][:2] == ([1, 2, 4], [left(i, viewing) for i in (1, 2, 4)])
    assert calls[2] == ([2, 3, 4, 5], [rooms[i].tolist() for i in (2, 3, 4, 5)], None, True)
    assert [call[3] for call in calls] == [False, False, True]
    assert [a.probes for a in found] == [both, viewing, *[NO_PROBES] * 4]
    assert [a.client for a in found] == [20, 21, 22, 23, 24, 25]
    probes = probes_cost(costs, both)
    expected = Cost(
        11 + probes.flops, max(12, probes.memory), 13 + probes.bytes_up, probes.bytes_down,
        probes.work,
    )  # fmt: skip
    assert found[0].cost == expected
    assert found[2].cost == Cost(11, 12, 13, 14)


@pytest.mark.parametrize("has", [None, np.array([[True, False, True], [False, True, True]])])
def test_probes_and_training_cost_what_the_cost_model_says(has):
    costs = model(LORA)
    wanted = [Probes(scored=2, viewed=4), Probes(viewed=4), NO_PROBES]
    clients = [client(i, 12, cached=has) for i in range(3)]
    found = Planner(costs).plan(clients, ONES, ONES, probes=wanted)
    for a, probes in zip(found, wanted, strict=True):
        assert a.probes == probes
        assert a.cost == round_cost(costs, a.schedule, 12, probes, has)
        assert a.cost.work > 0
    (plain,) = Planner(costs).plan(clients[:1], ONES, ONES, timed=False)
    assert (plain.cost.work, plain.probes) == (0, NO_PROBES)


def test_patterns_are_shifted_by_the_rotation():
    """One subnet trains in one of three slots: in the one where its pattern starts."""
    costs = model(slots=3)
    backward = np.zeros((2, 3))
    backward[1, 2] = 1.0
    operations = np.zeros((3, 2, 3), dtype=np.int8)
    operations[0, 1, 2] = Operation.FULL
    # All slots are priced as if they ran, so that there is no need to give up some.
    room = costs.flops(Schedule(operations), 24) + 16 * costs.round_flops.outside
    for options, start in [({}, 0), ({"rotation": 0}, 0), ({"rotation": 1}, 1)]:
        (found,) = Planner(costs, forward_weight=0.0).plan(
            [client(examples=24, capacity=[room, *[UNLIMITED] * 3])], backward, backward, **options
        )
        expected = np.zeros((3, 2, 3), dtype=np.int8)
        expected[start, 1, 2] = Operation.FULL
        assert np.array_equal(found.schedule.operations, expected)


# -- broken budgets --------------------------------------------------------------------------


@pytest.mark.parametrize("resource", range(5))
def test_a_plan_that_breaks_one_budget_is_a_bug(resource):
    budget = Budget(speed=2.0, deadline=3.0)
    schedule = Schedule(np.ones((1, 1, 1), dtype=np.int8))
    clients, amounts = [client(0), client(1, budget=budget)], [5, 6, 7, 8, 6]
    capacity = np.array([[9, 9, 9, 9], amounts[:4]])

    def refuse(amounts):
        planned = [Assignment(i, schedule, Cost(*amounts)) for i in range(2)]
        Planner._refuse_broken_budgets(clients, planned, capacity)

    refuse(amounts)  # all there is
    amounts[resource] += 1
    names = ["flops", "memory", "bytes_up", "bytes_down"]
    used = rf"use \[{amounts[resource]}\] of \['{names[resource]}'\]" if resource < 4 else "3.5 s"
    with pytest.raises(RunError, match=f"planner bug: client 1 would .*{used}"):
        refuse(amounts)
