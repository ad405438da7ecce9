"""Activations of one example, step by step, against hand arithmetic.

The small model has T = 17 tokens, D = 24, two heads of width d = 12 and slices of f = 48.
"""

import numpy as np
import pytest

from d2ft_fl.costs import activations
from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.lora.config import Lora, with_lora
from tests.conftest import build, training_options

T, D, HEAD, SLICE = 17, 24, 12, 48
ONE, SQUARE = T * HEAD, T * T
RMS = {"norm_layer": "rmsnorm"}


def arch_of(**changes):
    return build(depth=1, num_heads=2, **changes)[1]


@pytest.mark.parametrize(
    "changes,c,fused,mask,attention,feed_forward",
    [
        ({}, 4, True, 4, 16 * ONE + 4 * T, 4 * T * SLICE),
        ({}, 2, True, 2, 8 * ONE + 4 * T, 2 * T * SLICE),
        # Scaled q and k, and the weights, in float32; in bfloat16 a copy of v besides.
        ({}, 4, False, 4, 16 * ONE + 8 * ONE + 4 * SQUARE, 4 * T * SLICE),
        ({}, 2, False, 2, 8 * ONE + 12 * ONE + 4 * SQUARE, 2 * T * SLICE),
        # With dropout the mask and the product besides.
        ({"attn_drop_rate": 0.1}, 4, False, 4, 24 * ONE + 12 * SQUARE, 4 * T * SLICE),
        ({"gated": True}, 4, True, 4, 24 * ONE + 4 * T, 4 * T * SLICE),
        # q and k before they were normed, and two statistics of each.
        ({"qk_norm": True}, 4, True, 4, 24 * ONE + 4 * T + 16 * T, 4 * T * SLICE),
        ({"qk_norm": True, **RMS}, 4, True, 4, 24 * ONE + 4 * T + 16 * T, 4 * T * SLICE),
        # In bfloat16 a root mean square norm sees a copy in float32.
        ({"qk_norm": True}, 2, True, 2, 12 * ONE + 4 * T + 16 * T, 2 * T * SLICE),
        ({"qk_norm": True, **RMS}, 2, True, 2, 20 * ONE + 4 * T + 16 * T, 2 * T * SLICE),
        ({"proj_drop_rate": 0.1}, 4, True, 1, 16 * ONE + 4 * T, 5 * T * SLICE),
    ],
)
def test_what_a_live_subnet_keeps(changes, c, fused, mask, attention, feed_forward):
    kept = activations.kept_by_live(arch_of(**changes), c, fused, mask)
    assert kept.tolist() == [[attention] * 2, [feed_forward] * 2]


@pytest.mark.parametrize(
    "changes,c,attention",
    [
        ({}, 4, 0),
        ({"gated": True}, 4, 4 * ONE),
        ({"qk_norm": True}, 4, 4 * ONE),
        ({"qk_norm": True, "gated": True}, 4, 8 * ONE),
        # A root mean square norm keeps what it made of q, and of k, before its weight: in float32.
        ({"qk_norm": True, **RMS}, 4, 4 * ONE + 8 * ONE),
        ({"qk_norm": True, **RMS}, 2, 2 * ONE + 8 * ONE),
    ],
)
def test_what_a_full_subnet_keeps_besides(changes, c, attention):
    full, shallow = activations.kept_by_full(arch_of(**changes), c)
    assert full.tolist() == [[attention] * 2, [c * T * SLICE] * 2]
    assert shallow.tolist() == [[c * ONE] * 2, [c * T * SLICE] * 2]


@pytest.mark.parametrize(
    "changes,c,outside",
    [
        ({"qk_norm": True, **RMS}, 4, 0),
        ({"qk_norm": True}, 2, 0),
        (RMS, 2, 0),
        # While k is normed: its copy, that normed, and that times the weight, in float32, beside q.
        # Without: the head's q and k, normed, its output, and a copy of that.
        ({"qk_norm": True, **RMS}, 2, 3 * 4 * ONE + 2 * ONE - 4 * 2 * ONE),
    ],
)
def test_what_norms_of_heads_have_for_a_moment_outside_the_graph(changes, c, outside):
    precision = "bf16" if c == 2 else "fp32"
    options = training_options(precision=precision)
    besides = ActivationBytes.of(arch_of(**changes), options, True, "cpu", T).besides
    assert besides.tolist() == [[[outside] * 2, [0, 0]], [[0, 0]] * 2, [[0, 0]] * 2]


