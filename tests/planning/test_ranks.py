"""Ranks by budget: every subnet may train LoRA's factors at a rank of its own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.aggregation.lora_sums import LoraSums, effective_rows, widened
from d2ft_fl.aggregation.update import Update
from d2ft_fl.bench.step import saved_bytes
from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.engine.grouping import storage_order
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.lora.config import Lora, targeted, with_lora
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.planning.assignment import Participant
from d2ft_fl.planning.client_knapsacks import ClientKnapsacks
from d2ft_fl.planning.cost_tables import DOWN, FLOPS, MEMORIES, MEMORY, UP
from d2ft_fl.planning.planner import Planner
from d2ft_fl.planning.problem import used
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.sizes import ELEMENT, MESSAGE_HEADER, TENSOR_HEADER
from tests.aggregation.test_lora_sums import norm
from tests.conftest import build, cost_model, images_for, random_schedule, running, weights_of
from tests.costs.test_lora_costs import MODEL as WIDE_MODEL
from tests.costs.test_lora_costs import adapted as wide_adapted
from tests.costs.test_lora_costs import measure
from tests.engine.test_lora_engine import SUBSETS, adapted, held, reference
from tests.engine.test_partial_model import gradients, relative

MOST = 4


def with_ranks(schedule, seed, most=MOST):
    """The schedule with a random rank for every subnet, trained or not."""
    draw = np.random.default_rng([seed, 1])
    return replace(schedule, ranks=draw.integers(1, most + 1, size=schedule.operations.shape[1:]))


def ranked_schedule(arch, slots, seed):
    return with_ranks(random_schedule(arch, slots, seed), seed, arch.rank)


def narrow(p, whole, schedule):
    """What travels up of a whole tensor, by hand: head by head, column by column."""
    if p.kind is Kind.SLICED:
        packed = [
            p.pack(whole, [head])[:, : schedule.ranks[p.block, head] if p.factor else None]
            for head in schedule.heads(schedule.trained, p.block)
        ]
        return torch.cat([part.flatten() for part in packed]) if p.factor else torch.cat(packed)
    if not p.factor:
        return whole
    most = schedule.ranks[p.block][schedule.trained[p.block]].max()
    return whole[:most] if p.factor == "A" else whole[:, :most]


# -- the engine ----------------------------------------------------------------------------------


def effective_changes(arch, leaves, operations, ranks):
    """B A of every product: of each head, from the columns that it trains and, still, the rest."""
    found = {}
    for weight, a, b in targeted(arch):
        total = torch.zeros(weight.shape, dtype=torch.float64)
        whole_a, whole_b = leaves[a.name], leaves[b.name]
        for head in range(arch.heads):
            full = operations[weight.block, head] == Operation.FULL
            rank = int(ranks[weight.block, head]) if full else 0
            product = whole_b[:, :rank] @ whole_a[:rank]
            product = product + whole_b[:, rank:].detach() @ whole_a[rank:].detach()
            mask = torch.zeros(weight.shape, dtype=torch.float64)
            mask.index_fill_(weight.axis, weight.index([head]), 1)
            total = total + mask * product
        found[weight.name] = total
    return found


def ranked_reference(model, arch, leaves, state, images, operations, ranks):
    """The reference of test_lora_engine, with the effective change as B and the identity as A."""
    changes = effective_changes(arch, leaves, operations, ranks)
    made = {}
    for weight, a, b in targeted(arch):
        made[b.name] = changes[weight.name]
        made[a.name] = torch.eye(weight.shape[1], dtype=torch.float64)
    return reference(model, arch, made, state, images, operations)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 3),
    examples=st.integers(1, 6),
    targets=SUBSETS,
    recompute=st.booleans(),
)
def test_gradients_are_those_of_heads_with_their_own_ranks(
    seed, slots, examples, targets, recompute
):
    """Values and gradients of random schedules and ranks, in double precision."""
    model, arch, state = adapted(Lora(rank=MOST, alpha=5.0, targets=tuple(targets)))
    schedule = ranked_schedule(arch, slots, seed)
    sizes = running(schedule, examples)
    if not sum(sizes):
        return
    images, labels = images_for(arch, sum(sizes), torch.float64)
    leaves = {p.name: state[p.name].clone().requires_grad_() for p in arch.parameters if p.factor}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(arch.by_name[name].trains)
    expected, start = [], 0
    for slot, size in enumerate(sizes):
        if size:
            part, operations = images[start : start + size], schedule.operations[slot]
            expected.append(
                ranked_reference(model, arch, leaves, state, part, operations, schedule.ranks)
            )
            start += size
    expected = torch.cat(expected)
    F.cross_entropy(expected, labels).backward()
    partial = held(arch, state, schedule, recompute=recompute)
    logits = partial(images, sizes)
    F.cross_entropy(logits, labels).backward()
    assert relative(logits, expected) <= 1e-10
    found = gradients(partial)
    assert {n: tuple(g.shape) for n, g in found.items()} == up_spec(arch, schedule)
    for name, gradient in found.items():
        p = arch.by_name[name]
        wanted = (leaves[name] if p.factor else model.get_parameter(name)).grad
        wanted = torch.zeros(p.shape, dtype=torch.float64) if wanted is None else wanted
        wanted = narrow(p, wanted, schedule)
        assert (gradient - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12, name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100_000), slots=st.integers(1, 3))
def test_what_travels_up_is_what_is_held_to_train(seed, slots):
    _, arch, state = adapted(Lora(rank=MOST), dtype=torch.float32)
    schedule = ranked_schedule(arch, slots, seed)
    partial = held(arch, state, schedule, torch.float32)
    update = partial.update()
    assert {n: tuple(t.shape) for n, t in update.items()} == up_spec(arch, schedule)
    for name, tensor in update.items():
        assert torch.equal(tensor, narrow(arch.by_name[name], state[name], schedule)), name
    sent = sum(t.numel() for t in update.values())
    assert sum(g.numel() for g in partial.gradients()) == sent
    assert sum(e.value.numel() for e in partial.entries()) == sent
    factors = {f"{p.block}.{p.role}" for p in arch.parameters if p.factor}
    held_factors = sum(t.numel() for n, t in partial.held() if n in factors)
    assert held_factors == sum(t.numel() for n, t in update.items() if arch.by_name[n].factor)


def test_all_at_the_largest_rank_is_no_rank_at_all():
    """The same arithmetic, in other shapes."""
    _, arch, state = adapted(Lora(rank=MOST))
    images, labels = images_for(arch, 4, torch.float64)
    schedule = random_schedule(arch, 2, 11)
    found = []
    for ranks in (None, np.full((arch.blocks, arch.heads), MOST)):
        own = replace(schedule, ranks=ranks)
        partial = held(arch, state, own)
        F.cross_entropy(partial(images, running(own, 4)), labels[:4]).backward()
        found.append({n: g.flatten() for n, g in gradients(partial).items()})
    assert all(torch.equal(found[1][n], g) for n, g in found[0].items())


def test_heads_of_a_rank_lie_side_by_side_the_largest_first():
    operations = np.array([[3, 3, 1, 3, 3, 3]], dtype=np.int8)
    assert storage_order(operations, {0: 2, 1: 4, 3: 2, 4: 4, 5: 1}) == [1, 4, 0, 3, 5, 2]


def test_ranks_are_checked():
    _, arch, _ = adapted(Lora(rank=2))
    schedule = Schedule.filled(Operation.FULL, 1, arch.blocks, arch.heads)
    with pytest.raises(ConfigError, match=r"ranks are int64 \[blocks, heads\]"):
        replace(schedule, ranks=np.ones((2, 2), dtype=np.int64))
    for rank, lora in ((3, True), (0, True), (1, False)):
        own = replace(schedule, ranks=np.full((arch.blocks, arch.heads), rank))
        with pytest.raises(ConfigError, match="ranks 1 to 2" if lora else "only LoRA has ranks"):
            cost_model(arch if lora else build()[1]).cost(own, 4)


# -- costs ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    slots=st.integers(1, 3),
    batch=st.integers(1, 8),
    examples=st.integers(1, 12),
    targets=SUBSETS,
    frozen=st.sampled_from(["", "A", "B"]),
    dropout=st.sampled_from([0.0, 0.1]),
    precision=st.sampled_from(["fp32", "bf16"]),
    checkpointing=st.booleans(),
    micro_batches=st.integers(1, 2),
)
def test_counted_equals_predicted(
    seed, slots, batch, examples, targets, frozen, dropout, **options
):
    """FLOPs exactly; peak memory never above the prediction."""
    still = [(target, frozen) for target in targets]
    arch, state = wide_adapted(rank=MOST, targets=tuple(targets), dropout=dropout, frozen=still)
    schedule = ranked_schedule(arch, slots, seed)
    predicted, meter = measure(
        arch, state, WIDE_MODEL, schedule, examples, batch_size=batch, **options
    )
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory


@pytest.mark.parametrize("most", [MOST, 16])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_peak_memory_is_predicted_within_ten_percent(seed, slots, most):
    arch, state = wide_adapted(rank=most)
    schedule = ranked_schedule(arch, slots, seed)
    predicted, meter = measure(arch, state, WIDE_MODEL, schedule, 24, batch_size=8)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.1 * meter.peak_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_saved_bytes_are_predicted_within_two_percent(seed, dropout, checkpointing):
    arch, state = wide_adapted(rank=16, dropout=dropout)
    schedule = ranked_schedule(arch, 2, seed)
    sizes = running(schedule, 6)
    costs = cost_model(arch, 2, checkpointing=checkpointing)
    partial = PartialModel(TimmViT(WIDE_MODEL), arch, Numerics.of(costs.options))
    partial.reset(schedule, pack_for(arch, state, schedule))
    partial.train(True)
    images, labels = images_for(arch, sum(sizes))
    tensors = [t for _, t in partial.held()]
    measured = saved_bytes(lambda: F.cross_entropy(partial(images, sizes), labels), tensors)
    assert costs.saved_bytes(schedule, sizes) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_bytes_up_are_exact(seed):
    arch, _ = wide_adapted(rank=MOST)
    schedule = ranked_schedule(arch, 2, seed)
    spec = up_spec(arch, schedule)
    up = sum(ELEMENT * int(np.prod(shape)) + TENSOR_HEADER for shape in spec.values())
    assert cost_model(arch, 2).bytes_up(schedule) == up + MESSAGE_HEADER


def test_a_rank_for_all_costs_what_an_architecture_of_that_rank_does():
    """But for the message, and the columns that are folded: 2 p D for each of them."""
    wide, slim = (cost_model(wide_adapted(rank=r)[0]) for r in (6, 2))
    schedule = random_schedule(wide.arch, 1, 4)
    low = replace(schedule, ranks=np.full((wide.arch.blocks, wide.arch.heads), 2))
    ours, theirs = wide.cost(low, 8), slim.cost(schedule, 8)
    assert ours.bytes_up == theirs.bytes_up
    assert ours.memory == theirs.memory
    folded = 4 * int((schedule.resident * wide.round_flops.of_merging).sum())
    assert ours.flops == theirs.flops + folded


# -- aggregation ---------------------------------------------------------------------------------

SLOTS = 2
MODEL, BASE = build(depth=2)
SEEDS = st.lists(st.integers(0, 10_000), min_size=2, max_size=4, unique=True)


def setting(rank=MOST):
    arch = with_lora(BASE, Lora(rank=rank, alpha=4.0))
    state = weights_of(MODEL)
    generator = torch.Generator().manual_seed(7)
    for p in arch.parameters:
        if p.factor:
            state[p.name] = 0.2 * torch.randn(p.shape, generator=generator)
    return arch, state


def reply(arch, state, seed, schedule=None):
    """A client's parameters are the global ones plus noise; every third has no ranks of its own."""
    generator = torch.Generator().manual_seed(seed)
    schedule = schedule or random_schedule(arch, SLOTS, seed)
    if seed % 3:
        schedule = with_ranks(schedule, seed, arch.rank)
    tensors = {}
    for name in up_spec(arch, schedule):
        p, old = arch.by_name[name], state[name]
        if schedule.ranks is not None:
            old = narrow(p, old, schedule)
        elif p.kind is Kind.SLICED:
            old = p.pack(old, schedule.heads(schedule.trained, p.block))
        tensors[name] = old + 0.1 * torch.randn(old.shape, generator=generator)
    return Update(schedule, [3 + seed % 5, 2], tensors)


