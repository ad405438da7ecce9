"""Quantized rows by hand, and against rounding written out number by number."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_fl.errors import ConfigError, ReplyError
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.wire.quantization import (
    Arriving,
    check_bits,
    dequantize,
    dequantize_rows,
    is_quantized,
    quantize,
    quantize_changes,
    quantize_rows,
    row_bytes,
    with_quantized_changes,
)
from tests.aggregation.tiny import ARCH, EVERYTHING, FULL, SKIP, WEIGHTS, packed_old, schedule

ROWS = torch.tensor([[12.7, -12.7, 0.34, -0.26, 0.0], [-63.5, 1.0, 0.74, 0.76, 63.5]])


def scales(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1).view(torch.uint8).tolist()


def test_rows_of_eight_bits_by_hand():
    """Scales 0.1 and 0.5; numbers from 127 on, each the nearest."""
    found = quantize_rows(ROWS, 8)
    first, second = scales(float(ROWS[0, 0] / 127), 0.5)
    assert found.tolist() == [
        [*first, 254, 0, 130, 124, 127],
        [*second, 0, 129, 128, 129, 254],
    ]
    back = dequantize_rows(found, 5, 8)
    assert torch.allclose(back[0], torch.tensor([12.7, -12.7, 0.3, -0.3, 0.0]))
    assert back[1].tolist() == [-63.5, 1.0, 0.5, 1.0, 63.5]


def test_rows_of_four_bits_by_hand():
    """Scales 0.5 and 1; numbers from 7 on, two to a byte, the first in its lower half."""
    rows = torch.tensor([[3.5, -3.5, 0.7, -0.2, 0.3], [-7.0, 2.4, 2.6, 0.0, -1.4]])
    found = quantize_rows(rows, 4)
    first, second = scales(0.5, 1.0)
    assert found.tolist() == [
        [*first, 14 + 16 * 0, 8 + 16 * 7, 8],
        [*second, 0 + 16 * 9, 10 + 16 * 7, 6],
    ]
    back = [[3.5, -3.5, 0.5, 0.0, 0.5], [-7.0, 2.0, 3.0, 0.0, -1.0]]
    assert dequantize_rows(found, 5, 4).tolist() == back


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros_and_the_smallest_scale_is_the_least_normal_number(bits):
    largest = 2 ** (bits - 1) - 1
    least = 2.0**-126
    rows = torch.tensor([[0.0, 0.0, 0.0], [largest, -1.0, 0.0], [0.0, largest, -2.0]])
    rows[1] *= least
    rows[2] *= least / 2  # what is below counts in steps of the least: half as many, and up
    back = dequantize_rows(quantize_rows(rows, bits), 3, bits)
    assert torch.equal(back[:2], rows[:2])
    half = least / 2
    assert back[2].tolist() == [0.0, (largest + 1) / 2 * half, -half]


# -- draws ---------------------------------------------------------------------------------------


def rounded(rows, bits, seed, block):
    """Whole numbers by the formula, in float32, with draws of so many numbers a time."""
    largest, draw = np.float32(2 ** (bits - 1) - 1), np.random.SFC64(seed)
    out = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        raw = draw.random_raw(-(-part.size // 4)).view(np.uint16)[: part.size].astype(float)
        up = ((raw + 2**15) % 2**16 + 0.5) / 2**16  # in the order of numbers with a sign
        scale = abs(part).max(axis=1, keepdims=True) / largest
        per_scale = np.float32(1) / scale
        moved = (up.reshape(part.shape) + largest).astype(np.float32)
        out.append(np.minimum(np.floor(moved + part * per_scale), 2 * largest))
    return np.concatenate(out)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "rows,width,block", [(5, 7, 5), (90_000, 3, 2**18 // 3), (3, 2**18 + 1, 1)]
)
def test_each_number_is_rounded_by_a_draw_of_its_own(rows, width, block, bits):
    """Draws are made for as many whole rows as 2^18 numbers have, four of each 64 bits."""
    numbers = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    sent = quantize_rows(numbers, bits, np.random.SFC64(3))
    found = dequantize_rows(sent, width, bits) / sent[:, :4].flatten().view(torch.float32)[:, None]
    wanted = rounded(numbers.numpy(), bits, 3, block) - (2 ** (bits - 1) - 1)
    differ = found.round().numpy() != wanted
    assert differ.mean() < 1e-4  # a product and a sum in one may round otherwise
    assert abs(found.round().numpy() - wanted).max() <= 1


class Highest:
    """Draws the largest number of 16 bits always."""

    def random_raw(self, count):
        return np.full(count, 0x7FFF_7FFF_7FFF_7FFF, dtype=np.uint64)


class Lowest:
    """Draws the smallest always."""

    def random_raw(self, count):
        return np.full(count, 0x8000_8000_8000_8000, dtype=np.uint64)


@pytest.mark.parametrize("bits", [8, 4])
def test_draws_round_up_all_that_is_above_a_whole_number_or_nothing(bits):
    largest = 2 ** (bits - 1) - 1
    rows = torch.tensor([[float(largest), 1.25, -2.25, 0.0, 2**-15, 1 - 2**-10]])
    up = dequantize_rows(quantize_rows(rows, bits, Highest()), 6, bits)
    assert up.tolist() == [[largest, 2, -2, 0, 1, 1]]
    down = dequantize_rows(quantize_rows(rows, bits, Lowest()), 6, bits)
    assert down.tolist() == [[largest, 1, -3, 0, 0, 0]]
    # The smallest draw is 2^-17, the middle of the first of 2^16 parts.
    rows = torch.tensor([[float(largest), -(2**-17), -(2**-16)]])
    down = dequantize_rows(quantize_rows(rows, bits, Lowest()), 3, bits)
    assert down.tolist() == [[largest, 0, -1]]


@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_is_beyond_the_largest(bits):
    """Rounding of reciprocals would lift some rows' largest by one."""
    rows = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    numbers = quantize_rows(rows, bits, Highest())[:, 4]
    assert (numbers == 2 * (2 ** (bits - 1) - 1)).all()


