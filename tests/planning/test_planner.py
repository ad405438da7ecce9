from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.probe_costs import Probes
from d2ft_fl.planning import client_knapsacks
from d2ft_fl.planning.assignment import Participant
from d2ft_fl.planning.planner import Planner
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import Round
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.subnets.packing import down_spec, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.sizes import MESSAGE_HEADER, TENSOR_HEADER
from tests.conftest import build, cost_model, random_schedule

_, ARCH = build(depth=3, num_heads=4)
SHARES = st.lists(st.floats(0.02, 1.1), min_size=4, max_size=4)


def plan(shares, slots=1, method="joint", seed=0, examples=40, options=(), **keywords):
    options = dict(options)
    costs = cost_model(ARCH, slots, batch_size=8)
    full = costs.full_cost(examples).vector()
    capacity = np.array(
        [UNLIMITED if s is None else int(s * f) for s, f in zip(shares, full, strict=True)]
    )
    draw = np.random.default_rng(seed)
    scores = draw.random((2, ARCH.blocks, ARCH.heads))
    planner = Planner(costs, method, **options)
    client = Participant(3, examples, Budget(), capacity)
    wanted = [Probes(keywords.pop("score_examples", 0))]
    (assignment,) = planner.plan([client], *scores, probes=wanted, **keywords)
    return assignment, capacity, scores, planner


def utility(assignment, scores, weight=1.0):
    operations = assignment.schedule.operations
    full = (operations == Operation.FULL).mean(axis=0)
    runs = (operations != Operation.SHORTCUT).mean(axis=0)
    return float((scores[0] * full + weight * scores[1] * runs).sum())


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(1, 5), st.sampled_from(["joint", "two-stage"]), st.integers(0, 99))
def test_no_plan_breaks_a_budget(shares, slots, method, seed):
    assignment, capacity, *_ = plan(shares, slots, method, seed)
    assert (assignment.cost.vector() <= capacity).all()
    assert assignment.schedule.slots == slots


def test_without_limits_everything_is_full():
    for slots in (1, 3):
        for method in ("joint", "two-stage"):
            assignment, *_ = plan([None] * 4, slots, method)
            assert (assignment.schedule.operations == Operation.FULL).all()


def test_a_whole_budget_affords_full_fine_tuning():
    assignment, *_ = plan([1.0, 1.0, 1.0, 1.0], slots=1)
    assert (assignment.schedule.operations == Operation.FULL).all()


@pytest.mark.parametrize("resource", range(4))
def test_a_budget_too_small_for_anything_sits_out(resource):
    shares = [None] * 4
    shares[resource] = 0.0
    assignment, *_ = plan(shares)
    assert assignment.schedule.sits_out
    assert not assignment.cost.vector().any()


def test_joint_is_hardly_ever_worse_than_two_stages_and_better_on_the_mean():
    ratios = []
    for seed in range(40):
        shares = np.random.default_rng(seed).uniform(0.2, 1.0, 4)
        joint, _, scores, _ = plan(shares, seed=seed)
        staged, *_ = plan(shares, method="two-stage", seed=seed)
        ratios.append(utility(joint, scores) / max(1e-9, utility(staged, scores)))
    assert np.mean(ratios) > 1.08
    assert np.min(ratios) > 0.98


def test_joint_beats_two_stages_where_compute_binds():
    gains = []
    for seed in range(8):
        shares = [0.5, None, None, None]
        joint, _, scores, _ = plan(shares, seed=seed)
        staged, *_ = plan(shares, method="two-stage", seed=seed)
        gains.append(utility(joint, scores) / utility(staged, scores))
    assert np.mean(gains) > 1.05


def test_two_stages_settle_full_by_backward_scores_alone():
    assignment, capacity, scores, planner = plan([0.5, None, None, None], method="two-stage")
    client = Participant(3, 40, Budget(), capacity)
    (other,) = planner.plan([client], scores[0], scores[1][::-1].copy())
    assert np.array_equal(assignment.schedule.trained, other.schedule.trained)


def test_the_plan_is_a_function_of_its_input():
    first, *_ = plan([0.4, 0.6, 0.5, 0.9], slots=5)
    second, *_ = plan([0.4, 0.6, 0.5, 0.9], slots=5)
    assert np.array_equal(first.schedule.operations, second.schedule.operations)


def test_partly_scheduled_subnets_rotate_over_slots():
    assignment, *_ = plan([0.5, None, None, None], slots=5)
    per_slot = (assignment.schedule.operations == Operation.FULL).sum(axis=(1, 2))
    assert per_slot.max() - per_slot.min() <= ARCH.blocks