def rows_by_hand(arch, state, r, weight, a, b, head):
    """A head's effective weights in a reply, from whole matrices in numpy: [out, in]."""
    ranks = r.schedule.ranks
    rank = arch.rank if ranks is None else int(ranks[weight.block, head])
    full = widened(arch, state, r).tensors
    theirs = {}
    for p in (a, b):
        theirs[p.name] = state[p.name].clone()
        if p.kind is Kind.SLICED:
            heads = r.schedule.heads(r.schedule.trained, p.block)
            p.unpack_(theirs[p.name], full[p.name], heads)
        else:
            theirs[p.name] = full[p.name]
    new_a, new_b = (theirs[p.name].double().numpy() for p in (a, b))
    old_a, old_b = (state[p.name].double().numpy() for p in (a, b))
    product = new_b[:, :rank] @ new_a[:rank] + old_b[:, rank:] @ old_a[rank:]
    return state[weight.name].double().numpy() + arch.scaling * product


def exact_changes(arch, state, replies):
    """The exact change of every targeted weight, head by head."""
    found = {}
    for weight, a, b in targeted(arch):
        old = state[weight.name].double().numpy() + arch.scaling * (
            state[b.name].double().numpy() @ state[a.name].double().numpy()
        )
        change = np.zeros_like(old)
        for head in range(arch.heads):
            top, bottom = np.zeros_like(old), 0
            for r in replies:
                n = int(r.schedule.examples_trained(r.slot_examples)[weight.block, head])
                if n:
                    own = rows_by_hand(arch, state, r, weight, a, b, head)
                    top, bottom = top + n * (own - old), bottom + n
            where = [slice(None), slice(None)]
            where[weight.axis] = list(weight.rows[head])
            if bottom:
                change[tuple(where)] = (top / bottom)[tuple(where)]
        found[weight.name] = change
    return found


