"""Robust folding against hand arithmetic, and against numpy coordinate by coordinate."""

import errno
import json
import os
import resource
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.aggregation.robust import ROBUST, RobustSums, clipped, mixed
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update
from d2ft_fl.errors import ConfigError, ReplyError, RunError
from d2ft_fl.records.run_folder import read_rows
from d2ft_fl.rounds.checks import checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.server.console import summary
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for, up_spec
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.wire import blob
from tests.conftest import all_of, build, random_schedule, weights_of

MODEL, ARCH = build()
WEIGHTS = weights_of(MODEL)


def update(schedule, shift):
    """What a client sends whose every value has moved by ``shift``."""
    packed = pack_for(ARCH, WEIGHTS, schedule)
    tensors = {}
    for name, shape in up_spec(ARCH, schedule).items():
        p = ARCH.by_name[name]
        heads = schedule.heads(schedule.trained, p.block)
        old = p.pack(WEIGHTS[name], heads) if p.kind is Kind.SLICED else packed[name]
        tensors[name] = (old.double() + shift).to(old.dtype)
        assert tuple(tensors[name].shape) == shape
    return Update(schedule, [4] * schedule.slots, tensors)


def fold(kind, shifts, suspects=1, mixing=False):
    sums = RobustSums(ARCH, WEIGHTS, kind, suspects, mixing)
    for shift in shifts:
        sums.add(update(all_of(ARCH), shift))
    new = sums.apply()
    return {n: (new[n].double() - WEIGHTS[n].double()) for n in sums.trained}, sums


@pytest.mark.parametrize("kind", sorted(ROBUST))
def test_every_client_counts_the_same_whatever_a_strategy_says(kind):
    plain, loud = (RobustSums(ARCH, WEIGHTS, kind, 1) for _ in range(2))
    for shift in (1, 2, 5):
        own = update(all_of(ARCH), shift)
        plain.add(own)
        loud.add(replace(own, step=2.0, slot_examples=[shift * n for n in own.slot_examples]))
    heard = loud.apply()
    assert all(torch.equal(heard[name], tensor) for name, tensor in plain.apply().items())


@pytest.mark.parametrize(
    "kind,suspects,shifts,wanted",
    [
        ("trimmed-mean", 1, [1, 2, 3, 4, 1000], 3),  # of 2, 3, 4
        ("trimmed-mean", 2, [-900, 1, 2, 4, 1000], 2),
        ("trimmed-mean", 1, [1, 2, 9], 2),
        ("median", 1, [1, 2, 5, 1000], 3.5),
        ("median", 1, [-7, 2, 5], 2),
        ("mean-around-median", 1, [1, 2, 3, 1000], 2),  # median 2.5: of 1, 2, 3
        ("mean-around-median", 2, [-900, -800, 1, 2, 6], 3),  # median 1
        ("mean-around-median", 2, [1, 2, 3, 4, 5, 900, 1000], 3),  # median 4
    ],
)
def test_by_hand(kind, suspects, shifts, wanted):
    changes, sums = fold(kind, [s * 1e-2 for s in shifts], suspects)
    assert len(changes) > 30
    assert sums.left == 0
    for change in changes.values():
        assert torch.allclose(change, torch.full_like(change, wanted * 1e-2), atol=1e-6)


@pytest.mark.parametrize(
    "shifts,suspects,wanted",
    [
        ([0, 1, 2, 1000], 1, [1, 1, 1, (1000 + 2 + 1) / 3]),
        ([0, 4, 5, 6, 7], 2, [3, 5, 5, 6, 6]),  # of 4 and 6, at 1 from 5, both are near enough
        ([3, 3, 3], 1, [3, 3, 3]),
    ],
)
def test_mixing_by_hand(shifts, suspects, wanted):
    # Distances are of whole slices: a second coordinate that all have in common changes none.
    values = torch.tensor([[float(s), 7.0] for s in shifts], dtype=torch.float64)
    found = mixed(values, suspects)
    assert torch.allclose(found[:, 0], torch.tensor(wanted, dtype=torch.float64))
    assert torch.equal(found[:, 1], values[:, 1])


