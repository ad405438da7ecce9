"""All bytes of the activations of an example, by hand, of a model with uneven slices.

T = 17 tokens, D = 24, three heads of width d = 8, slices of 12, 11 and 11 hidden units, 5 classes.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.lora.config import Lora, with_lora
from tests.conftest import build, training_options
from tests.costs.by_parameters import UNEVEN

T, D, HEAD, ALL = 17, 24, 8, 23
SLICES = np.array([12, 11, 11])
STREAM = T * D


def bytes_of(arch=UNEVEN, precision="fp32", fused=True, device="cpu"):
    return ActivationBytes.of(arch, training_options(precision=precision), fused, device, ALL)


def table(attention, feed_forward):
    """Of three heads: what is alike, and what goes by slices."""
    return [[attention] * 3, (feed_forward * SLICES).tolist()]


@pytest.mark.parametrize("precision,c", [("fp32", 4), ("bf16", 2)])
def test_of_a_usual_model(precision, c):
    b = bytes_of(precision=precision)
    assert (b.stream, b.embedded, b.narrow) == (4 * STREAM, 4 * ALL * D, c * STREAM)
    assert (b.statistics, b.normed, b.mask, b.regraded) == (8 * T, 0, 0, 0)
    assert b.alive.tolist() == table(4 * c * T * HEAD + 4 * T, c * T)
    assert b.full.tolist() == table(0, c * T)
    assert b.shallow.tolist() == b.result.tolist() == table(c * T * HEAD, c * T)
    assert b.inward.tolist() == table(3 * c * T * HEAD, c * T)
    assert b.outward.tolist() == table(c * T * HEAD, c * T)
    assert b.weights.tolist() == table(c * D * 3 * HEAD, c * D)
    assert b.saves_result.tolist() == [True, False]
    assert b.keeps_y.tolist() == [True, True]
    for nothing in (b.ranked, b.masked, b.near, b.drops):
        assert nothing.tolist() == [0, 0]
    assert b.dropped.tolist() == table(0, 0)
    assert not b.besides.any()
    view = c * D * T if c == 4 else c * D  # of the final norm: what the classifier sees
    assert b.outer == 4 * (D + 2) * T + view + 8
    narrow = 2 * 5 if c == 2 else 0
    assert (b.scores, b.cast_scores, b.classifier) == (4 * 5, narrow, narrow * D)
    assert b.gradient == (4 * 5 + narrow) * (D + 1)
    assert (b.scaled, b.rms, b.casts) == (True, False, c == 2)
    assert b.trains == UNEVEN.trains


def test_of_norms_by_root_mean_square_and_without_a_scale():
    arch = build(depth=2, num_heads=3, mlp_ratio=34 / 24, norm_layer="rmsnorm")[1]
    b = bytes_of(arch)
    assert (b.scaled, b.rms) == (False, True)
    assert b.normed == 4 * STREAM
    assert b.outer == 4 * (2 * D + 2) * T + 4 * D * T + 8
    adapted = bytes_of(with_lora(arch, Lora(rank=3)))
    assert adapted.normed == 0  # its weight is not trained


def test_norms_and_scales_train_as_the_first_branch_says():
    arch = build(depth=1, num_heads=3, norm_layer="rmsnorm", init_values=0.1)[1]
    for still, trains in ((("norm2", "ls2"), True), (("norm1", "ls1"), False)):
        parameters = [
            replace(p, trains=p.trains and not p.role.startswith(still)) for p in arch.parameters
        ]
        b = bytes_of(replace(arch, parameters=tuple(parameters)))
        assert (b.normed, b.scaled) == (4 * STREAM * trains, trains)


@pytest.mark.parametrize("device,precision", product(("cpu", "cuda"), ("fp32", "bf16")))
@pytest.mark.parametrize("drops,drop_path", [(0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_of_what_is_dropped(drops, drop_path, device, precision):
    """On a CPU masks are of the type that is dropped; on CUDA a byte an element."""
    arch = build(
        depth=2, num_heads=3, mlp_ratio=34 / 24, proj_drop_rate=drops, drop_path_rate=drop_path
    )[1]
    c = 4 if precision == "fp32" else 2
    b = bytes_of(arch, precision, device=device)
    mask = 1 if device == "cuda" else c
    does = drops > 0
    assert b.mask == does * mask * STREAM
    assert b.regraded == STREAM * (does * (c - mask) + (drop_path > 0) * c)
    assert b.alive.tolist() == table(4 * c * T * HEAD + 4 * T, (c + does * mask) * T)
    masks = 2 if device == "cpu" else 1
    assert b.outward.tolist() == table(c * T * HEAD, c * T * (1 + does * masks))


@pytest.mark.parametrize("drops,c", product((0, 1), (4, 2)))
def test_of_attention_that_is_not_fused(drops, c):
    """Matrices of T by T in float32; in bfloat16, copies of q, k, v and the output besides."""
    arch = build(depth=2, num_heads=3, mlp_ratio=34 / 24, attn_drop_rate=0.1 * drops)[1]
    b = bytes_of(arch, "fp32" if c == 4 else "bf16", fused=False)
    square, wide, cast = 4 * T * T, 4 * T * HEAD, c == 2
    kept = 4 * c * T * HEAD + (2 + cast) * wide + (1 + 2 * drops) * square
    assert b.alive.tolist() == table(kept, c * T)
    outside = max(2 * wide + square, (2 + drops) * square) + cast * 4 * wide
    back = (2 - drops) * square + cast * 4 * wide
    moments = [outside, (1 - drops) * square, back]
    assert b.besides.tolist() == [[[moment] * 3, [0] * 3] for moment in moments]


def test_of_attention_with_fewer_tokens_than_a_head_is_wide():
    """Then q and k take more than the weights."""
    arch = build(depth=1, num_heads=1, img_size=8)[1]
    tokens, width = 5, 24
    besides = bytes_of(arch, fused=False).besides
    assert besides[0, 0].tolist() == [2 * 4 * tokens * width + 4 * tokens**2]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("c", [4, 2])
@pytest.mark.parametrize("frozen", ["", "A", "B"])
@pytest.mark.parametrize(
    "targets", [("qkv",), ("proj",), ("fc1",), ("fc2",), ("qkv", "proj"), ("fc1", "fc2")]
)
def test_of_factors(targets, frozen, c, dropout):
    """The factor on the far side of a product keeps T numbers a rank: B of what is sent in keeps
    what A made, B of the product out as well. A keeps what it was given, or what dropout left."""
    lora = Lora(rank=3, targets=targets, dropout=dropout)
    arch = with_lora(UNEVEN, lora, [(target, frozen) for target in targets])
    b = bytes_of(arch, "fp32" if c == 4 else "bf16")
    a_trains, b_trains, drops = frozen != "A", frozen != "B", dropout > 0
    z = np.array(table(c * T * HEAD, c * T))
    for branch, (first, out) in enumerate((("qkv", "proj"), ("fc1", "fc2"))):
        into, outward = first in targets, out in targets
        assert b.ranked[branch] == c * T * b_trains * (into + outward)
        assert b.near[branch] == c * T * (into + outward)
        assert b.masked[branch] == drops * into * STREAM * (c * a_trains + 1)
        assert b.drops[branch] == drops * c * 2 * STREAM * (into + outward)
        assert b.keeps_y[branch] == (into and a_trains and not drops)
        of_z = drops * outward * (c * a_trains + 1) * z[branch] // c
        assert b.dropped[branch].tolist() == of_z.tolist()
        keeps_z = outward and a_trains and not drops
        assert b.shallow[branch].tolist() == (z[branch] * keeps_z).tolist()
        assert b.full[branch].tolist() == (z[branch] * keeps_z * branch).tolist()
        assert b.result[branch].tolist() == z[branch].tolist()


def test_of_gates_and_normed_heads():
    """Queries and keys before they are normed, with two statistics each; a gate as it is and
    behind its sigmoid. Of what goes out, there is a copy, or the product with the gate."""
    plain = bytes_of()
    for changes, rows, kept, out, full in (
        ({"qk_norm": True}, 3, 2, 3, 1),
        ({"gated": True}, 4, 2, 2, 1),
        ({"qk_norm": True, "gated": True}, 4, 4, 5, 2),
    ):
        arch = build(depth=2, num_heads=3, mlp_ratio=34 / 24, **changes)[1]
        b, one = bytes_of(arch), 4 * T * HEAD
        statistics = 16 * T * ("qk_norm" in changes)
        assert (b.alive - plain.alive).tolist() == table(kept * one + statistics, 0)
        assert (b.outward - plain.outward).tolist() == table(out * one, 0)
        assert b.inward.tolist() == table(rows * one, 4 * T)
        assert b.full.tolist() == table(full * one, 4 * T)
        assert b.weights.tolist() == table(4 * D * 3 * HEAD, 4 * D)  # one product after another
        assert not b.saves_result.any()


def test_of_a_gated_feed_forward_layer():
    """What the gate makes is kept as well, and is there beside its product with the rest."""
    attention, feeds = UNEVEN.branches
    arch = replace(UNEVEN, branches=(attention, replace(feeds, gated=True)))
    for c, precision in ((4, "fp32"), (2, "bf16")):
        b, plain = bytes_of(arch, precision), bytes_of(precision=precision)
        assert (b.alive - plain.alive).tolist() == table(0, c * T)
        assert (b.outward - plain.outward).tolist() == table(0, c * T)
        assert b.full.tolist() == plain.full.tolist()
        assert not b.saves_result[1]
        dropped = replace(arch, branches=(attention, replace(feeds, gated=True, dropout=0.1)))
        of_masks = bytes_of(dropped, precision).outward - b.outward
        assert of_masks.tolist() == table(0, 2 * c * T)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("rms", [0, 1])
def test_of_the_final_norm(pool, rms):
    """By token it sees all tokens; of a mean, the mean."""
    names = {"norm_layer": "rmsnorm"} if rms else {}
    arch = build(depth=1, global_pool=pool, **names)[1]
    times = 1 if pool == "avg" else T
    for precision, c in (("fp32", 4), ("bf16", 2)):
        view = c * D * (times if c == 4 else 1)
        kept = 4 * (D * (1 + rms) + 2) * times + view
        assert bytes_of(arch, precision).outer == kept + 8