def fold(arch, state, mode, replies):
    sums = LoraSums(arch, state, 1000, mode)
    for r in replies:
        sums.add(r)
    return sums.apply(), sums.error


@settings(max_examples=15, deadline=None)
@given(seeds=SEEDS)
def test_stack_is_exact_for_clients_of_different_ranks(seeds):
    arch, state = setting()
    replies = [reply(arch, state, seed) for seed in seeds]
    new, error = fold(arch, state, "stack", replies)
    assert error is None or error < 1e-6
    for name, change in exact_changes(arch, state, replies).items():
        got = (new[name].double() - state[name].double()).numpy()
        np.testing.assert_allclose(got, change, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seeds=SEEDS)
def test_a_product_is_off_by_the_singular_values_left_out(seeds):
    arch, state = setting()
    replies = [reply(arch, state, seed) for seed in seeds]
    _, error = fold(arch, state, "product", replies)
    if error is None:
        return
    exact, left_out = exact_changes(arch, state, replies), []
    for weight, a, b in targeted(arch):
        if exact[weight.name].any():
            product = arch.scaling * (state[b.name].double() @ state[a.name].double()).numpy()
            values = np.linalg.svd(product + exact[weight.name], compute_uv=False)
            left_out.append(values[arch.rank :])
    assert error * norm(exact.values()) == pytest.approx(norm(left_out), rel=1e-5, abs=1e-5)


