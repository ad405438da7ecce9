"""What attackers send, against hand arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from d2ft_fl.aggregation.hostile import Attack, alie_factor, min_max_factor
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.errors import ConfigError
from d2ft_fl.records.run_folder import read_rows
from d2ft_fl.rounds.checks import checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.subnets.architecture import Kind
from tests.aggregation import tiny
from tests.aggregation.test_robust import ARCH, WEIGHTS, update
from tests.conftest import all_of, random_schedule


def changes_sent(kind, honest, own=1.0, hostile=1, scale=-2.0, schedule=None):
    """The change of every value that the first attacker sends, by parameter."""
    attack = Attack(ARCH, WEIGHTS, kind, scale, (0, 1))
    for client, shift in enumerate(honest):
        attack.see(client, update(all_of(ARCH), shift))
    mine = update(schedule or all_of(ARCH), own)
    for _ in range(hostile):
        attack.join(mine)
    sent = attack.send(9, mine)
    Sums(ARCH, WEIGHTS, 10_000).add(sent)  # it is a valid update
    old = {name: tensor.double() - own for name, tensor in mine.tensors.items()}
    return {name: tensor.double() - old[name] for name, tensor in sent.tensors.items()}


def same(changes, wanted):
    return all((change - wanted).abs().max() < 1e-4 for change in changes.values())


def test_sign_flip_sends_its_own_change_times_the_scale():
    assert same(changes_sent("sign-flip", [], own=0.5, scale=-10), -5)


def test_inner_product_sends_the_mean_of_the_honest_times_the_scale():
    assert same(changes_sent("inner-product", [1, 2, 6], scale=-0.5), -1.5)


def test_alie_stays_z_deviations_from_the_mean():
    # 4 honest of which 5 // 2 + 1 - 1 = 2 are to support it: z of (4 - 2) / 4 is 0
    assert alie_factor(4, 1) == 0
    # 8 honest and 2 hostile: 10 // 2 + 1 - 2 = 4 supporters, z of 1 / 2; 3 hostile: z of 5 / 8
    assert alie_factor(8, 3) == pytest.approx(0.31863936396)
    honest = [0, 0, 0, 0, 0, 0, 0, 8]  # mean 1, deviation sqrt(7)
    wanted = 1 - 0.31863936396 * math.sqrt(7)
    assert same(changes_sent("alie", honest, hostile=3), wanted)


def test_deviations_of_alie_by_the_normal_law():
    # 7 honest, 2 hostile: 9 // 2 + 1 - 2 = 3 supporters, z of (7 - 3) / 7
    assert alie_factor(7, 2) == pytest.approx(norm.ppf(4 / 7))
    # 6 honest, 2 hostile: 8 // 2 + 1 - 2 = 3, z of 1 / 2; 5 and 4: 9 // 2 + 1 - 4 = 1, z of 4 / 5
    assert alie_factor(6, 2) == 0
    assert alie_factor(5, 4) == pytest.approx(norm.ppf(4 / 5))
    # Where all honest are to support it, or none, it goes nowhere.
    assert alie_factor(1, 1) == alie_factor(2, 0) == 0
    assert alie_factor(1, 3) == alie_factor(2, 4) == alie_factor(1, 9) == 0


def test_min_max_of_honest_clients_that_agree_goes_nowhere():
    alike = torch.tensor([[1.0, -2.0]] * 3, dtype=torch.float64)
    assert min_max_factor(alike, alike.mean(0), torch.zeros(2, dtype=torch.float64)) == 0
    # Rounding makes the mean of tenths another number than each, and nothing is left to go.
    alike = torch.tensor([[0.1, 0.7, 0.3]] * 3, dtype=torch.float64)
    off = alike.mean(0) + torch.tensor([1e-9, 2e-9, -1e-9], dtype=torch.float64)
    way = torch.tensor([2e-9, -1e-9, 3e-9], dtype=torch.float64)
    assert math.isfinite(min_max_factor(alike, off, way))


def test_min_max_goes_as_far_as_the_honest_lie_apart():
    # One coordinate, honest 0, 2, 4: mean 2, deviation 1.633; no farther than 4 from 4, so at 0.
    values = torch.tensor([[0.0], [2.0], [4.0]], dtype=torch.float64)
    mean, deviation = values.mean(0), values.std(0, correction=0)
    assert float(mean - min_max_factor(values, mean, deviation) * deviation) == pytest.approx(0)
    assert same(changes_sent("min-max", [0, 2, 4]), 0)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32))
def test_min_max_is_the_farthest_that_is_still_among_them(clients, size, seed):
    draw = np.random.default_rng(seed)
    values = torch.from_numpy(draw.normal(size=(clients, size)))
    mean, deviation = values.mean(0), values.std(0, correction=0)
    gamma = min_max_factor(values, mean, deviation)
    widest = max(float((a - b).norm()) for a in values for b in values)
    farthest = [
        max(float((mean - far * gamma * deviation - one).norm()) for one in values)
        for far in (1, 1 + 1e-6)
    ]
    assert farthest[0] <= widest * (1 + 1e-9) < farthest[1] + widest * 1e-6
    assert gamma > 0


def test_gaussian_noise_is_as_large_as_its_change_times_the_scale():
    changes = changes_sent("gaussian", [], own=0.5, scale=4)
    largest = max(changes.values(), key=torch.numel)
    assert float(largest.std()) == pytest.approx(2.0, rel=0.1)
    assert abs(float(largest.mean())) < 0.2
    again = changes_sent("gaussian", [], own=0.5, scale=4)
    assert all(torch.equal(change, again[name]) for name, change in changes.items())


def test_gaussian_noise_is_that_of_seed_and_client_slice_by_slice():
    """What is sent has the spread of the slice's change, times the scale."""
    mine = tiny.update(tiny.schedule([[0, 3, 3], [0, 0, 3]]), [1], 0.5)
    attack = Attack(tiny.ARCH, tiny.WEIGHTS, "gaussian", 4.0, (3, 1))
    sent = attack.send(9, mine)
    assert sent.tensors.keys() == mine.tensors.keys()
    draw = np.random.default_rng([3, 1, 9, 5])
    for name, tensor in mine.tensors.items():
        p = tiny.ARCH.by_name[name]
        heads = [[1, 2], [2]][p.block] if p.rows else [None]
        first, change = 0, tensor.double() - tiny.packed_old(mine.schedule, name).double()
        for head in heads:
            rows = slice(first, first + (len(p.rows[head]) if p.rows else len(tensor)))
            first = rows.stop
            noise = torch.from_numpy(draw.standard_normal(tuple(change[rows].shape)))
            wanted = 4 * change[rows].square().mean().sqrt() * noise
            found = (sent.tensors[name] - tensor + change)[rows]
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_who_is_hostile_is_counted_slice_by_slice():
    """Head 1 of block 0 has 3 hostile trainers, the others one."""
    attack = Attack(tiny.ARCH, tiny.WEIGHTS, "alie", 1.0, (0, 1))
    for client, shift in enumerate([0, 0, 0, 0, 0, 0, 0, 8]):  # mean 1, deviation sqrt(7)
        attack.see(client, tiny.update(tiny.EVERYTHING, [1], float(shift)))
    mine = tiny.update(tiny.EVERYTHING, [1], 0.5)
    few = tiny.update(tiny.schedule([[0, 3, 0], [0, 0, 0]]), [1], 0.5)
    for joins in (mine, few, few):
        attack.join(joins)
    sent = attack.send(9, mine).tensors["0.ask.weight"]
    change = sent - tiny.packed_old(mine.schedule, "0.ask.weight")
    # Of 8 honest and 1 hostile 4 are to support it: z of 4 / 8 is 0; with 3, of 5 / 8.
    far = 1 - norm.ppf(5 / 8) * math.sqrt(7)
    wanted = torch.tensor([1.0, 2 * far, 3 * far, 4 * far, 5.0, 6.0], dtype=torch.float64)
    assert torch.allclose(change.double(), wanted[:, None].expand(6, 4), atol=1e-4)


