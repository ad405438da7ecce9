"""Folding factors in small cases that are worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_fl.aggregation.lora_sums import (
    LoraSums,
    effective_architecture,
    effective_rows,
    frozen,
    unchanging,
    widened,
)
from d2ft_fl.aggregation.update import Update
from d2ft_fl.config.choices import LORA_AGGREGATIONS
from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.lora.config import Lora, factor_name, is_common, with_lora
from d2ft_fl.subnets.architecture import Kind, Parameter
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.aggregation.test_lora_sums import fold
from tests.conftest import TARGETS, build

BASE = build(depth=2)[1]


FULL, SKIP = Operation.FULL, Operation.SHORTCUT


def schedule_of(*heads):
    """One slot of one block."""
    return Schedule(np.array([[heads]], dtype=np.int8))


def tiny():
    """Two heads of one row each: fc1 with W = (1, 1), A = 1 and B = (1, 1); scaling 1."""
    rows = ((0,), (1,))
    weight = Parameter("fc1.weight", (2, 1), Kind.SLICED, "fc1.weight", 0, 0, rows, trains=False)
    a = Parameter(factor_name(weight.name, "A"), (1, 1), Kind.SHARED, "fc1.lora_A", 0, factor="A")
    b = replace(
        weight, name=factor_name(weight.name, "B"), role="fc1.lora_B", trains=True, factor="B"
    )
    arch = replace(BASE, blocks=1, heads=2, parameters=(weight, a, b), rank=1, scaling=1.0)
    return arch, {p.name: torch.ones(p.shape) for p in arch.parameters}


def tiny_replies(arch):
    """One example on both heads, (A, B) = (2, (2, 3)); three on head 0 alone, (3, (1))."""
    _, a, b = (p.name for p in arch.parameters)
    both, first = schedule_of(FULL, FULL), schedule_of(FULL, SKIP)
    return [
        Update(both, [1], {a: torch.tensor([[2.0]]), b: torch.tensor([[2.0], [3.0]])}),
        Update(first, [3], {a: torch.tensor([[3.0]]), b: torch.tensor([[1.0]])}),
    ]


def test_a_case_worked_out_by_hand():
    """Effective rows are (2, 2), (5, 7) and (4, -); the mean is ((5 + 3 * 4) / 4, 7)."""
    arch, state = tiny()
    w, a, b = (p.name for p in arch.parameters)
    replies = tiny_replies(arch)
    assert effective_rows(arch, state, replies[0])[w].tolist() == [[5.0], [7.0]]
    assert effective_rows(arch, state, replies[1])[w].tolist() == [[4.0]]

    new, error = fold(arch, state, "stack", replies)
    assert [new[n].flatten().tolist() for n in (w, a, b)] == [[3.25, 6.0], [1.0], [1.0, 1.0]]
    assert error == 0.0

    # A: (2 + 3 * 3) / 4; B: (2 + 3 * 1) / 4, and 3. So 1 + 2.75 * (1.25, 3) = (4.4375, 9.25).
    new, error = fold(arch, state, "factors", replies)
    assert [new[n].flatten().tolist() for n in (w, a, b)] == [[1.0, 1.0], [2.75], [1.25, 3.0]]
    assert error == pytest.approx(np.hypot(0.1875, 2.25) / np.hypot(2.25, 5.0))

    # (3.25, 6) is of rank 1: |B|^2 = |A|^2 = its length.
    new, error = fold(arch, state, "product", replies)
    length = np.hypot(3.25, 6.0)
    assert float(new[a]) == pytest.approx(length**0.5)
    assert new[b].flatten().tolist() == pytest.approx([3.25 / length**0.5, 6.0 / length**0.5])
    assert error < 1e-6


def test_a_common_factor_that_rests_counts_as_it_was():
    arch, state = tiny()
    weight, a, b = arch.parameters
    arch = replace(arch, parameters=(weight, replace(a, trains=False), b))
    replies = [
        Update(r.schedule, r.slot_examples, {b.name: r.tensors[b.name]}) for r in tiny_replies(arch)
    ]
    new, error = fold(arch, state, "freeze-common", replies)
    assert new[b.name].flatten().tolist() == [1.25, 3.0]
    assert error == 0.0


def test_what_changes_though_nobody_changed_anything_is_off_without_bound():
    """(A, B) = (2, 1/2) and (1/2, 2) make what (1, 1) makes; their means make 1.5625."""
    arch, state = tiny()
    _, a, b = (p.name for p in arch.parameters)
    replies = [
        Update(
            schedule_of(FULL, FULL), [1], {a: torch.full((1, 1), x), b: torch.full((2, 1), 1 / x)}
        )
        for x in (2.0, 0.5)
    ]
    new, error = fold(arch, state, "factors", replies)
    assert new[a].item() * new[b][0].item() == 1.5625
    assert error == math.inf
    for mode in ("product", "stack"):
        new, error = fold(arch, state, mode, replies)
        assert error == 0.0
        assert all(torch.equal(new[name], tensor) for name, tensor in state.items())


def test_effective_weights_train_and_have_no_factors():
    arch = with_lora(BASE, Lora(rank=3, alpha=6.0, dropout=0.5, targets=("fc2", "qkv")))
    found = effective_architecture(arch)
    assert (found.rank, found.scaling) == (0, 0.0)
    roles = ("qkv.weight", "fc2.weight")
    assert list(found.parameters) == [p for p in BASE.parameters if p.role in roles]
    assert all(p.trains for p in found.parameters)


def of_rank_two(inward, *ranks):
    """Two heads of one row and two, W = (1, 1, 1), factors of rank 2 that are ones; scaling 1.

    Args:
        inward: Whether the product is fc1, whose B divides over heads, or fc2, whose A does.
        ranks: Of the heads; 0 for one that does not train.
    """
    target, rows = "fc1" if inward else "fc2", ((0,), (1, 2))
    shape, axis = ((3, 1), 0) if inward else ((1, 3), 1)
    weight = Parameter(
        f"{target}.weight", shape, Kind.SLICED, f"{target}.weight", 0, axis, rows, trains=False
    )
    factors = []
    for factor, of_factor in (("A", (2, shape[1])), ("B", (shape[0], 2))):
        common = (factor == "A") == inward
        name, role = factor_name(weight.name, factor), f"{target}.lora_{factor}"
        cut = (Kind.SHARED, role, 0) if common else (Kind.SLICED, role, 0, axis, rows)
        factors.append(Parameter(name, of_factor, *cut, factor=factor))
    arch = replace(BASE, blocks=1, heads=2, parameters=(weight, *factors), rank=2, scaling=1.0)
    operations = [[[FULL if rank else SKIP for rank in ranks]]]
    schedule = Schedule(np.array(operations, dtype=np.int8), np.array([ranks]))
    state = {p.name: torch.ones(p.shape) for p in arch.parameters}
    common, own = factors if inward else factors[::-1]
    return arch, state, schedule, common, own


RANKED = [  # ranks; F's columns head by head, G's; and what these make of F, of G, and of W
    ((2, 1), [2, 3, 4, 5], [2, 10], [[2, 3], [4, 1], [5, 1]], [2, 10], [35, 10, 12]),
    ((1, 2), [2, 4, 5, 6, 7], [2, 10], [[2, 1], [4, 5], [6, 7]], [2, 10], [6, 59, 83]),
    ((1, 1), [2, 4, 5], [2], [[2, 1], [4, 1], [5, 1]], [2, 1], [6, 10, 12]),
    ((0, 1), [4, 5], [2], [[4, 1], [5, 1]], [2, 1], [10, 12]),
    ((2, 0), [2, 3], [2, 10], [[2, 3]], [2, 10], [35]),
]


@pytest.mark.parametrize("inward", [True, False])
@pytest.mark.parametrize("ranks,f,g,whole_f,whole_g,made", RANKED, ids=str)
def test_columns_behind_the_rank_of_a_head_count_as_they_were(
    ranks, f, g, whole_f, whole_g, made, inward
):
    """Of ranks 2 and 1: 1 + 2 * 2 + 3 * 10 = 35, then 1 + 4 * 2 + 1 = 10 and 1 + 5 * 2 + 1 = 12."""
    arch, state, schedule, common, own = of_rank_two(inward, *ranks)
    cut = torch.tensor(g, dtype=torch.float32)
    sent = {own.name: torch.tensor(f, dtype=torch.float32), common.name: cut[:, None]}
    if not inward:
        sent[common.name] = cut[None]
    update = Update(schedule, [3], sent)
    weight = arch.parameters[0].name
    assert effective_rows(arch, state, update)[weight].flatten().tolist() == made

    whole = widened(arch, state, update)
    assert whole.schedule.ranks is None
    assert whole.tensors[own.name].tolist() == whole_f
    assert whole.tensors[common.name].flatten().tolist() == whole_g

    # Of one client: its weights, less what the factors add that stay: 1 * 1 + 1 * 1.
    new, error = fold(arch, state, "stack", [update])
    rows = [1.0, 1.0, 1.0]
    first = 1 if ranks[0] == 0 else 0
    rows[first : first + len(made)] = [value - 2.0 for value in made]
    assert new[weight].flatten().tolist() == rows
    assert error == 0.0
    assert all(torch.equal(new[p.name], state[p.name]) for p in (common, own))


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_ranks_are_refused_where_a_mode_or_a_reply_does_not_fit_them(mode):
    arch, state, schedule, common, own = of_rank_two(True, 2, 1)
    update = Update(schedule, [3], {own.name: torch.ones(3), common.name: torch.ones(2, 1)})
    sums = LoraSums(arch, state, 10, mode)
    if mode in ("product", "stack"):
        with pytest.raises(ReplyError, match=r"fc1.lora_B.weight' has shape"):
            sums.add(update)
    else:
        with pytest.raises(ConfigError, match=f"{mode!r} cannot aggregate different ranks"):
            sums.add(update)


def test_what_does_not_train():
    assert frozen("factors", BASE, TARGETS, 1) == frozen("stack", BASE, TARGETS, 1) == []
    assert frozen("freeze-a", BASE, TARGETS, 2) == [(target, "A") for target in TARGETS]
    assert frozen("alternate", BASE, ("qkv",), 1) == [("qkv", "A")]
    assert frozen("alternate", BASE, ("qkv",), 2) == [("qkv", "B")]
    common = frozen("freeze-common", BASE, TARGETS, 1)
    assert common == [("qkv", "A"), ("proj", "B"), ("fc1", "A"), ("fc2", "B")]
    assert all(is_common(BASE, *pair) for pair in common)


def test_what_never_changes():
    """What rests in every round; `stack` gives all factors back as they were."""

    def found(mode, targets=TARGETS):
        return unchanging(mode, BASE, iter(targets))

    assert found("factors") == found("product") == found("alternate") == []
    assert found("freeze-a") == [(target, "A") for target in TARGETS]
    assert found("freeze-common") == [("qkv", "A"), ("proj", "B"), ("fc1", "A"), ("fc2", "B")]
    assert found("stack", ("fc2", "qkv")) == [
        ("fc2", "A"), ("fc2", "B"), ("qkv", "A"), ("qkv", "B")
    ]  # fmt: skip