def test_the_round_trip_of_the_engine_is_the_effective_weights():
    """What a client's model computes is what the server takes it for, whatever trained."""
    arch, state = setting()
    schedule = with_ranks(Schedule.filled(Operation.FULL, 1, 2, 4), 3)
    partial = PartialModel(TimmViT(build(depth=2)[0]), arch)
    partial.reset(schedule, pack_for(arch, state, schedule))
    for tensor in (*partial.whole().values(), *(e.value for e in partial.entries())):
        with torch.no_grad():
            tensor += 0.05 * torch.randn(tensor.shape)
    rows = effective_rows(arch, state, Update(schedule, [1], partial.update()))
    model = build(depth=2)[0]
    model.load_state_dict({**weights_of(MODEL), **dict(partial.outer.named_parameters())})
    for weight, _, _ in targeted(arch):
        whole = model.get_parameter(weight.name)
        with torch.no_grad():
            weight.unpack_(whole, rows[weight.name].float(), range(4))
    images, _ = images_for(arch, 3)
    torch.testing.assert_close(partial(images, [3]), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["factors", "freeze-a", "alternate", "freeze-common"])
def test_modes_that_cannot_take_ranks_refuse_them(mode):
    arch, state = setting()
    with pytest.raises(
        ConfigError, match="cannot aggregate different ranks; use one of product, stack"
    ):
        LoraSums(arch, state, 10, mode).add(reply(arch, state, 1))