def test_scoring_is_charged_and_skipped_where_it_does_not_fit():
    rich, capacity, *_ = plan([0.6, None, None, None], score_examples=4)
    plain, *_ = plan([0.6, None, None, None])
    assert rich.probes.scored == 4
    assert (rich.cost.vector() <= capacity).all()
    assert worth_of_full(rich) <= worth_of_full(plain)
    poor, *_ = plan([0.6, 1.0, 1.0, 0.5], score_examples=4)  # the whole model does not go down
    assert poor.probes.scored == 0


def worth_of_full(assignment):
    return int((assignment.schedule.operations == Operation.FULL).sum())


def test_a_client_with_fewer_examples_than_slots_can_work():
    assignment, capacity, *_ = plan([0.8, 1.0, 1.0, 1.0], slots=5, examples=2)
    assert (assignment.cost.vector() <= capacity).all()
    assert not assignment.schedule.sits_out


@pytest.mark.parametrize("examples", [1, 8, 9, 40])
def test_more_memory_is_worth_more_and_is_used(examples):
    """Whether or not there is a later batch, whose optimiser state counts."""
    before = 0.0
    for share in (0.3, 0.5, 0.7, 0.9):
        assignment, capacity, scores, _ = plan([None, share, None, None], examples=examples)
        now = utility(assignment, scores)
        assert now >= before
        assert assignment.cost.memory >= 0.85 * capacity[1]
        before = now


# -- FROZEN ----------------------------------------------------------------------------------


def value_of(assignment, scores, frozen_weight, forward_weight=1.0):
    """The module's formula, and below the lowest block that trains FORWARD_ONLY counts as FROZEN.

    For one slot.
    """
    operations = assignment.schedule.operations[0]
    full, runs = operations == Operation.FULL, operations != Operation.SHORTCUT
    below = ~np.logical_or.accumulate(full.any(axis=1))[:, None]
    uncut = full | (operations == Operation.FROZEN) | (runs & below)
    backward, forward = scores
    return float(
        (backward * full + forward * (forward_weight * runs + frozen_weight * uncut)).sum()
    )


@settings(max_examples=30, deadline=None)
@given(SHARES, st.sampled_from([1, 3]), st.floats(0.05, 2.0), st.integers(0, 99))
def test_plans_with_frozen_keep_budgets_and_cut_no_gradient_that_is_not_there(
    shares, slots, weight, seed
):
    options = {"frozen_weight": weight}
    assignment, capacity, *_ = plan(shares, slots, seed=seed, options=options)
    assert (assignment.cost.vector() <= capacity).all()
    operations = assignment.schedule.operations
    trains = (operations == Operation.FULL).any(axis=(0, 2))
    lowest = int(trains.argmax()) if trains.any() else len(trains)
    assert not (operations[:, :lowest] == Operation.FROZEN).any()


@pytest.mark.parametrize("method,weight", [("joint", 0.0), ("two-stage", 1.0)])
@pytest.mark.parametrize("slots", [1, 3])
def test_frozen_is_not_planned_where_it_is_not_offered(method, weight, slots):
    for seed in range(5):
        shares = np.random.default_rng(seed).uniform(0.2, 1.0, 4)
        options = {"frozen_weight": weight}
        assignment, *_ = plan(shares, slots, method, seed, options=options)
        assert not (assignment.schedule.operations == Operation.FROZEN).any()


def test_frozen_is_planned_where_it_is_worth_a_lot_and_training_costs_too_much():
    """Upload affords little to train; the forward scores are all that counts else."""
    found = 0
    for seed in range(5):
        options = {"frozen_weight": 2.0}
        assignment, *_ = plan([None, None, 0.5, None], seed=seed, options=options)
        found += (assignment.schedule.operations == Operation.FROZEN).any()
    assert found == 5


def test_offering_frozen_is_never_worse_by_much_and_better_on_the_mean():
    ratios = []
    for seed in range(30):
        shares = np.random.default_rng(seed).uniform(0.2, 1.0, 4)
        options = {"frozen_weight": 1.0}
        offered, _, scores, _ = plan(shares, seed=seed, options=options)
        without, *_ = plan(shares, seed=seed)
        one, other = (value_of(a, scores, 1.0) for a in (offered, without))
        ratios.append(one / other if other else 1.0)
    assert np.mean(ratios) > 1.0
    assert np.min(ratios) > 0.99


