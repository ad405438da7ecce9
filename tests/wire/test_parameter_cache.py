"""Fixed parameters travel once: what is left out comes back whole, or is missed by name."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.errors import Refusal
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.subnets.packing import down_spec, pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.parameter_cache import ParameterCache, digests, groups_of, is_held, read, write
from tests.conftest import build, random_schedule, weights_of

MODEL, BASE = build()
ARCH = with_lora(BASE, Lora(rank=2))
STATE = weights_of(MODEL) | {p.name: torch.randn(p.shape) for p in ARCH.parameters if p.factor}
NAMES = digests(ARCH, STATE)


def nothing():
    return np.zeros((ARCH.blocks, ARCH.heads), dtype=bool)


def exchange(store, schedule, cached, state=STATE, names=NAMES):
    """A message, and what the client makes of it."""
    sent = pack_for(ARCH, state, schedule, cached)
    received = read(schedule, write(schedule, names))
    return sent, store.complete(ARCH, schedule, sent, cached, received)


@settings(max_examples=25, deadline=None)
@given(seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=4))
def test_rounds_complete_each_other(seeds, tmp_path_factory):
    store, cached = ParameterCache(tmp_path_factory.mktemp("store")), nothing()
    for seed in seeds:
        schedule = random_schedule(ARCH, 2, seed)
        sent, whole = exchange(store, schedule, cached)
        expected = pack_for(ARCH, STATE, schedule)
        assert whole.keys() == down_spec(ARCH, schedule).keys()
        assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
        for name, tensor in sent.items():
            p = ARCH.by_name[name]
            if p.fixed and p.rows:
                new = schedule.resident[p.block] & ~cached[p.block]
                assert len(tensor) == sum(len(p.rows[h]) for h in np.flatnonzero(new))
        cached = cached | schedule.resident
    again, _ = exchange(store, schedule, cached)
    assert all(not ARCH.by_name[name].fixed for name in again)


def test_what_changes_gets_another_name_and_nothing_else_does():
    state = dict(STATE)
    p = ARCH.by_name["blocks.1.mlp.fc2.weight"]
    state[p.name] = STATE[p.name].clone()
    p.unpack_(state[p.name], p.pack(state[p.name], [2]) + 1, [2])
    changed = nothing()
    changed[1, 2] = True
    found = digests(ARCH, state, NAMES, changed)
    assert {group for group in NAMES if found[group] != NAMES[group]} == {(1, 2)}
    assert found == digests(ARCH, state)


def test_a_client_gets_what_has_changed(tmp_path):
    store, schedule, cached = ParameterCache(tmp_path), random_schedule(ARCH, 1, 4), nothing()
    exchange(store, schedule, cached)
    cached = schedule.resident.copy()
    block, head = np.argwhere(cached)[0]
    state = dict(STATE)
    for p in ARCH.parameters:
        if p.block == block and p.rows and p.fixed:
            state[p.name] = STATE[p.name].clone()
            p.unpack_(state[p.name], p.pack(state[p.name], [head]) + 1, [head])
    changed = nothing()
    changed[block, head] = True
    _, whole = exchange(
        store, schedule, cached & ~changed, state, digests(ARCH, state, NAMES, changed)
    )
    expected = pack_for(ARCH, state, schedule)
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())


def test_what_is_gone_is_missed(tmp_path):
    schedule = Schedule.filled(Operation.FULL, 1, ARCH.blocks, ARCH.heads)
    with pytest.raises(Refusal, match="gone"):
        exchange(ParameterCache(tmp_path), schedule, schedule.resident)


def test_what_was_not_used_for_long_is_deleted(tmp_path):
    store, schedule = ParameterCache(tmp_path), random_schedule(ARCH, 1, 2)
    exchange(store, schedule, nothing())
    files = sorted(tmp_path.glob("*/*"))
    assert len(files) == len(list(groups_of(schedule)))
    for path in files[1:]:
        os.utime(path, (0, 0))
    store.prune()
    assert list(tmp_path.glob("*/*")) == files[:1]


def test_a_block_is_held_with_any_of_its_subnets():
    cached = nothing()
    assert not is_held((-1, -1), cached)
    cached[1, 3] = True
    assert is_held((-1, -1), cached)
    assert is_held((1, -1), cached)
    assert is_held((1, 3), cached)
    assert not is_held((1, 0), cached)
    assert not is_held((0, -1), cached)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1] + bytes([d[-1] ^ 1])])
def test_what_is_damaged_is_missed_and_mended(damage, tmp_path):
    store = ParameterCache(tmp_path)
    schedule = Schedule.filled(Operation.FULL, 1, ARCH.blocks, ARCH.heads)
    exchange(store, schedule, nothing())
    for path in tmp_path.glob("*/*"):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Refusal, match="gone"):
        exchange(store, schedule, schedule.resident)
    exchange(store, schedule, nothing())
    _, whole = exchange(store, schedule, schedule.resident)
    expected = pack_for(ARCH, STATE, schedule)
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "text",
    [
        "../../../../etc/x", "/nowhere/a/b/c/d/e/f", "ABCDEF0123456789", "0x12345678901234",
        "\u0660" * 16, "0123456789abcde\n", " " * 16,
    ],
)  # fmt: skip
def test_a_digest_that_is_none_names_no_file(text):
    schedule = Schedule.filled(Operation.FULL, 1, ARCH.blocks, ARCH.heads)
    names = write(schedule, NAMES)
    assert read(schedule, names) == NAMES
    for wrong in (text[:16] + names[16:], names[:-16] + text[:16], names + "0" * 16, names[1:], 3):
        with pytest.raises(Refusal, match="digests that are not"):
            read(schedule, wrong)


def test_what_comes_under_the_name_of_something_else_is_not_kept(tmp_path):
    store = ParameterCache(tmp_path)
    schedule = Schedule.filled(Operation.FULL, 1, ARCH.blocks, ARCH.heads)
    exchange(store, schedule, nothing())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    other = dict(STATE)
    name = "blocks.1.mlp.fc2.weight"
    other[name] = STATE[name] + 1
    with pytest.raises(Refusal, match="not those of their digest"):
        exchange(store, schedule, nothing(), other, NAMES)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