def test_a_reply_with_other_ranks_than_assigned_is_refused():
    arch, state = setting()
    full = Schedule.filled(Operation.FULL, SLOTS, 2, 4)
    r = reply(arch, state, 1, full)
    other = replace(full, ranks=np.full((2, 4), 1))
    sums = LoraSums(arch, state, 100, "stack")
    with pytest.raises(ReplyError, match="has shape"):
        sums.add(replace(r, schedule=other))
    assert all(torch.equal(sums.apply()[n], t) for n, t in state.items())


# -- planning ------------------------------------------------------------------------------------


def plan(shares, ranks=(1, 2), slots=1, seed=0, examples=40, exponent=0.5, **options):
    """One client's assignment under shares of full fine-tuning's costs, its worth, its budgets."""
    arch = with_lora(build(depth=3)[1], Lora(rank=MOST))
    costs = cost_model(arch, slots, batch_size=8)
    full = costs.full_cost(examples).vector()
    capacity = np.array(
        [UNLIMITED if s is None else int(s * f) for s, f in zip(shares, full, strict=True)]
    )
    scores = np.random.default_rng(seed).random((2, arch.blocks, arch.heads))
    planner = Planner(costs, ranks=ranks, rank_exponent=exponent, **options)
    (found,) = planner.plan([Participant(0, examples, Budget(), capacity)], *scores)
    schedule = found.schedule
    trained = (schedule.operations == Operation.FULL).mean(axis=0)
    if schedule.ranks is not None:
        trained = trained * (schedule.ranks / MOST) ** exponent
    runs = (schedule.operations != Operation.SHORTCUT).mean(axis=0)
    return found, float((scores[0] * trained + scores[1] * runs).sum()), capacity


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.02, 1.1), min_size=4, max_size=4),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
)
def test_no_plan_breaks_a_budget(shares, slots, seed, frozen):
    found, _, capacity = plan(shares, slots=slots, seed=seed, frozen_weight=frozen)
    assert (found.cost.vector() <= capacity).all()
    schedule = found.schedule
    assert np.array_equal(schedule.ranks > 0, schedule.trained)
    assert set(np.unique(schedule.ranks)) <= {0, 1, 2, MOST}


def test_without_limits_everything_trains_at_the_largest_rank():
    for slots in (1, 3):
        found, *_ = plan([None] * 4, slots=slots)
        assert (found.schedule.operations == Operation.FULL).all()
        assert (found.schedule.ranks == MOST).all()


@pytest.mark.parametrize("resource", range(4))
def test_more_budget_is_worth_no_less(resource):
    before = 0.0
    for share in (0.2, 0.35, 0.5, 0.7, 0.9, 1.1):
        shares = [None] * 4
        shares[resource] = share
        found, now, _ = plan(shares)
        assert now >= before * (1 - found.gap) - 1e-9
        before = max(before, now)
    assert before > 0


def test_where_little_may_travel_up_small_ranks_are_chosen():
    several, more, _ = plan([None, None, 0.5, None], ranks=(1, 2))
    alone, less, _ = plan([None, None, 0.5, None], ranks=())
    assert alone.schedule.ranks is None
    trained = several.schedule.trained
    assert trained.sum() > alone.schedule.trained.sum()
    assert several.schedule.ranks[trained].mean() < MOST
    assert more > less


def test_a_block_pays_for_its_largest_rank_once():
    """A second head at the largest rank in use adds its own slices alone."""
    arch = with_lora(build(depth=3)[1], Lora(rank=MOST))
    costs, operations = cost_model(arch), np.zeros((1, 3, 4), dtype=np.int8)
    operations[0, 0, :2] = Operation.FULL

    def up(*ranks):
        own = np.zeros((3, 4), dtype=np.int64)
        own[0, :2] = ranks
        return costs.bytes_up(Schedule(operations, own))

    near = ELEMENT * int(costs.parts.ranked.sliced[0, 0])
    far = ELEMENT * int(costs.parts.ranked.shared[0])
    assert up(2, 4) - up(2, 2) == 2 * (near + far)
    assert up(4, 4) - up(2, 4) == 2 * near