def test_mixing_goes_by_the_distance_of_slices_not_of_coordinates():
    # In its first coordinate the third is nearest to the first, as a whole the second is.
    slices = torch.tensor([[0, 0], [2, 0], [0, 10], [9, 5]], dtype=torch.float64)
    assert mixed(slices, 2).tolist() == [[1, 0], [1, 0], [0, 5], [5.5, 2.5]]


def test_two_of_five_that_are_far_away_leave_no_trace_after_mixing():
    honest, hostile = [1, 2, 6], [-900, -1000]
    for kind in ROBUST:
        changes, _ = fold(kind, [s * 1e-2 for s in (*honest, *hostile)], 2, mixing=True)
        for change in changes.values():  # the mean of those who are honest
            assert torch.allclose(change, torch.full_like(change, 3e-2), atol=1e-6)


def test_many_updates_need_few_open_files_and_leave_nothing(tmp_path, monkeypatch):
    """The median of 61 clients by hand, under a limit of 20 more files than are open."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        changes, _ = fold("median", [s * 1e-3 for s in range(61)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for change in changes.values():
        assert torch.allclose(change, torch.full_like(change, 30e-3), atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sums = RobustSums(ARCH, WEIGHTS, "median", 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blob, "append", full)
    with pytest.raises(RunError, match=f"{str(tmp_path)!r} cannot be written to: No space left"):
        sums.add(update(all_of(ARCH), 1.0))


@pytest.mark.parametrize("kind", ROBUST)
@pytest.mark.parametrize("suspects,enough", [(1, 3), (2, 5)])
def test_a_slice_that_too_few_trained_keeps_its_bits(kind, suspects, enough):
    sums = RobustSums(ARCH, WEIGHTS, kind, suspects)
    for _ in range(enough - 1):
        sums.add(update(all_of(ARCH), 0.1))
    new = sums.apply()
    assert sums.trained == {}
    assert sums.left == 1
    assert not sums.subnets_trained.any()
    assert all(new[name] is tensor for name, tensor in WEIGHTS.items())
    many, sums = fold(kind, [0.1] * enough, suspects)
    assert len(many) > 30
    assert sums.subnets_trained.all()


@pytest.mark.parametrize("mixing,spans", [(False, 1), (True, 2)])
@pytest.mark.parametrize("kind", ROBUST)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_no_minority_leads_a_slice_out_of_what_the_rest_say(kind, mixing, spans, seed):
    # Who is honest is mixed with hostile ones only where these are nearer than who is honest.
    draw = np.random.default_rng(seed)
    honest, hostile = draw.normal(0, 1e-2, 3), draw.normal(0, draw.choice([2e-2, 10.0]), 2)
    changes, _ = fold(kind, draw.permutation([*honest, *hostile]), 2, mixing)
    reach = spans * np.ptp(honest) + 1e-6
    for change in changes.values():
        assert change.min() > honest.min() - reach
        assert change.max() < honest.max() + reach


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["trimmed-mean", "median"]))
def test_slices_of_those_who_trained_them_in_any_order(seed, kind):
    draw = np.random.default_rng(seed)
    updates = [
        update(random_schedule(ARCH, 2, seed + number), float(draw.normal(0, 0.1)))
        for number in range(6)
    ]
    found = []
    for mixing in (True, False):
        found.clear()
        for order in (updates, updates[::-1]):
            sums = RobustSums(ARCH, WEIGHTS, kind, 1, mixing)
            for one in order:
                sums.add(one)
            found.append(sums.apply())
        assert all(torch.equal(found[0][name], found[1][name]) for name in WEIGHTS)
    p = next(p for p in ARCH.of_kind(Kind.SLICED) if p.role == "fc2.weight")
    for head in range(ARCH.heads):
        own = [u for u in updates if head in u.weights(p)]
        got = p.pack(found[0][p.name], [head])
        if len(own) < 3:
            assert torch.equal(got, p.pack(WEIGHTS[p.name], [head]))
            continue
        packs = []
        for u in own:
            first = sum(len(p.rows[h]) for h in u.weights(p) if h < head)
            packs.append(u.tensors[p.name][first : first + len(p.rows[head])].numpy())
        stack = np.sort(np.stack(packs).astype(np.float64), axis=0)
        cut = (len(own) - 1) // 2 if kind == "median" else 1
        wanted = stack[cut : len(own) - cut].mean(axis=0)
        assert np.allclose(got.numpy(), wanted, atol=1e-7)


def test_a_bad_update_is_refused_before_it_is_kept():
    sums = RobustSums(ARCH, WEIGHTS, "median", 1)
    bad = update(all_of(ARCH), 0.1)
    bad.tensors["head.bias"][0] = float("nan")
    with pytest.raises(ReplyError, match="not finite"):
        sums.add(bad)
    assert sums.trained == {}


def test_clipping_shortens_a_change_to_its_norm_and_no_other():
    long = update(all_of(ARCH, Operation.FULL), 0.1)
    short = clipped(ARCH, WEIGHTS, long, 0.5)
    length = 0.0
    for name, tensor in short.tensors.items():
        p = ARCH.by_name[name]
        old = WEIGHTS[name]
        old = p.pack(old, range(ARCH.heads)) if p.kind is Kind.SLICED else old
        change = tensor.double() - old.double()
        length += float(change.square().sum())
        assert float(change.min()) > 0  # the direction is the same
    assert length**0.5 == pytest.approx(0.5, rel=1e-4)
    assert clipped(ARCH, WEIGHTS, long, 1e6) is long
    Sums(ARCH, WEIGHTS, 1000).add(short)


def test_hostile_clients_lead_the_mean_away_and_the_trimmed_mean_nowhere(quick, tmp_path):
    def ended(**changes):
        config = quick(
            strategy="fedavg", clients=5, rounds=3, hostile_share=0.2,
            run_folder=str(tmp_path / str(len(list(tmp_path.iterdir())))), **changes,
        )  # fmt: skip
        run_local(config)
        return json.loads(Path(config.run_folder, "summary.json").read_text())

    mean, trimmed = ended(), ended(aggregation="trimmed-mean")
    assert trimmed["loss"] < 2.0 < mean["loss"]
    assert mean["too_few_trainers"] is None
    assert trimmed["too_few_trainers"] == 0


def test_a_run_says_which_share_of_its_slices_too_few_trained(quick, tmp_path, capsys):
    config = quick(clients=5, rounds=2, aggregation="median", trim_share=0.4)
    run_local(config)
    rows = read_rows(Path(config.run_folder))
    left = [row["too_few_trainers"] for row in rows]
    assert 0 < min(left) <= max(left) < 1
    summary(json.loads(Path(config.run_folder, "summary.json").read_text()))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{sum(left) / 2:.0%} of the slices that clients trained stayed as they were" in said


def test_more_hostile_clients_than_the_rest_can_bear_are_refused(quick):
    with pytest.raises(ConfigError, match="needs 5 clients a round to bear 2 hostile ones"):
        checked_options(quick(clients=4, aggregation="median", trim_share=0.4))


def test_robust_folding_does_not_go_with_products_of_factors(quick):
    with pytest.raises(ConfigError, match="clip-norm acts on factors"):
        checked_options(quick(tuning="lora", lora_aggregation="product", clip_norm=1.0))
    with pytest.raises(ConfigError, match="aggregation acts on factors"):
        checked_options(quick(tuning="lora", lora_aggregation="stack", aggregation="median"))