# -- the solver's costs against the cost model -----------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("rotation", [0, 2])
@pytest.mark.parametrize("examples", [7, 40])
def test_what_the_solver_adds_up_is_what_the_cost_model_says(slots, rotation, examples):
    """FLOPs and bytes, exactly, of schedules that leave no slot empty and hold no FROZEN."""
    costs = cost_model(ARCH, slots, batch_size=8)
    planner, heads = Planner(costs), ARCH.heads
    table, patterns = planner.table(examples, slots, rotation), planner.patterns(slots)
    subnets, options = table.items.shape[:2]
    start = (np.add(*np.divmod(np.arange(subnets), heads)) + rotation) % slots
    compared = 0
    for seed in range(20):
        choice = np.random.default_rng(seed).integers(0, options, subnets)
        choice[: seed % 9] = 0  # whole blocks that do nothing
        columns = patterns.operations[choice, start]  # [subnets, slots]
        schedule = Schedule(columns.T.reshape(slots, ARCH.blocks, heads))
        if not schedule.active.all():
            continue
        compared += 1
        added = table.constant + table.items[np.arange(subnets), choice].sum(axis=0)
        levels = patterns.levels[choice].reshape(ARCH.blocks, heads).max(axis=1)
        for block, level in enumerate(levels):
            added = added + table.openings[block, :level].sum(axis=0)
        exact = costs.cost(schedule, examples)
        flops, _, up, down = added[:4].tolist()
        assert (flops, up, down) == (exact.flops, exact.bytes_up, exact.bytes_down)
        one, other = up_spec(ARCH, schedule), down_spec(ARCH, schedule)
        assert up == bytes_of(one) + MESSAGE_HEADER
        assert down == bytes_of(other) + MESSAGE_HEADER + 2 * schedule.operations.size
    assert compared >= 15


def bytes_of(spec):
    """Of float32 tensors, with what their names and shapes take."""
    return sum(4 * int(np.prod(shape)) + TENSOR_HEADER for shape in spec.values())


@pytest.mark.parametrize(
    "policy", [{}, {"micro_batches": 3}, {"checkpointing": True}, {"epochs": 2}]
)
@pytest.mark.parametrize("slots", [1, 3])
def test_costs_of_many_clients_are_those_of_each(slots, policy):
    costs = cost_model(ARCH, slots, batch_size=8, **policy)
    examples = np.array([0, 1, 7, 8, 9, 40, 41, 3])
    schedules = [random_schedule(ARCH, slots, seed) for seed in range(len(examples))]
    operations = np.stack([s.operations for s in schedules])
    operations[6] = Operation.SHORTCUT
    together = costs.costs(operations, examples)
    for row, one, count in zip(together, operations, examples.tolist(), strict=True):
        assert row.tolist() == costs.cost(Schedule(one), count).vector().tolist()
    assert not together[[0, 6]].any()


# -- many clients ----------------------------------------------------------------------------


def clients_of(costs, count, seed=0, budget=None, low=0.1):
    """Clients with random shares of the four budgets, on different amounts of data."""
    draw = np.random.default_rng(seed)
    found = []
    for client in range(count):
        examples = int(draw.choice([5, 16, 40]))
        full = costs.full_cost(examples).vector()
        capacity = (full * draw.uniform(low, 1.0, 4)).astype(np.int64)
        found.append(Participant(client, examples, budget or Budget(), capacity))
    return found