@pytest.mark.parametrize("frozen_weight", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_solver_sees_what_plans_cost(slots, frozen_weight):
    """Of random choices: bytes up exactly, FLOPs and bytes down at most, memory at least."""
    arch, _ = wide_adapted(rank=MOST)
    costs = cost_model(arch, slots, batch_size=8)
    planner = Planner(costs, ranks=(1, 2), frozen_weight=frozen_weight)
    client, scores = Participant(0, 20, Budget(), np.zeros(4)), np.ones((1, 12))
    chunk = ClientKnapsacks(planner, [client], slots, 0, scores, scores)
    (table,), which = chunk.tables
    for seed in range(10):
        options = np.flatnonzero(~chunk.patterns.below)
        choice = np.random.default_rng(seed).choice(options, size=(1, 12))
        operations, ranks = chunk._materialise(choice)
        exact = costs.costs(operations, np.array([20]), ranks=ranks)[0]
        shown = used(choice, chunk.items, chunk.structure, which)[0] + table.constant
        assert shown[UP] == exact[UP]
        assert shown[DOWN] == exact[DOWN]
        assert exact[FLOPS] <= shown[FLOPS] <= 1.25 * exact[FLOPS]
        assert max(shown[MEMORIES]) <= exact[MEMORY]


def test_spread_counts_training_by_its_rank():
    found, _, capacity = plan([0.6, 0.6, 0.4, None], coupling="spread")
    assert (found.cost.vector() <= capacity).all()
    assert found.schedule.trained.any()


def test_two_stages_know_one_rank():
    with pytest.raises(ConfigError, match="knows one rank"):
        plan([None] * 4, method="two-stage")


# -- runs ----------------------------------------------------------------------------------------

LORA = {"tuning": "lora", "lora_aggregation": "stack", "lora_rank": 8, "lora_ranks": "2, 4"}


def rows(folder, name):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


BUDGETS = """
mix = ["wide", "narrow"]
[classes.wide]
flops = "90 %"
[classes.narrow]
flops = "70 %"
bytes_up = "50 %"
"""


@pytest.mark.parametrize("mode", ["stack", "product"])
def test_a_run_with_ranks_keeps_every_budget(quick, tmp_path, mode):
    tmp_path.joinpath("budgets.toml").write_text(BUDGETS)
    own = {**LORA, "lora_aggregation": mode, "budgets": str(tmp_path / "budgets.toml")}
    config = checked(quick(**own, verify_costs=True, clients=2, train_examples=40))
    summary = run_local(config)
    assert summary["violations"] == summary["faults"] == 0
    assert summary["flops_as_predicted"] == summary["client_rounds"] == 4
    plans = safetensors.torch.load_file(Path(config.run_folder) / "plans/round-002.safetensors")
    trained = (plans["schedules"] == Operation.FULL).any(dim=1)
    assert torch.equal(plans["ranks"] > 0, trained)
    assert {2, 4, 8} >= set(plans["ranks"][trained].tolist()) > {8}
    for row in rows(config.run_folder, "clients.jsonl")[-2:]:
        own = plans["ranks"][row["client"]]
        assert row["rank"] == pytest.approx(float(own[own > 0].double().mean()))
        assert all(row["used"][r] <= row["predicted"][r] for r in RESOURCES)
    error = rows(config.run_folder, "rounds.jsonl")[-1]["aggregation_error"]
    assert error < 1e-4 if mode == "stack" else 0 < error < 1


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"lora_ranks": "2, x"}, "'x' is no whole number from 1 to lora-rank = 8"),
        ({"lora_ranks": "0"}, "'0' is no whole number"),
        ({"lora_ranks": "2, 9"}, "'9' is no whole number"),
        ({"lora_ranks": "2,,4"}, "'' is no whole number"),
        ({"lora_aggregation": "factors"}, "cannot aggregate different ranks: use product or stack"),
        ({"tuning": "full"}, "lora-ranks belongs to tuning = 'lora', not 'full'"),
        ({"planner": "two-stage"}, "knows one rank"),
        ({"lora_rank_exponent": -1.0}, "lora-rank-exponent = -1.0 must be a finite number"),
    ],
)
def test_options_that_cannot_be_are_named(quick, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        checked_options(quick(**{**LORA, **changes}))
    assert "\n" not in str(error.value)