# -- changes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_changes_are_counted_from_what_came_down(bits):
    """Whole or quantized: what came as 3.5 and -1 changes by 7, 3 and so on."""
    largest = 2 ** (bits - 1) - 1
    before = torch.tensor([[3.5, -1.0, 0.5], [0.0, 7.0, -2.0]])
    change = torch.tensor([[largest, 3.0, -2.0], [-1.0, 1.0, -largest]])
    for sent, bits_before in ((before, 32), (quantize_rows(before, 8), 8)):
        held = before if bits_before == 32 else dequantize_rows(sent, 3, 8)
        found = quantize_rows(held + change, bits, None, sent, bits_before)
        assert torch.allclose(dequantize_rows(found, 3, bits), change, atol=1e-5)


def test_changes_of_what_is_quantized_by_name():
    new = {name: packed_old(EVERYTHING, name) + 1.0 for name in WEIGHTS if name != "embed"}
    old = {name: tensor - 1.0 for name, tensor in new.items()}
    part = {name: tensor for name, tensor in old.items() if not name.startswith("1.give")}
    for bits in (8, 4):
        found = quantize_changes(ARCH, part, new, bits, np.random.SFC64(0))
        assert set(found) == {
            "0.ask.weight", "0.give.weight", "0.fall.weight", "1.ask.weight", "1.fall.weight",
        }  # fmt: skip
        for rows in found.values():
            assert torch.equal(dequantize_rows(rows, 4, bits), torch.ones(len(rows), 4))
    assert quantize_changes(ARCH, old, new, 32, np.random.SFC64(0)) == {}
    down = quantize(ARCH, old, 8)
    held = dequantize(ARCH, down, 8)
    moved = {name: tensor + 1.0 for name, tensor in held.items()}
    found = quantize_changes(ARCH, down, moved, 4, np.random.SFC64(0), 8)
    for rows in found.values():
        assert torch.allclose(dequantize_rows(rows, 4, 4), torch.ones(len(rows), 4), atol=1e-5)


