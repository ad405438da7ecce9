"""Plans under LoRA, where FLOPs depend on which block is the lowest that trains."""

from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.costs.resources import MEMORY_MARGIN, RESOURCES
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.planning.assignment import Participant
from d2ft_fl.planning.client_knapsacks import ClientKnapsacks
from d2ft_fl.planning.cost_tables import FLOPS, MEMORIES
from d2ft_fl.planning.planner import Planner
from d2ft_fl.planning.problem import used
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import TARGETS, build, cost_model

EXAMPLES = 20
SUBSETS = st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True).map(tuple)


@cache
def costs_of(targets=TARGETS, slots=1, depth=2, heads=2, **changes):
    arch = with_lora(build(depth=depth, num_heads=heads)[1], Lora(rank=4, targets=targets))
    return cost_model(arch, slots, batch_size=8, **changes)


def plan(costs, capacity, scores=None, deadline=None, **options):
    grid = costs.arch.blocks, costs.arch.heads
    backward, forward = np.ones((2, *grid)) if scores is None else scores
    budget = Budget(speed=1e6, deadline=deadline) if deadline else Budget()
    client = Participant(0, EXAMPLES, budget, np.asarray(capacity))
    (found,) = Planner(costs, **options).plan([client], backward, forward)
    return found


def only(flops):
    """Budgets of nothing but FLOPs."""
    return [flops if resource == "flops" else UNLIMITED for resource in RESOURCES]


@cache
def everything_there_is(targets, frozen):
    """All schedules of one slot of a small model, and their costs."""
    costs = costs_of(targets)
    offered = [o for o in Operation if frozen or o is not Operation.FROZEN]
    every = np.array(list(product(offered, repeat=4)), dtype=np.int8).reshape(-1, 1, 2, 2)
    return every, costs.costs(every, np.full(len(every), EXAMPLES))


def utility(operations, scores, frozen_weight):
    """What schedules [n, 1, blocks, heads] are worth, as the planner's docstring says."""
    (operations,) = operations.transpose(1, 0, 2, 3)
    full, runs = operations == Operation.FULL, operations != Operation.SHORTCUT
    below = ~np.logical_or.accumulate(full.any(axis=2), axis=1)[..., None]
    uncut = full | (operations == Operation.FROZEN) | (below & runs)
    value = scores[0] * full + scores[1] * (runs + frozen_weight * uncut)
    return value.sum(axis=(1, 2))


@settings(max_examples=80, deadline=None)
@given(SUBSETS, st.sampled_from([0.0, 1.0]), st.floats(0.1, 1.1), st.integers(0, 2), st.data())
def test_no_schedule_there_is_exceeds_the_bound_of_a_plan(targets, frozen, share, which, data):
    """Against all schedules: none that keeps the budget is worth more than the gap admits."""
    seed = data.draw(st.integers(0, 999))
    costs, (every, spent) = costs_of(targets), everything_there_is(targets, bool(frozen))
    capacity = np.full(4, UNLIMITED)
    capacity[which] = int(share * spent[:, which].max())
    scores = np.random.default_rng(seed).random((2, 2, 2))
    found = plan(costs, capacity, scores, frozen_weight=frozen)
    assert (found.cost.vector() <= capacity).all()
    fits = (spent <= capacity).all(axis=1)
    if found.schedule.sits_out:
        assert found.gap is None
        return
    if frozen:  # is worth something where something trains
        fits &= (every == Operation.FULL).any(axis=(1, 2, 3))
    best = utility(every[fits], scores, frozen).max(initial=0.0)
    own = utility(found.schedule.operations[None], scores, frozen)[0]
    assert own >= best * (1 - found.gap) - 1e-9


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("options", [{}, {"frozen_weight": 1.0}, {"method": "two-stage"}])
def test_the_exact_cost_of_training_everything_affords_it(slots, options):
    costs = costs_of(slots=slots, depth=3)
    everything = costs.everything()
    flops = costs.flops(everything, EXAMPLES)
    assert plan(costs, only(flops), **options).cost.flops == flops
    assert plan(costs, only(flops - 1), **options).cost.flops < flops


def test_the_exact_cost_of_training_the_upper_blocks_affords_it():
    """The lowest of them is spared the gradient of its input."""
    costs = costs_of(depth=3)
    operations = costs.everything().operations.copy()
    operations[:, 0] = Operation.FORWARD_ONLY
    schedule = Schedule(operations)
    scores = np.ones((2, 3, 2))
    scores[0, 0] = 0.0  # training the first block is worth nothing
    found = plan(costs, only(costs.flops(schedule, EXAMPLES)), scores)
    assert np.array_equal(found.schedule.operations, operations)


def test_a_deadline_is_met_by_the_exact_cost():
    costs = costs_of(depth=3)
    whole = costs.cost(costs.everything(), EXAMPLES)
    operations = np.zeros((1, costs.arch.blocks, costs.arch.heads), dtype=np.int8)
    operations[0, -1, -1] = Operation.FULL
    least = costs.cost(Schedule(operations), EXAMPLES).work
    assert plan(costs, only(UNLIMITED), deadline=1.001 * whole.work / 1e6).cost == whole
    half = plan(costs, only(UNLIMITED), deadline=0.5 * (least + whole.work) / 1e6).cost
    assert 0 < half.flops < whole.flops
    assert half.work <= 0.5 * (least + whole.work)


@settings(max_examples=60, deadline=None)
@given(SUBSETS, st.integers(1, 3), st.booleans(), st.integers(0, 999))
@example(("qkv",), 2, False, 333)
@example(("fc2",), 3, True, 621962)  # each slot has a lowest block of its own
@example(("qkv", "proj", "fc1", "fc2"), 3, False, 702910)
def test_prices_are_above_costs_by_the_stated_excess_at_most(targets, slots, checkpointing, seed):
    costs = costs_of(targets, slots, 3, 4, checkpointing=checkpointing)
    client, scores = Participant(0, EXAMPLES, Budget(), np.zeros(4)), np.ones((1, 12))
    chunk = ClientKnapsacks(Planner(costs), [client], slots, 0, scores, scores)
    (table,), which = chunk.tables
    options = len(chunk.patterns.full)
    draw = np.random.default_rng(seed)
    choice = draw.choice(options, size=(1, 12), p=draw.dirichlet(np.full(options, 0.5)))
    operations, _ = chunk._materialise(choice)
    trains = (operations == Operation.FULL).any()
    if not (trains and (operations != Operation.SHORTCUT).any(axis=(0, 2, 3)).all()):
        return  # slots that do nothing are not run at all
    priced = table.constant + used(choice, chunk.items, chunk.structure, which)[0]
    exact = costs.cost(Schedule(operations[0]), EXAMPLES)
    assert 0 <= priced[FLOPS] - exact.flops <= table.excess[FLOPS]
    peak = exact.memory - exact.memory // (MEMORY_MARGIN + 1)  # without the model's margin
    assert (priced[MEMORIES] - table.excess[MEMORIES] <= peak).all()
