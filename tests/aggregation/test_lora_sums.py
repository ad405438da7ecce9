"""Folding factors: every way of it against the exact mean of effective weights, in dense numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.aggregation.lora_sums import LoraSums, frozen
from d2ft_fl.aggregation.update import Update
from d2ft_fl.config.choices import LORA_AGGREGATIONS
from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.lora.config import Lora, is_common, targeted, with_lora
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import TARGETS, build, random_schedule, weights_of

torch.manual_seed(0)
MODEL, BASE = build(depth=2)
SLOTS = 2
LORA = Lora(rank=3, alpha=4.0)
SEEDS = st.lists(st.integers(0, 10_000), min_size=2, max_size=5, unique=True)
CASES = settings(max_examples=15, deadline=None)


def setting(mode, turn=1, lora=LORA):
    """An architecture in which the factors of a mode train, and a state with non-zero factors."""
    arch = with_lora(BASE, lora, frozen(mode, BASE, TARGETS, turn))
    state = weights_of(MODEL)
    generator = torch.Generator().manual_seed(7)
    for p in arch.parameters:
        if p.factor:
            state[p.name] = 0.2 * torch.randn(p.shape, generator=generator)
    return arch, state


def reply(arch, state, seed, schedule=None, examples=None):
    """A client's reply: its parameters are the global ones plus noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    schedule = schedule or random_schedule(arch, SLOTS, seed)
    tensors = {}
    for name, shape in up_spec(arch, schedule).items():
        p, old = arch.by_name[name], state[name]
        if p.kind is Kind.SLICED:
            old = p.pack(old, schedule.heads(schedule.trained, p.block))
        tensors[name] = old + 0.1 * torch.randn(shape, generator=generator)
    return Update(schedule, examples or [3 + seed % 5, 2], tensors)


def fold(arch, state, mode, replies):
    sums = LoraSums(arch, state, 1000, mode)
    for r in replies:
        sums.add(r)
    return sums.apply(), sums.error


def dense(arch, state, weight, a, b):
    """Effective weights [out, in] in numpy."""
    w, a, b = (state[p.name].double().numpy() for p in (weight, a, b))
    return w + arch.scaling * b @ a


def exact_changes(arch, state, replies):
    """The exact change of every targeted weight, head by head, from whole matrices."""
    found = {}
    for weight, a, b in targeted(arch):
        old = dense(arch, state, weight, a, b)
        change = np.zeros_like(old)
        for head in range(arch.heads):
            top, bottom = 0.0, 0
            for r in replies:
                full = r.schedule.operations[:, weight.block, head] == Operation.FULL
                n = int(np.dot(full, r.slot_examples))
                if not n:
                    continue
                theirs = dict(state)
                for p in (a, b):
                    if p.trains and p.kind is Kind.SLICED:
                        theirs[p.name] = state[p.name].clone()
                        heads = r.schedule.heads(r.schedule.trained, p.block)
                        p.unpack_(theirs[p.name], r.tensors[p.name], heads)
                    elif p.trains:
                        theirs[p.name] = r.tensors[p.name]
                top = top + n * (dense(arch, theirs, weight, a, b) - old)
                bottom += n
            if bottom:
                rows = list(weight.rows[head])
                mean = top / bottom
                if weight.axis == 0:
                    change[rows] = mean[rows]
                else:
                    change[:, rows] = mean[:, rows]
        found[weight.name] = change
    return found


def norm(matrices):
    return float(np.sqrt(sum((m**2).sum() for m in matrices)))


def by_hand(arch, state, new, replies):
    """The relative error of a fold, and the exact change's norm."""
    exact = exact_changes(arch, state, replies)
    off = [
        dense(arch, new, w, a, b) - dense(arch, state, w, a, b) - exact[w.name]
        for w, a, b in targeted(arch)
    ]
    return norm(off), norm(exact.values())


def trains_anything(replies):
    return any((r.schedule.operations == Operation.FULL).any() for r in replies)


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
@CASES
@given(seeds=SEEDS, turn=st.integers(1, 2))
def test_the_error_is_that_of_dense_matrices(mode, seeds, turn):
    arch, state = setting(mode, turn)
    replies = [reply(arch, state, seed) for seed in seeds]
    new, error = fold(arch, state, mode, replies)
    off, size = by_hand(arch, state, new, replies)
    if trains_anything(replies):
        assert error == pytest.approx(off / size, rel=1e-5, abs=1e-9)
    else:
        assert error is None
        assert off == size == 0


@pytest.mark.parametrize("mode", ["stack", "freeze-common"])
@CASES
@given(seeds=SEEDS)
def test_exact_whoever_trains_what(mode, seeds):
    arch, state = setting(mode)
    _, error = fold(arch, state, mode, [reply(arch, state, seed) for seed in seeds])
    assert error is None or error < 1e-6


ONE_RESTS = pytest.mark.parametrize(
    "mode,turn", [("freeze-a", 1), ("alternate", 1), ("alternate", 2)]
)


