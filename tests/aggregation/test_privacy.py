"""Differential privacy: the mechanism against its law, what is promised against closed forms."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from d2ft_fl.aggregation.keyed_noise import KEY_FILE, Noise
from d2ft_fl.aggregation.privacy import Privacy, drawn, noise_for
from d2ft_fl.aggregation.private_sums import PrivateRound, PrivateSums, Trainers
from d2ft_fl.aggregation.releases import Releases
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.util.files import read_lines
from tests.aggregation.test_robust import ARCH, WEIGHTS, update
from tests.conftest import all_of, random_schedule

KEY = bytes(range(32))
PRIVATE = {
    "clip-norm": 1.0,
    "noise-multiplier": 1.0,
    "delta": 1e-3,
    "noise-seed": 7,
    "backward-score": "magnitude",
    "forward-score": "magnitude",
}


def trainers(schedules, rate=1.0):
    """Of plans with these schedules."""
    return Trainers.of([(schedule, 4) for schedule in schedules], rate)


def sums(schedules, noise=0.0, clip=1.0, rate=1.0, key=KEY):
    releases = Releases(Privacy(clip, noise, rate, 1e-5))
    own = PrivateRound(releases, key, 1, trainers(schedules, rate))
    return PrivateSums(ARCH, WEIGHTS, own)


def moved(found, new):
    """All changes, one after another: float64."""
    return np.concatenate(
        [(new[n].double() - WEIGHTS[n].double()).numpy().ravel() for n in found.trained]
    )


# -- what is promised ----------------------------------------------------------------------------


def gaussian_epsilon(noise, rounds, delta):
    """The exact epsilon of normal noise (Balle & Wang, ICML 2018, theorem 8), composed."""
    mu = math.sqrt(rounds) / noise

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(excess, 0, 500)


@pytest.mark.parametrize("noise,rounds,delta", [(5.0, 10, 1e-5), (1.0, 3, 1e-3), (20.0, 100, 1e-6)])
def test_epsilon_of_all_clients_is_that_of_normal_noise(noise, rounds, delta):
    exact = gaussian_epsilon(noise, rounds, delta)
    found = Privacy(1.0, noise, 1.0, delta).epsilon([1] * rounds)
    assert exact <= found <= exact * 1.01 + 0.02


def test_sampling_lowers_epsilon_and_rounds_raise_it():
    all_of_them = Privacy(1.0, 1.0, 1.0, 1e-5)
    few = Privacy(1.0, 1.0, 0.01, 1e-5)
    assert few.epsilon([1] * 100) < 0.05 * all_of_them.epsilon([1] * 100)
    assert few.epsilon([1] * 10) < few.epsilon([1] * 100)
    assert few.epsilon([1] * 0) == 0


def test_noise_for_an_epsilon_is_the_least_that_keeps_it():
    noise = noise_for(2.0, 1e-5, 0.01, 100)
    assert Privacy(1.0, noise, 0.01, 1e-5).epsilon([1] * 100) <= 2.0
    assert Privacy(1.0, noise * 0.99, 0.01, 1e-5).epsilon([1] * 100) > 2.0


# -- randomness ----------------------------------------------------------------------------------


def test_noise_is_normal_and_a_function_of_key_and_context():
    found = Noise(KEY, "noise", 1).normal(100_001)
    assert found.shape == (100_001,)
    assert kstest(found, "norm").pvalue > 1e-3
    assert np.array_equal(found, Noise(KEY, "noise", 1).normal(100_001))
    for other in (Noise(KEY, "noise", 2), Noise(bytes(32), "noise", 1)):
        assert abs(np.corrcoef(found, other.normal(100_001))[0, 1]) < 0.02


def test_clients_are_drawn_each_by_itself():
    own = Privacy(1.0, 1.0, 0.3, 1e-5)
    rounds = [drawn(own, KEY, r, range(200)) for r in range(1, 101)]
    counts = [len(r) for r in rounds]
    assert 0.28 < np.mean(counts) / 200 < 0.32
    assert 0.7 < np.var(counts) / (200 * 0.3 * 0.7) < 1.4  # binomial, not a fixed number
    # Whoever else is there does not matter.
    assert drawn(own, KEY, 5, range(0, 200, 2)) == [c for c in rounds[4] if c % 2 == 0]
    assert drawn(own, KEY, 5, []) == []
    assert drawn(Privacy(1.0, 1.0, 1.0, 1e-5), KEY, 5, [3, 1]) == [1, 3]


# -- the mechanism -------------------------------------------------------------------------------


def test_without_noise_it_is_the_mean_of_clipped_changes_by_plan():
    everything = all_of(ARCH)
    one = sums([everything] * 4, clip=1e-2)
    one.add(update(everything, 1e-2))  # clipped
    one.add(update(everything, -1e-6))  # short enough, or nearly
    size = sum(WEIGHTS[n].numel() for n in one.trained)
    short = min(1e-6, 1e-2 / math.sqrt(size))
    wanted = (1e-2 / math.sqrt(size) - short) / 4  # two of the four did not answer
    assert np.allclose(moved(one, one.apply()), wanted, atol=2e-7)


def test_what_a_strategy_says_a_change_counts_is_not_listened_to():
    """Neither a step nor examples: what one client does to the sums is bounded by the clip norm."""
    everything = all_of(ARCH)
    plain, loud = (sums([everything] * 4, clip=1e-2) for _ in range(2))
    own = update(everything, 1e-2)
    plain.add(own)
    loud.add(replace(own, step=2.0, slot_examples=[100 * n for n in own.slot_examples]))
    for name, tensor in plain.apply().items():
        assert torch.equal(loud.apply()[name], tensor)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 10), st.floats(1e-6, 1))
def test_no_client_moves_the_sums_further_than_clip_norm(seed, clip, shift):
    schedule = random_schedule(ARCH, 2, seed)
    without, with_one = sums([schedule], clip=clip), sums([schedule], clip=clip)
    with_one.add(update(schedule, shift))
    planned = with_one.private.trainers.of_parameter
    totals = [
        np.concatenate(
            [t.ravel() for p in ARCH.parameters for t in own._sums.divide_by(p, planned(p))]
        )
        for own in (without, with_one)
    ]
    moved_by = np.linalg.norm((totals[1] - totals[0]).astype(np.longdouble)) / 2.0**36
    assert moved_by <= clip


def test_noise_of_every_slice_is_its_share_of_the_sums():
    everything = all_of(ARCH)
    own = sums([everything] * 5, noise=2.0, clip=0.1)
    for shift in (1e-3, -1e-3):
        own.add(update(everything, shift))
    change = moved(own, own.apply())
    assert kstest(change / (2.0 * 0.1 / 5), "norm").pvalue > 1e-3


def test_what_no_plan_trains_keeps_its_bits_and_what_plans_train_does_not():
    part = random_schedule(ARCH, 1, 3)
    own = sums([part, all_of(ARCH)][:1], noise=1.0)  # nobody answers
    new = own.apply()
    for p in ARCH.parameters:
        changed = new[p.name] != WEIGHTS[p.name]
        if p.name not in own.trained:
            assert not changed.any()
        elif heads := own.trained[p.name]:
            rest = [h for h in range(len(p.rows)) if h not in heads]
            assert p.pack(changed, heads).double().mean() > 0.9
            assert not p.pack(changed, rest).any()
        else:
            assert changed.double().mean() > 0.9


def test_the_same_sums_get_the_same_noise_in_any_order_and_others_another():
    everything = all_of(ARCH)

    def change(*shifts):
        own = sums([everything] * 2, noise=1.0)
        for shift in shifts:
            own.add(update(everything, shift))
        return moved(own, own.apply())

    assert np.array_equal(change(1e-3, 2e-3), change(2e-3, 1e-3))
    other = change(1e-3, 2e-3) - change(1e-3)
    assert abs(other).mean() > 0.1  # fresh noise, not the difference of two updates


def test_counts_are_expected_over_draws_and_one_at_least():
    everything, nothing = (
        all_of(ARCH),
        Schedule.filled(Operation.SHORTCUT, 1, ARCH.blocks, ARCH.heads),
    )
    p = next(p for p in ARCH.parameters if p.rows and p.trains)
    half = trainers([everything] * 6 + [nothing], 0.5)
    assert half.of_parameter(p) == dict.fromkeys(range(ARCH.heads), 3.0)
    assert half.some == 3.0
    few = sums([everything], rate=0.1)
    few.add(update(everything, 1e-6))
    assert np.allclose(moved(few, few.apply()), 1e-6, atol=1e-7)


def test_a_block_counts_a_client_once_however_many_of_its_heads_it_trains():
    two, other = all_of(ARCH).operations.copy(), all_of(ARCH).operations.copy()
    two[:, :, 2:] = Operation.SHORTCUT
    other[:] = Operation.SHORTCUT
    other[:, 0, 3] = Operation.FULL
    found = trainers([Schedule(two), Schedule(other)], 0.5)
    assert found.heads[0].tolist() == [0.5, 0.5, 0.0, 0.5]
    assert found.blocks.tolist() == [1.0] + [0.5] * (ARCH.blocks - 1)
    shared = [p for p in ARCH.parameters if p.kind is Kind.SHARED and p.trains]
    assert {found.of_parameter(p)[-1] for p in shared if p.block == 0} == {1.0}
    assert {found.of_parameter(p)[-1] for p in shared if p.block == 1} == {0.5}
    assert found.some == 1.0


@pytest.mark.parametrize("sampled,rate", [(0, 1.0), (3, 0.3), (10, 1.0)])
def test_the_chance_to_take_part(sampled, rate):
    config = RunConfig.from_mapping(PRIVATE | {"clients": 10, "sample-clients": sampled})
    assert Privacy.of(config, ()).rate == rate


# -- runs ----------------------------------------------------------------------------------------


def run(tmp_path, name="run", **options):
    entries = {
        "rounds": 2,
        "clients": 6,
        "test-examples": 40,
        "train-examples": 120,
        "run-folder": str(tmp_path / name),
        **PRIVATE,
        **{key.replace("_", "-"): value for key, value in options.items()},
    }
    summary = run_local(checked(RunConfig.from_mapping(entries)))
    lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


def model(tmp_path, name):
    from safetensors.torch import load_file

    return load_file(tmp_path / name / "model.safetensors")


def test_a_run_reports_its_epsilon_and_repeats(tmp_path):
    summary, rows = run(tmp_path, "one", sample_clients=3)
    own = Privacy(1.0, 1.0, 0.5, 1e-3)
    assert [row["epsilon"] for row in rows] == [own.epsilon([1] * 1), own.epsilon([1] * 2)]
    assert summary["privacy"]["epsilon"] == own.epsilon([1] * 2)
    assert not summary["privacy"]["secret"]
    assert all(row["clients"] <= 6 for row in rows)
    page = (tmp_path / "one" / "report.html").read_text()
    assert "epsilon" in page
    run(tmp_path, "two", sample_clients=3)
    first, second = model(tmp_path, "one"), model(tmp_path, "two")
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_secret_noise_is_kept_with_the_run_and_another_in_each(tmp_path):
    run(tmp_path, "one", noise_seed=-1, rounds=1)
    run(tmp_path, "two", noise_seed=-1, rounds=1)
    keys = [(tmp_path / name / KEY_FILE).read_bytes() for name in ("one", "two")]
    assert keys[0] != keys[1]
    assert (tmp_path / "one" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    first, second = model(tmp_path, "one"), model(tmp_path, "two")
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_a_resumed_run_draws_the_same_noise(tmp_path):
    entries = {"noise-seed": -1, "clients": 4, "test-examples": 40, "train-examples": 80}
    whole = {**PRIVATE, **entries, "rounds": 3, "run-folder": str(tmp_path / "a")}
    half = {**PRIVATE, **entries, "rounds": 1, "run-folder": str(tmp_path / "b")}
    run_local(checked(RunConfig.from_mapping(half)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / KEY_FILE).write_bytes((tmp_path / "b" / KEY_FILE).read_bytes())
    run_local(checked(RunConfig.from_mapping(whole)))
    rest = {**half, "rounds": 3, "resume": half.pop("run-folder")}
    rest.pop("run-folder")
    run_local(checked(RunConfig.from_mapping(rest)))
    first, second = model(tmp_path, "a"), model(tmp_path, "b")
    assert all(torch.equal(first[n], second[n]) for n in first)
    (tmp_path / "b" / KEY_FILE).unlink()
    with pytest.raises(ConfigError, match=r"noise\.key"):
        run_local(RunConfig.from_mapping(rest | {"rounds": 4}))


def test_a_round_without_anybody_has_noise_alone(tmp_path):
    _, rows = run(tmp_path, clients=2, sample_clients=1, noise_seed=2, rounds=6)
    lines = read_lines(tmp_path / "run" / "private.jsonl")
    assert 0 in [line["measured"]["worked"] for line in lines]
    assert {row["worked"] for row in rows} == {1.0}  # half of two, whoever was drawn


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_noise_is_in_units_of_clip_norm(tmp_path, tuning):
    options = {"rounds": 1, "tuning": tuning, "test_examples": 200}
    little, _ = run(tmp_path, "little", clip_norm=1e-6, **options)
    loud, _ = run(tmp_path, "loud", clip_norm=100.0, **options)
    assert little["loss"] < 10 < loud["loss"]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"clip-norm": 0.0}, "clip-norm"),
        ({"epsilon": 1.0}, "set one of them to 0"),
        ({"delta": 0.2}, "1 / clients = 0.1"),
        ({"delta": 0.0}, "delta = 0.0"),
        ({"aggregation": "median"}, "'median' cannot have noise"),
        ({"backward-score": "fisher"}, "fisher scores are measured"),
        ({"compensation": True}, "compensation"),
        ({"noise-multiplier": 1e-200}, "promises nothing"),
        ({"noise-multiplier": -1.0}, "noise-multiplier = -1.0"),
        ({"noise-seed": -2}, "noise-seed = -2"),
        ({"noise-multiplier": 0.0, "epsilon": 1e-9}, "cannot be kept"),
    ],
)
def test_what_would_break_the_promise_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        checked_options(RunConfig.from_mapping({**PRIVATE, **options}))