@pytest.mark.parametrize("method", ["joint", "two-stage"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("frozen_weight", [0.0, 0.5])
def test_planning_many_is_planning_one_by_one(method, slots, frozen_weight):
    """Also with scores of their own, scoring passes and deadlines."""
    costs = cost_model(ARCH, slots, batch_size=8)
    planner = Planner(costs, method, frozen_weight=frozen_weight)
    clients = clients_of(costs, 10)
    clients[4] = replace(clients[4], capacity=np.zeros(4, dtype=np.int64))
    clients[7] = replace(clients[7], capacity=np.full(4, UNLIMITED))
    timed = [replace(c, budget=Budget(deadline=50.0, speed=1e8)) for c in clients]
    scores = np.random.default_rng(1).random((2, len(clients), ARCH.blocks, ARCH.heads))
    wanted = [Probes(4 if i % 3 == 0 else 0) for i in range(len(clients))]
    for everyone in (clients, timed):
        together = planner.plan(everyone, *scores, rotation=2, probes=wanted)
        assert [a.client for a in together] == list(range(len(clients)))
        for i, assignment in enumerate(together):
            (alone,) = planner.plan([everyone[i]], *scores[:, i], 2, wanted[i : i + 1])
            assert np.array_equal(alone.schedule.operations, assignment.schedule.operations)
            assert (alone.cost, alone.gap) == (assignment.cost, assignment.gap)
            assert alone.probes == assignment.probes
    assert together[4].schedule.sits_out
    assert not together[7].schedule.sits_out


def test_nobody_to_plan_for():
    costs = cost_model(ARCH)
    assert Planner(costs).plan([], *np.ones((2, ARCH.blocks, ARCH.heads))) == []


# -- deadlines -------------------------------------------------------------------------------


RATES = st.one_of(st.none(), st.floats(1e3, 1e12), st.sampled_from([1.0, 1e6, 1e9]))


def by_deadline(
    budget, shares=(None,) * 4, slots=1, compensated=False, score_examples=0, **options
):
    """One client's plan under a deadline, with UNLIMITED where shares are None."""
    costs = replace(cost_model(ARCH, slots, batch_size=8), compensated=compensated)
    full = costs.full_cost(40).vector()
    capacity = [UNLIMITED if s is None else int(s * f) for s, f in zip(shares, full, strict=True)]
    client = Participant(0, 40, budget, np.array(capacity, dtype=np.int64))
    scores = np.random.default_rng(0).random((2, ARCH.blocks, ARCH.heads))
    planner = Planner(costs, **options)
    (assignment,) = planner.plan([client], *scores, probes=[Probes(score_examples)])
    return assignment


def seconds_of_all(budget, slots=1, compensated=False):
    costs = replace(cost_model(ARCH, slots, batch_size=8), compensated=compensated)
    return budget.seconds(costs.cost(costs.everything(), 40))


def seconds_of_one_head(budget, slots):
    """Hardly any arithmetic: what a client's passes and steps take of themselves."""
    operations = np.zeros((slots, ARCH.blocks, ARCH.heads), dtype=np.int8)
    operations[:, -1, -1] = Operation.FULL
    costs = cost_model(ARCH, slots, batch_size=8)
    return budget.seconds(costs.cost(Schedule(operations), 40))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(RATES, RATES, RATES),
    st.floats(0.01, 1.2) | st.just(1.0),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.sampled_from([0, 4]),
)
def test_a_deadline_is_kept(rates, share, slots, compensated, score_examples):
    budget = Budget(None, None, None, None, *rates)
    whole = seconds_of_all(budget, slots, compensated)
    budget = replace(budget, deadline=max(1e-9, share * whole))
    assignment = by_deadline(
        budget, slots=slots, compensated=compensated, score_examples=score_examples
    )
    assert budget.seconds(assignment.cost) <= budget.deadline


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("slots", [1, 3])
def test_most_of_the_time_is_used_to_train_some(slots, share):
    budget = Budget(speed=1e8, bandwidth_up=1e5, bandwidth_down=1e6)
    least, most = seconds_of_one_head(budget, slots), seconds_of_all(budget, slots)
    budget = replace(budget, deadline=least + share * (most - least))
    assignment = by_deadline(budget, slots=slots, forward_weight=0.1)
    assert 0.8 * budget.deadline <= budget.seconds(assignment.cost) <= budget.deadline
    full = assignment.schedule.operations == Operation.FULL
    assert 0 < full.sum() < full.size


@pytest.mark.parametrize("method,changes", [("joint", True), ("two-stage", False)])
def test_time_that_is_left_changes_no_plan_in_two_stages(method, changes, monkeypatch):
    """Which are D2FT's own, deadline or not."""
    budget = Budget(speed=1e8, bandwidth_up=1e5, bandwidth_down=1e6)
    least, most = seconds_of_one_head(budget, 3), seconds_of_all(budget, 3)
    budget = replace(budget, deadline=least + 0.75 * (most - least))
    options = {"slots": 3, "forward_weight": 0.1, "method": method}
    found = by_deadline(budget, **options).schedule.operations
    monkeypatch.setattr(client_knapsacks, "UNUSED", 2.0)  # may be left: all of it
    assert (found != by_deadline(budget, **options).schedule.operations).any() == changes


@pytest.mark.parametrize("score_examples", [0, 4])
def test_no_time_is_sitting_out(score_examples):
    budget = Budget(deadline=1e-9, speed=1e9, bandwidth_down=1e6)
    assert by_deadline(budget, score_examples=score_examples).schedule.sits_out


@pytest.mark.parametrize("deadline", [None, 1e6, 1e12, 1e30])
def test_without_a_deadline_or_with_all_the_time_nothing_changes(deadline):
    shares = [0.5, 0.7, 0.6, 0.8]
    budget = Budget(speed=1e9, bandwidth_up=1e6, bandwidth_down=1e6)
    plain, timed = (
        by_deadline(budget, shares),
        by_deadline(replace(budget, deadline=deadline), shares),
    )
    assert np.array_equal(plain.schedule.operations, timed.schedule.operations)


def test_clients_without_a_deadline_are_none_the_slower_beside_one_that_has_one():
    """Not even where, at their speed, a round would take longer than 64 bits can count."""
    costs = cost_model(ARCH, batch_size=8)
    slow, hasty = Budget(speed=1e-3, bandwidth_up=1e-3), Budget(deadline=1.0, speed=1e8)
    clients = clients_of(costs, 4, budget=slow)
    scores = np.random.default_rng(0).random((2, ARCH.blocks, ARCH.heads))
    alone = Planner(costs).plan(clients, *scores)
    clients.append(replace(clients[0], client=4, budget=hasty))
    beside = Planner(costs).plan(clients, *scores)
    for one, other in zip(alone, beside[:4], strict=True):
        assert np.array_equal(one.schedule.operations, other.schedule.operations)


# -- coupling --------------------------------------------------------------------------------


def trainers(planner, clients, scores):
    """Clients that train each subnet: int64 [blocks, heads]."""
    planned = planner.plan(clients, *scores)
    for assignment, client in zip(planned, clients, strict=True):
        assert (assignment.cost.vector() <= client.capacity).all()
    return np.sum([a.schedule.trained for a in planned], axis=0)


@pytest.mark.parametrize("slots", [1, 3])
def test_spread_trains_more_subnets_by_as_many_clients_as_asked_for(slots):
    """Sixteen clients, each of which affords four to six of twelve subnets."""
    costs = cost_model(ARCH, slots, batch_size=8)
    spread = Planner(costs, coupling="spread", spread_clients=2.0, least_clients=2)
    alone = replace(spread, coupling="none")
    for seed in range(3):
        clients = clients_of(costs, 16, seed, low=0.6)
        scores = np.random.default_rng(seed).random((2, ARCH.blocks, ARCH.heads)) ** 3
        one, other = (trainers(p, clients, scores) for p in (spread, alone))
        assert (one >= 2).sum() > (other >= 2).sum()
        assert (one >= 2).all()


def test_spread_clients_that_cannot_do_anything_sit_out():
    costs = cost_model(ARCH, batch_size=8)
    planner = Planner(costs, coupling="spread")
    clients = clients_of(costs, 4, low=0.5)
    clients[1] = replace(clients[1], capacity=np.zeros(4, dtype=np.int64))
    planned = planner.plan(clients, *np.ones((2, ARCH.blocks, ARCH.heads)))
    assert [a.schedule.sits_out for a in planned] == [False, True, False, False]


@pytest.mark.parametrize("rounds", [1, 3, 4, 5, 36])
def test_over_the_agenda_every_subnet_has_its_turn_exactly_once(rounds):
    federation = Federation(Components(RunConfig(agenda_rounds=rounds)), ARCH)
    backward = np.random.default_rng(0).random((ARCH.blocks, ARCH.heads))
    state, turns = State(0, {}), np.zeros(backward.shape, dtype=int)
    each = -(-backward.size // rounds)
    for number in range(-(-backward.size // each)):
        agenda = Round(federation, state, []).agenda(backward)
        due = agenda != backward
        assert due.sum() == each
        assert agenda[due].min() > agenda[~due].max(initial=0.0)
        turns += due
        last = np.where(due, number + 1, state.last_trained)  # who is due is trained
        state = State(number + 1, {}, last_trained=last)
    assert number < rounds
    assert (turns == 1).all()


def test_what_was_not_trained_in_its_turn_stays_at_the_head_of_the_agenda():
    federation = Federation(Components(RunConfig(agenda_rounds=4)), ARCH)
    backward = np.ones((ARCH.blocks, ARCH.heads))
    last = np.full(backward.shape, 5)
    last[1, 2] = 1
    agenda = Round(federation, State(6, {}, last_trained=last), []).agenda(backward)
    assert agenda[1, 2] == 3
    assert (agenda != backward).sum() == 3
    best = backward.copy()
    best[2] = 2.0  # of equals the block with the highest mean comes first
    agenda = Round(federation, State(6, {}, last_trained=0 * last), []).agenda(best)
    assert np.argwhere(agenda != best).tolist() == [[2, 0], [2, 1], [2, 2]]