@ONE_RESTS
@CASES
@given(seeds=SEEDS)
def test_exact_where_clients_train_whole_blocks(mode, turn, seeds):
    """Whichever blocks each trains, in whichever slots, on however many examples."""
    arch, state = setting(mode, turn)
    replies = []
    for seed in seeds:
        blocks = np.random.default_rng(seed).choice(len(Operation), size=(SLOTS, arch.blocks, 1))
        schedule = Schedule(np.repeat(blocks, arch.heads, axis=2).astype(np.int8))
        replies.append(reply(arch, state, seed, schedule))
    _, error = fold(arch, state, mode, replies)
    assert error is None or error < 1e-6


@ONE_RESTS
@CASES
@given(seeds=SEEDS, assignment=st.integers(0, 1000))
def test_where_all_train_the_same_heads_only_the_others_are_off(mode, turn, seeds, assignment):
    """Those follow what they have in common with them: F_h (G' - G)^T."""
    arch, state = setting(mode, turn)
    schedule = random_schedule(arch, SLOTS, assignment)
    replies = [reply(arch, state, seed, schedule, [4, 3]) for seed in seeds]
    new, _ = fold(arch, state, mode, replies)
    exact = exact_changes(arch, state, replies)
    for weight, a, b in targeted(arch):
        heads = schedule.heads(schedule.trained, weight.block)
        others = [h for h in range(arch.heads) if h not in heads]
        change = dense(arch, new, weight, a, b) - dense(arch, state, weight, a, b)
        got, wanted = (torch.from_numpy(m) for m in (change, exact[weight.name]))
        torch.testing.assert_close(
            weight.pack(got, heads), weight.pack(wanted, heads), rtol=0, atol=1e-6
        )
        g_trains = (a if is_common(arch, weight.role.split(".")[0], "A") else b).trains
        if heads and others:
            assert bool(weight.pack(got, others).any()) == g_trains


@CASES
@given(seeds=SEEDS)
def test_freezing_a_is_exact_for_products_in_whoever_trains_what(seeds):
    """A is common to the block in qkv and fc1, and divides over heads in proj and fc2."""
    arch, state = setting("freeze-a", lora=replace(LORA, targets=("qkv", "fc1")))
    _, error = fold(arch, state, "freeze-a", [reply(arch, state, seed) for seed in seeds])
    assert error is None or error < 1e-6