def test_what_was_sent_is_added_to_what_the_client_began_with():
    own = schedule([[SKIP, FULL, FULL], [FULL, SKIP, SKIP]])
    whole = GlobalModel.of(ARCH, WEIGHTS)
    name = "0.give.weight"
    change = torch.arange(5 * 4, dtype=torch.float32).view(5, 4) - 7
    change[:, 3] = 127
    bias = torch.ones(6)
    sent = {name: quantize_rows(change, 8), "0.rise.bias": bias, "0.fall.bias": bias, "x": bias}
    found = with_quantized_changes(ARCH, whole, own, sent, 8)
    assert torch.equal(found[name], packed_old(own, name) + change)
    assert all(found[n] is bias for n in ("0.rise.bias", "0.fall.bias", "x"))
    assert with_quantized_changes(ARCH, whole, own, sent, 32) == sent
    for wrong in (sent[name].to(torch.int8), sent[name][1:], sent[name][:, 1:], change):
        with pytest.raises(ReplyError, match=r"not torch.uint8 \[5, 8\]$"):
            with_quantized_changes(ARCH, whole, own, {name: wrong}, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_are_fewer_than_their_numbers_are_added_whole(bits):
    own = schedule([[FULL, SKIP, SKIP], [SKIP] * 3])
    largest = 2 ** (bits - 1) - 1
    change = torch.tensor([[largest, -1.0, 2.0, 3.0]])
    sent = {"0.ask.weight": quantize_rows(change, bits)}
    found = with_quantized_changes(ARCH, GlobalModel.of(ARCH, WEIGHTS), own, sent, bits)
    assert torch.equal(found["0.ask.weight"], packed_old(own, "0.ask.weight") + change)


# -- what is quantized ---------------------------------------------------------------------------


def test_products_of_subnets_are_quantized_and_nothing_else():
    p = ARCH.by_name["0.fall.weight"]  # rows of 4
    assert [is_quantized(p, bits) for bits in (4, 8, 32)] == [True, True, False]
    assert [row_bytes(p, bits) for bits in (4, 8, 32)] == [4 + 2, 4 + 4, 4 * 4]
    odd = replace(p, shape=(5, 7))  # rows of 5
    assert [row_bytes(odd, bits) for bits in (4, 8, 32)] == [4 + 3, 4 + 5, 4 * 5]
    for other in (replace(p, fixed=True), replace(p, factor="A")):
        assert not is_quantized(other, 8)
        assert row_bytes(other, 8) == 16
    for name in ("0.rise.bias", "0.fall.bias", "head.weight", "embed"):
        assert not is_quantized(ARCH.by_name[name], 8)
    assert row_bytes(ARCH.by_name["0.rise.bias"], 4) == 4


def test_weights_come_down_quantized_where_they_are_products():
    packed = GlobalModel.of(ARCH, WEIGHTS).tensors
    down = quantize(ARCH, packed, 8)
    back = dequantize(ARCH, {**down, "d2ft.skip.0": packed["embed"]}, 8)
    for name, tensor in packed.items():
        p = ARCH.by_name[name]
        if not is_quantized(p, 8):
            assert down[name] is back[name] is tensor
            continue
        assert torch.equal(down[name], quantize_rows(tensor, 8))
        assert torch.equal(back[name], dequantize_rows(down[name], 4, 8))
    assert back["d2ft.skip.0"] is packed["embed"]
    assert all(quantize(ARCH, packed, 32)[name] is tensor for name, tensor in packed.items())
    assert all(dequantize(ARCH, packed, 32)[name] is tensor for name, tensor in packed.items())


def test_a_model_as_it_arrives():
    plain = Arriving.of(ARCH, WEIGHTS, 32)
    assert plain.model is plain.as_sent_down
    whole = GlobalModel.of(ARCH, WEIGHTS).tensors
    assert all(torch.equal(plain.model.tensors[name], t) for name, t in whole.items())
    few = Arriving.of(ARCH, WEIGHTS, 8)
    name = "1.fall.weight"
    assert torch.equal(
        few.model.tensors[name], dequantize_rows(quantize_rows(whole[name], 8), 4, 8)
    )
    assert torch.equal(few.as_sent_down.tensors[name], quantize_rows(few.model.tensors[name], 8))


@pytest.mark.parametrize(
    "up,down,words",
    [
        (32, 32, ""),
        (8, 8, ""),
        (4, 8, ""),
        (8, 32, ""),
        (32, 8, "numbers come down in 8 bits .* only where changes come back quantized"),
        (16, 32, "16 bits of a number that travels up must be 32 or 8 or 4"),
        (8, 4, "4 bits of a number that travels down must be 32 or 8"),
    ],
)
def test_bits_that_go_together(up, down, words):
    if not words:
        check_bits(up, down)
        return
    with pytest.raises(ConfigError, match=words):
        check_bits(up, down)


def test_what_is_not_finite_shows_in_its_scale():
    rows = torch.tensor([[1.0, math.nan], [2.0, math.inf], [1.0, 2.0]])
    for draws in (None, np.random.SFC64(0)):
        found = dequantize_rows(quantize_rows(rows, 8, draws), 2, 8)
        assert found.isfinite().all(dim=1).tolist() == [False, False, True]