@pytest.mark.parametrize("kind", ["inner-product", "alie", "min-max"])
def test_where_nobody_honest_trains_attackers_send_what_they_trained(kind):
    assert same(changes_sent(kind, [], own=0.25), 0.25)


@pytest.mark.parametrize("seed", range(3))
def test_slices_are_told_apart(seed):
    moved = {n: torch.randn(w.shape, dtype=torch.float64) / 8 for n, w in WEIGHTS.items()}
    everyone, mine = all_of(ARCH), random_schedule(ARCH, 1, seed)

    def packed(tensors, schedule):
        out = dict(tensors)
        for p in ARCH.of_kind(Kind.SLICED):
            out[p.name] = p.pack(tensors[p.name], schedule.heads(schedule.trained, p.block))
        return out

    honest = update(everyone, 0)
    there = packed({n: (w.double() + moved[n]).float() for n, w in WEIGHTS.items()}, everyone)
    attack = Attack(ARCH, WEIGHTS, "inner-product", 2.0, (0, 1))
    attack.see(0, honest.holding({n: there[n] for n in honest.tensors}))
    sent = attack.send(9, update(mine, 0))
    wanted = packed({n: w.double() + 2 * moved[n] for n, w in WEIGHTS.items()}, mine)
    for name, tensor in sent.tensors.items():
        assert torch.allclose(tensor.double(), wanted[name], atol=1e-5)


@pytest.mark.parametrize("attack", ["label-flip", "alie"])
def test_attacks_run_and_leave_honest_clients_as_they_are(quick, tmp_path, attack):
    def ended(name, **changes):
        config = quick(clients=5, rounds=1, run_folder=str(tmp_path / name), **changes)
        summary = run_local(config)
        return summary, read_rows(tmp_path / name)[0]

    calm, before = ended("calm")
    attacked, after = ended("attacked", hostile_share=0.4, hostile_attack=attack)
    assert attacked["faults"] == 0
    assert attacked["client_rounds"] == calm["client_rounds"]
    assert after["loss"] != before["loss"]


def test_attacks_do_not_go_with_ranks_of_their_own(quick):
    with pytest.raises(ConfigError, match="leave one of both out"):
        checked_options(
            quick(tuning="lora", lora_aggregation="product", lora_ranks="2", hostile_share=0.2)
        )
