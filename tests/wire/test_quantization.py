"""Codes against the law of stochastic rounding, and against what a run puts on the wire."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.config.choices import UPLOAD_BITS
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import GlobalModel, pack_for
from d2ft_fl.wire.quantization import (
    dequantize,
    dequantize_rows,
    is_quantized,
    quantize,
    quantize_changes,
    quantize_rows,
    row_bytes,
    with_quantized_changes,
)
from tests.conftest import build, random_schedule, weights_of

FEW = [bits for bits in UPLOAD_BITS if bits < 32]
MODEL, ARCH = build(embed_dim=48, depth=2, num_heads=4, mlp_ratio=66 / 48)
WEIGHTS = weights_of(MODEL)


def generator(seed=0):
    return np.random.SFC64(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    bits=st.sampled_from(FEW),
    size=st.sampled_from([0.0, 1e-20, 1e-3, 1e4]),
)
def test_a_number_is_off_by_less_than_a_step(seed, rows, width, bits, size):
    numbers = drawn(rows, width, seed=seed) * size
    steps = numbers.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    for draws, most in ((generator(seed), 1), (None, 0.5)):
        quantized = quantize_rows(numbers, bits, draws)
        assert quantized.dtype == torch.uint8
        assert quantized.shape == (rows, 4 + -(-width * bits // 8))
        off = (dequantize_rows(quantized, width, bits) - numbers).abs()
        assert (off <= most * steps * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", FEW)
def test_rounding_is_right_on_average(bits):
    rows = torch.tensor([[1.0, -0.8, 0.3, 0.01, 0.0, -1.0]])
    draws = torch.cat(
        [
            dequantize_rows(quantize_rows(rows, bits, g), 6, bits)
            for g in map(generator, range(4000))
        ]
    )
    step = 1 / (2 ** (bits - 1) - 1)
    # The mean of 4,000 draws has a standard deviation of at most half a step / sqrt(4000).
    assert ((draws.mean(dim=0) - rows[0]).abs() <= 4 * 0.5 * step / 4000**0.5 + 1e-6).all()
    assert (draws[:, [0, 4, 5]] == rows[0, [0, 4, 5]]).all()  # the ends, and nothing, are exact


class Every:
    """Draws each number of 16 bits once."""

    def random_raw(self, count):
        return np.arange(4 * count, dtype=np.uint16).view(np.uint64)


@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 0.5, 0.77, 1 - 2**-16])
def test_over_all_draws_the_mean_is_right_to_the_last_bit_of_a_draw(fraction):
    rows = torch.full((1, 1 << 16), fraction)
    rows[0, 0] = 127.0  # a step is 1
    back = dequantize_rows(quantize_rows(rows, 8, Every()), 1 << 16, 8)[0, 1:].double()
    assert abs(float(back.sum()) / (1 << 16) - fraction) <= 2**-17 + 2**-16  # one draw is missing


def test_what_did_not_change_does_not_move():
    """Beside weights as they came down in 8 bits: a product rounded otherwise would leave a bit."""
    rows = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    sent = quantize_rows(rows, 8)
    held = dequantize_rows(sent, 96, 8)
    changes = quantize_rows(held, 8, np.random.SFC64(0), sent, 8)
    assert not dequantize_rows(changes, 96, 8).any()


def test_what_is_not_finite_stays_so():
    rows = torch.ones(2, 4)
    rows[0, 1] = float("inf")
    back = dequantize_rows(quantize_rows(rows, 8, generator()), 4, 8)
    assert not back[0].isfinite().all()
    assert back[1].isfinite().all()


@pytest.mark.parametrize("bits", FEW)
def test_an_update_comes_back_and_takes_the_bytes_that_are_said(bits):
    schedule = random_schedule(ARCH, 1, 3)
    trained = {
        p.name: p.pack(WEIGHTS[p.name], heads)
        for p in ARCH.of_kind(Kind.SLICED)
        if (heads := schedule.heads(schedule.trained, p.block))
    }
    new = {name: t + 0.01 * drawn(*t.shape) for name, t in trained.items()}
    sent = {**new, **quantize_changes(ARCH, trained, new, bits, generator())}
    for name, tensor in sent.items():
        p = ARCH.by_name[name]
        assert is_quantized(p, bits) == (len(p.shape) == 2) == (tensor.dtype is torch.uint8)
        assert tensor.nbytes == len(tensor) * row_bytes(p, bits)
    back = with_quantized_changes(ARCH, GlobalModel.of(ARCH, WEIGHTS), schedule, sent, bits)
    for name, tensor in new.items():
        assert back[name].shape == tensor.shape
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0.05 / (2 ** (bits - 1) - 1))


def test_weights_come_down_next_to_what_they_are_and_the_same_for_all():
    """Whichever heads a client gets, a row is rounded alike; what is no product is not rounded."""
    everything, some = (random_schedule(ARCH, 1, seed) for seed in (0, 3))
    everything.operations[:] = 3
    seen = []
    for schedule in (everything, some):
        packed = pack_for(ARCH, WEIGHTS, schedule)
        back = dequantize(ARCH, quantize(ARCH, packed, 8), 8)
        for name, tensor in packed.items():
            if not is_quantized(ARCH.by_name[name], 8):
                assert back[name] is tensor
                continue
            steps = tensor.abs().amax(dim=1, keepdim=True) / 127
            assert ((back[name] - tensor).abs() <= 0.501 * steps).all()
        seen.append(back)
    for p in ARCH.of_kind(Kind.SLICED):
        heads = some.heads(some.resident, p.block)
        rows = [row for head in heads for row in range(p.starts[head], p.starts[head + 1])]
        if rows:
            assert torch.equal(seen[0][p.name][rows], seen[1][p.name])


def test_codes_that_cannot_be_are_refused():
    schedule = random_schedule(ARCH, 1, 3)
    name = next(n for n in pack_for(ARCH, WEIGHTS, schedule) if n.endswith("qkv.weight"))
    for wrong in (torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(48, 52)):
        with pytest.raises(ReplyError, match="is torch"):
            with_quantized_changes(ARCH, GlobalModel.of(ARCH, WEIGHTS), schedule, {name: wrong}, 8)


@pytest.mark.parametrize("up,down", [(8, 32), (4, 32), (8, 8)])
def test_a_run_sends_what_was_planned(quick, tmp_path, up, down):
    config = quick(
        rounds=2,
        upload_bits=up,
        download_bits=down,
        run_folder=str(tmp_path),
        verify_costs=True,
    )
    run_local(config)
    rows = [json.loads(line) for line in (tmp_path / "clients.jsonl").read_text().splitlines()]
    for row in rows:
        for policy in ("bytes_up", "bytes_down"):
            assert 0 <= row["predicted"][policy] - row["used"][policy] <= 16_000
        assert row["used"]["memory"] <= row["predicted"]["memory"]
    assert not any(row["fault"] for row in rows)
    assert np.isfinite(json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[-1])["loss"])


@pytest.mark.parametrize(
    "options,said",
    [
        ({"download-bits": 8}, "set upload-bits to 8 or 4"),
        ({"download-bits": 4, "upload-bits": 4}, "32 or 8"),
        ({"upload-bits": 16}, "32 or 8 or 4"),
        ({"upload-bits": 8, "tuning": "lora"}, "LoRA does not train"),
    ],
)
def test_bits_in_which_nothing_can_travel_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        checked(RunConfig.from_mapping(options))