@pytest.mark.parametrize("lora", [LORA, Lora(rank=24, alpha=24.0)])
@CASES
@given(seeds=SEEDS)
def test_a_product_is_off_by_the_singular_values_left_out(lora, seeds):
    arch, state = setting("product", lora=lora)
    replies = [reply(arch, state, seed) for seed in seeds]
    _, error = fold(arch, state, "product", replies)
    if error is None:
        return
    exact, left_out = exact_changes(arch, state, replies), []
    for weight, a, b in targeted(arch):
        if not exact[weight.name].any():
            continue
        product = dense(arch, state, weight, a, b) - state[weight.name].double().numpy()
        values = np.linalg.svd(product + exact[weight.name], compute_uv=False)
        left_out.append(values[lora.rank :])
    assert error * norm(exact.values()) == pytest.approx(norm(left_out), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rests", ["A", "B"])
def test_a_product_of_lower_rank_leaves_factors_that_can_train(rests):
    """Of the directions it does not use, the factor that trains is zero, and the other is not."""
    arch = with_lora(BASE, LORA, [(target, rests) for target in TARGETS])
    _, state = setting("product")
    full = Schedule.filled(Operation.FULL, SLOTS, 2, 4)
    r = reply(arch, state, 1, full)
    for _, a, b in targeted(arch):
        p = b if rests == "A" else a
        state[p.name] = torch.zeros(p.shape)
        change = torch.zeros(p.shape)
        (change[:, 0] if p is b else change[0]).fill_(0.5)
        r.tensors[p.name] = p.pack(change, range(4)) if p.kind is Kind.SLICED else change
    new, error = fold(arch, state, "product", [r])
    assert error < 1e-6
    for _, a, b in targeted(arch):
        used = [bool(v.any()) for v in new[a.name]], [bool(v.any()) for v in new[b.name].T]
        one, every = [True, False, False], [True] * 3
        assert used == ((every, one) if rests == "A" else (one, every))


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
@CASES
@given(seeds=SEEDS, random=st.randoms())
def test_order_of_replies_does_not_matter(mode, seeds, random):
    arch, state = setting(mode)
    replies = [reply(arch, state, seed) for seed in seeds]
    expected, error = fold(arch, state, mode, replies)
    random.shuffle(replies)
    shuffled, again = fold(arch, state, mode, replies)
    assert all(torch.equal(shuffled[name], tensor) for name, tensor in expected.items())
    assert again == error


def bits(tensor):
    return tensor.numpy().view(np.int32)


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
@CASES
@given(seeds=SEEDS)
def test_what_nobody_trained_keeps_its_bits(mode, seeds):
    arch, state = setting(mode)
    for weight, _, _ in targeted(arch):
        state[weight.name].view(-1)[::7] = -0.0  # which adding nothing would turn positive
    replies = [reply(arch, state, seed) for seed in seeds]
    new, _ = fold(arch, state, mode, replies)
    assert new.keys() == state.keys()
    trained = np.logical_or.reduce([r.schedule.trained for r in replies])
    for p in arch.parameters:
        assert new[p.name].dtype == state[p.name].dtype
        before, after = bits(state[p.name]), bits(new[p.name])
        if p.role in {f"{target}.weight" for target in TARGETS}:
            if mode != "stack":
                assert np.array_equal(before, after)
            rest = [h for h in range(arch.heads) if not trained[p.block, h]]
            kept = [bits(p.pack(s[p.name], rest)) for s in (state, new)]
            assert np.array_equal(*kept)
            moved = [h for h in range(arch.heads) if trained[p.block, h]]
            if mode == "stack" and moved:
                assert not torch.equal(p.pack(state[p.name], moved), p.pack(new[p.name], moved))
        elif p.factor:
            still = not trained[p.block].any() or (mode != "product" and not p.trains)
            if mode == "stack" or still:
                assert np.array_equal(before, after)
        elif not p.trains:
            assert np.array_equal(before, after)


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_the_classifier_is_the_weighted_mean(mode):
    arch, state = setting(mode)
    replies = [reply(arch, state, seed, examples=[2 * seed, seed]) for seed in (1, 2)]
    new, _ = fold(arch, state, mode, replies)
    ran = [int(np.dot(r.schedule.active, r.slot_examples)) for r in replies]
    for name in ("head.weight", "head.bias"):
        mean = sum(n * r.tensors[name].double() for n, r in zip(ran, replies, strict=True))
        torch.testing.assert_close(new[name].double(), mean / sum(ran), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_nobody_and_nothing(mode):
    """No error where nobody trained; zero where what came back is what went out."""
    arch, state = setting(mode)
    assert fold(arch, state, mode, []) == (state, None)
    idle = Schedule.filled(Operation.FORWARD_ONLY, SLOTS, 2, 4)
    new, error = fold(arch, state, mode, [reply(arch, state, 1, idle)])
    assert error is None
    assert not torch.equal(new["head.weight"], state["head.weight"])
    full = Schedule.filled(Operation.FULL, SLOTS, 2, 4)
    spec = up_spec(arch, full)
    same = {
        name: arch.by_name[name].pack(state[name], range(4))
        if arch.by_name[name].kind is Kind.SLICED
        else state[name]
        for name in spec
    }
    new, error = fold(arch, state, mode, [Update(full, [1, 1], same)])
    assert error == 0.0
    assert all(torch.equal(new[name], tensor) for name, tensor in state.items())


def poke(value):
    def change(tensors, name):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t, n: t.pop(n), "is missing"),
        (lambda t, n: t.update({n.replace("1", "9"): t[n]}), "was not assigned"),
        (lambda t, n: t.update({n: t[n][:-1]}), "has shape"),
        (lambda t, n: t.update({n: t[n].double()}), "float64"),
        (poke(float("nan")), "not finite"),
        (poke(float("inf")), "not finite"),
        (poke(1e9), "more than can be summed"),
    ],
)
def test_a_bad_reply_is_refused_and_nothing_of_it_is_added(mode, change, message):
    arch, state = setting(mode)
    sums = LoraSums(arch, state, 1000, mode)
    sums.add(reply(arch, state, 1))
    before, error = sums.apply(), sums.error
    bad = reply(arch, state, 7, Schedule.filled(Operation.FULL, SLOTS, 2, 4))
    name = next(p.name for p in arch.parameters if p.factor and p.trains and p.block == 1)
    change(bad.tensors, name)
    with pytest.raises(ReplyError, match=message):
        sums.add(bad)
    assert all(torch.equal(before[n], t) for n, t in sums.apply().items())
    assert sums.error == error


@pytest.mark.parametrize("mode", ["factors", "product", "stack"])
def test_factors_that_can_be_summed_but_whose_product_cannot_are_refused(mode):
    arch, state = setting(mode)
    sums = LoraSums(arch, state, 1000, mode)
    bad = reply(arch, state, 7, Schedule.filled(Operation.FULL, SLOTS, 2, 4))
    for name in (p.name for p in arch.parameters if p.factor and p.block == 1):
        bad.tensors[name] = torch.full_like(bad.tensors[name], 1e4)
    with pytest.raises(ReplyError, match=r"blocks.1.*weight' changes by more than can be summed"):
        sums.add(bad)
    new = sums.apply()
    assert sums.error is None
    assert all(torch.equal(new[n], t) for n, t in state.items())


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_folding_is_the_same_where_the_error_is_not_measured(mode):
    arch, state = setting(mode)
    told, untold = LoraSums(arch, state, 1000, mode), LoraSums(arch, state, 1000, mode, False)
    for seed in (1, 2):
        told.add(reply(arch, state, seed))
        untold.add(reply(arch, state, seed))
    new = untold.apply()
    assert all(torch.equal(new[n], t) for n, t in told.apply().items())
    assert told.error is not None
    assert untold.error == (told.error if mode in ("product", "stack") else None)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="'mean' is unknown"):
        LoraSums(*setting("factors"), 10, "mean")
