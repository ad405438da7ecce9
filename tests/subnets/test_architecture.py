import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import down_spec, pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule, slot_sizes, slot_totals
from tests.conftest import build, random_schedule, weights_of

MODEL, ARCH = build()


def test_every_sliced_row_belongs_to_exactly_one_head():
    for p in ARCH.of_kind(Kind.SLICED):
        rows = [row for head in p.rows for row in head]
        assert sorted(rows) == list(range(p.shape[p.axis]))


def test_a_head_of_a_fused_qkv_owns_its_own_queries_keys_and_values():
    p = ARCH.by_name["blocks.0.attn.qkv.weight"]
    # 4 heads of width 6: queries are rows 0-23, keys 24-47, values 48-71.
    assert p.rows[1] == (*range(6, 12), *range(30, 36), *range(54, 60))


def test_feed_forward_slices_may_be_uneven():
    _, arch = build(embed_dim=28, num_heads=7, mlp_ratio=66 / 28)
    assert arch.widths[1] == (10, 10, 10, 9, 9, 9, 9)
    assert sum(arch.widths[1]) == 66
    # qkv with its bias, proj, fc1 with its bias, fc2; heads of width 4
    assert arch.subnet_sizes[0, 0] == 12 * 29 + 4 * 28 + 10 * 29 + 10 * 28
    assert arch.subnet_sizes[2, 6] == 12 * 29 + 4 * 28 + 9 * 29 + 9 * 28


@given(heads=st.sets(st.integers(0, 3), min_size=1), index=st.integers(0, 5))
def test_unpacking_what_was_packed_restores_it_and_touches_nothing_else(heads, index):
    p = ARCH.of_kind(Kind.SLICED, block=1)[index]
    chosen = tuple(sorted(heads))
    original = torch.randn(p.shape)
    packed = p.pack(original, chosen)
    assert tuple(packed.shape) == p.packed_shape(chosen)
    blank = torch.zeros(p.shape)
    p.unpack_(blank, packed, chosen)
    own = torch.zeros(p.shape[p.axis], dtype=torch.bool)
    own[p.index(chosen)] = True
    assert torch.equal(blank.movedim(p.axis, 0)[own], original.movedim(p.axis, 0)[own])
    assert not blank.movedim(p.axis, 0)[~own].any()


@given(examples=st.integers(0, 200), slots=st.integers(1, 9))
def test_slots_share_a_batch_as_evenly_as_possible(examples, slots):
    sizes = slot_sizes(examples, slots)
    assert sum(sizes) == examples
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 100), st.integers(1, 32), st.integers(1, 5), st.integers(1, 3))
def test_slot_totals_count_every_example_of_every_epoch(examples, batch, slots, epochs):
    expected = np.zeros(slots, dtype=int)
    for _ in range(epochs):
        for start in range(0, examples, batch):
            expected += slot_sizes(min(batch, examples - start), slots)
    assert slot_totals(examples, batch, slots, epochs) == expected.tolist()


def test_only_resident_slices_travel_down_and_only_trained_ones_up():
    operations = np.zeros((2, 3, 4), dtype=np.int8)
    operations[0, 1, 2] = Operation.FULL
    operations[1, 1, 3] = Operation.FORWARD_ONLY
    schedule = Schedule(operations)
    down, up = down_spec(ARCH, schedule), up_spec(ARCH, schedule)
    assert {ARCH.by_name[n].block for n in down} == {-1, 1}
    assert down["blocks.1.attn.qkv.weight"] == (2 * 18, 24)
    assert up["blocks.1.attn.qkv.weight"] == (18, 24)
    assert up["blocks.1.attn.proj.weight"] == (6, 24)
    assert "pos_embed" in down
    assert "pos_embed" not in up
    packed = pack_for(ARCH, weights_of(MODEL), schedule)
    assert {n: tuple(t.shape) for n, t in packed.items()} == down


@given(st.integers(0, 10_000))
def test_examples_trained_are_those_of_the_slots_that_run_full(seed):
    schedule = random_schedule(ARCH, 3, seed)
    counts = [5, 3, 2]
    for block in range(3):
        for head in range(4):
            full = schedule.operations[:, block, head] == Operation.FULL
            assert schedule.examples_trained(counts)[block, head] == np.dot(full, counts)


def test_a_schedule_must_be_three_dimensional_and_known():
    with pytest.raises(ConfigError, match="int8"):
        Schedule(np.zeros((2, 3), dtype=np.int8))
    with pytest.raises(ConfigError, match="operations are 0 to 3"):
        Schedule(np.full((1, 3, 4), 7, dtype=np.int8))