@pytest.mark.parametrize(
    "dropout,without_graph,with_graph,back",
    [
        # The larger of q, k and scores, and of scores and weights; a graph keeps one of them.
        (0.0, max(8 * ONE + 4 * SQUARE, 8 * SQUARE), 4 * SQUARE, 8 * SQUARE),
        (0.1, max(8 * ONE + 4 * SQUARE, 12 * SQUARE), 0, 4 * SQUARE),
    ],
)
def test_what_attention_that_is_not_fused_has_for_a_moment(
    dropout, without_graph, with_graph, back
):
    moments = activations.unfused_moments(arch_of(attn_drop_rate=dropout), 4)
    assert moments[:, 0].tolist() == [[without_graph] * 2, [with_graph] * 2, [back] * 2]
    assert not moments[:, 1].any()  # the feed-forward part has no attention


@pytest.mark.parametrize(
    "changes,device,into,out,hidden_out",
    [
        ({}, "cpu", 3, 1, 1),
        ({"gated": True}, "cpu", 4, 3, 1),
        ({"qk_norm": True}, "cpu", 3, 4, 1),
        ({"proj_drop_rate": 0.1}, "cpu", 3, 1, 3),
        ({"proj_drop_rate": 0.1}, "cuda", 3, 1, 2),
    ],
)
def test_both_ends_of_a_heads_middle(changes, device, into, out, hidden_out):
    inward, outward = activations.middle_ends(arch_of(**changes), 4, device)
    assert inward.tolist() == [[4 * ONE * into] * 2, [4 * T * SLICE] * 2]
    assert outward.tolist() == [[4 * ONE * out] * 2, [4 * T * SLICE * hidden_out] * 2]


@pytest.mark.parametrize(
    "changes,c,kept",
    [
        # The input, mean and deviation of each token; and the output that the classifier sees.
        ({}, 4, 4 * (D + 2) * T + 4 * D * T),
        ({}, 2, 4 * (D + 2) * T + 2 * D),
        # Pooled, a single token; without class token there are 16.
        ({"global_pool": "avg", "class_token": False}, 4, 4 * (D + 2) + 4 * D),
    ],
)
def test_what_the_final_norm_keeps(changes, c, kept):
    arch = arch_of(**changes)
    assert activations.final_norm(arch, c) == kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("target", ["qkv", "proj"])
def test_what_lora_keeps_of_the_attention_branch(target, dropout):
    """Per rank T elements for the factor on the far side; y and z only without dropout."""
    arch = with_lora(arch_of(), Lora(rank=3, targets=(target,), dropout=dropout))
    lora = ActivationBytes.of(arch, training_options(), True, "cpu", T)
    drops = dropout > 0
    assert lora.ranked.tolist() == [4 * T, 0]
    assert lora.near.tolist() == [4 * T, 0]
    assert lora.keeps_y.tolist() == [target == "qkv" and not drops, False]
    assert lora.masked.tolist() == [drops * (target == "qkv") * T * D * (4 + 1), 0]
    assert lora.dropped[0].tolist() == [drops * (target == "proj") * ONE * (4 + 1)] * 2
    assert lora.drops.tolist() == [drops * 4 * T * 2 * D, 0]


def test_bfloat16_halves_what_products_see_and_nothing_else():
    arch = arch_of()
    wide = ActivationBytes.of(arch, training_options(), True, "cpu", T)
    half = ActivationBytes.of(arch, training_options(precision="bf16"), True, "cpu", T)
    assert (wide.stream, wide.narrow, wide.statistics) == (4 * T * D, 4 * T * D, 8 * T)
    assert (half.stream, half.narrow, half.statistics) == (4 * T * D, 2 * T * D, 8 * T)
    assert np.array_equal(2 * half.weights, wide.weights)
    assert wide.weights.tolist() == [[4 * D * 3 * HEAD] * 2, [4 * D * SLICE] * 2]
    assert (wide.classifier, half.classifier) == (0, 2 * D * 5)
