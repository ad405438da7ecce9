import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.budgets import UNLIMITED, Budget
from d2ft_fl.planner import Participant, Planner
from d2ft_fl.subnets import Operation
from tests.conftest import build, cost_model

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
    wanted = [keywords.pop("score_examples", 0)]
    (assignment,) = planner.plan([client], *scores, score_examples=wanted, **keywords)
    return assignment, capacity, scores, planner


def worth(assignment, scores, weight=1.0):
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
        ratios.append(worth(joint, scores) / max(1e-9, worth(staged, scores)))
    assert np.mean(ratios) > 1.0
    assert np.min(ratios) > 0.96


def test_joint_beats_two_stages_where_compute_binds():
    gains = []
    for seed in range(8):
        shares = [0.5, None, None, None]
        joint, _, scores, _ = plan(shares, seed=seed)
        staged, *_ = plan(shares, method="two-stage", seed=seed)
        gains.append(worth(joint, scores) / worth(staged, scores))
    assert np.mean(gains) > 1.01


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
    assert rich.score_examples == 4
    assert (rich.cost.vector() <= capacity).all()
    assert worth_of_full(rich) <= worth_of_full(plain)
    poor, *_ = plan([0.6, 1.0, 1.0, 0.5], score_examples=4)  # the whole model does not go down
    assert poor.score_examples == 0


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
        now = worth(assignment, scores)
        assert now >= before
        assert assignment.cost.memory >= 0.85 * capacity[1]
        before = now
