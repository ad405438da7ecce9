"""Groups of fixed parameters by hand: their names, their files, and when these are read."""

import hashlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_fl.errors import Refusal
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.util import cache
from d2ft_fl.wire import parameter_cache
from d2ft_fl.wire.parameter_cache import ParameterCache, digests, groups_of, is_held, read, write
from tests.aggregation import tiny
from tests.aggregation.tiny import FORWARD, FULL, SKIP, WEIGHTS, schedule

FIXED = ("embed", "head.bias", "0.ask.weight", "0.fall.weight", "0.fall.bias", "1.ask.weight",
         "1.scale.gamma")  # fmt: skip
ARCH = replace(
    tiny.ARCH,
    parameters=tuple(replace(p, fixed=p.name in FIXED) for p in tiny.ARCH.parameters),
)
NAMES = digests(ARCH, WEIGHTS)
PART = schedule([[SKIP, FULL, FORWARD], [SKIP] * 3])
GROUPS = [(-1, -1), (0, -1), (0, 1), (0, 2)]


def nothing():
    return np.zeros((2, 3), dtype=bool)


def name_of(**tensors):
    """The digest of 8 bytes over names in order, shapes and numbers."""
    total = b"".join(
        name.encode() + str(tuple(t.shape)).encode() + t.contiguous().numpy().tobytes()
        for name, t in sorted(tensors.items())
    )
    return hashlib.blake2b(total, digest_size=8).hexdigest()


def exchange(store, own, cached, weights=WEIGHTS, names=NAMES):
    sent = pack_for(ARCH, weights, own, cached)
    return sent, store.complete(ARCH, own, sent, cached, names)


def complete(whole, own):
    expected = pack_for(ARCH, WEIGHTS, own)
    assert whole.keys() == expected.keys()
    return all(torch.equal(whole[name], tensor) for name, tensor in expected.items())


def test_every_group_is_named_by_what_is_in_it():
    assert set(NAMES) == {(-1, -1)} | {(block, head) for block in (0, 1) for head in range(-1, 3)}
    assert NAMES[-1, -1] == name_of(**{n: WEIGHTS[n] for n in ("embed", "head.bias")})
    assert NAMES[0, -1] == name_of(**{"0.fall.bias": WEIGHTS["0.fall.bias"]})
    assert NAMES[1, -1] == name_of(**{"1.scale.gamma": WEIGHTS["1.scale.gamma"]})
    for head, (rows, columns) in enumerate(zip(tiny.IN_ROWS, tiny.OUT_ROWS, strict=True)):
        ask, fall = WEIGHTS["0.ask.weight"][list(rows)], WEIGHTS["0.fall.weight"][:, list(columns)]
        assert NAMES[0, head] == name_of(**{"0.ask.weight": ask, "0.fall.weight": fall.T})
        assert NAMES[1, head] == name_of(**{"1.ask.weight": WEIGHTS["1.ask.weight"][list(rows)]})


@pytest.mark.parametrize("block,head", [(0, 0), (0, 2), (1, 1)])
def test_only_groups_that_are_said_to_have_changed_are_named_anew(block, head):
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    assert digests(ARCH, other, NAMES) == NAMES
    assert digests(ARCH, other, NAMES, nothing()) == NAMES
    changed = nothing()
    changed[block, head] = True
    found = digests(ARCH, other, NAMES, changed)
    assert {group for group in NAMES if found[group] != NAMES[group]} == {(block, head)}
    assert found[block, head] == digests(ARCH, other)[block, head]


def test_the_groups_of_a_schedule_and_what_a_message_says_of_them():
    assert list(groups_of(PART)) == GROUPS
    last = schedule([[SKIP] * 3, [FULL, SKIP, SKIP]])
    assert list(groups_of(last)) == [(-1, -1), (1, -1), (1, 0)]
    text = write(PART, NAMES)
    assert text == "".join(NAMES[group] for group in GROUPS)
    assert read(PART, text) == {group: NAMES[group] for group in GROUPS}
    for wrong in (text[:-1], text + "0", text[:-1] + "g", text.encode(), None):
        with pytest.raises(Refusal, match="digests that are not 4 of 16 digits"):
            read(PART, wrong)


def test_a_client_has_what_its_subnets_need():
    cached = nothing()
    cached[0, 0] = cached[1, 2] = True
    held = [group for group in NAMES if is_held(group, cached)]
    assert set(held) == {(-1, -1), (0, -1), (0, 0), (1, -1), (1, 2)}
    assert not any(is_held(group, nothing()) for group in NAMES)


def test_groups_are_kept_in_files_of_their_names_and_what_is_whole_is_not_copied(tmp_path):
    store = ParameterCache(tmp_path)
    sent, whole = exchange(store, PART, nothing())
    assert complete(whole, PART)
    for name in ("embed", "0.fall.bias", "0.fall.weight", "0.give.weight"):
        assert (whole[name] is sent[name]) == (name != "0.fall.weight")
    paths = {f"{NAMES[g][:2]}/{NAMES[g]}.safetensors" for g in GROUPS}
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*")} == paths
    rest, again = exchange(store, PART, PART.resident)
    assert not set(rest) & set(FIXED)
    assert complete(again, PART)
    # One head is there, the other comes.
    wide = schedule([[FULL, FULL, SKIP], [SKIP, FULL, SKIP]])
    sent, more = exchange(store, wide, PART.resident)
    assert len(sent["0.ask.weight"]) == 1
    assert "0.fall.bias" not in sent
    assert complete(more, wide)


def test_files_are_written_once_and_checked_once_a_process(tmp_path, monkeypatch):
    store, read_names = ParameterCache(tmp_path), []
    exchange(store, PART, nothing())
    assert store.intact == set()
    before = {p: p.stat().st_ino for p in tmp_path.glob("*/*")}
    exchange(store, PART, nothing())  # finds them, and checks them
    keys = {(p.stem, p.stat().st_ino, p.stat().st_size) for p in before}
    assert store.intact == keys
    real = parameter_cache._digest
    monkeypatch.setattr(parameter_cache, "_digest", lambda t: read_names.append(set(t)) or real(t))
    exchange(store, PART, PART.resident)
    assert read_names == []
    exchange(ParameterCache(tmp_path), PART, PART.resident)
    assert len(read_names) == len(GROUPS)
    monkeypatch.setattr(ParameterCache, "_read", None)  # what is known is not read to be saved
    exchange(store, PART, nothing())
    assert {p: p.stat().st_ino for p in tmp_path.glob("*/*")} == before


def test_what_is_used_is_kept(tmp_path):
    store = ParameterCache(tmp_path)
    exchange(store, PART, nothing())
    for path in tmp_path.glob("*/*"):
        os.utime(path, (0, 0))
    exchange(store, schedule([[SKIP, FULL, SKIP], [SKIP] * 3]), PART.resident)
    store.prune()
    assert {path.stem for path in tmp_path.glob("*/*")} == {NAMES[group] for group in GROUPS[:3]}


def test_a_cache_is_its_folder(tmp_path, monkeypatch):
    one, other = ParameterCache(tmp_path), ParameterCache(tmp_path)
    one.intact.add(("name", 1, 2))
    assert one == other != ParameterCache(tmp_path / "other")
    assert len({one, other}) == 1
    assert repr(one) == f"ParameterCache(folder={tmp_path!r})"
    monkeypatch.setenv("D2FT_WEIGHTS", str(tmp_path))
    assert ParameterCache.default().folder == tmp_path / "d2ft-weights"
    monkeypatch.delenv("D2FT_WEIGHTS")
    assert ParameterCache.default().folder == cache.folder("weights")
