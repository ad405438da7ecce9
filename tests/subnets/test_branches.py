import numpy as np

from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.subnets.architecture import Kind, Parameter
from d2ft_fl.subnets.branches import BranchKind, BranchSpec, Trains
from tests.conftest import TARGETS, build

SPEC = BranchSpec(
    BranchKind.ATTENTION,
    norm="before",
    inward=("ask", "key"),
    outward="merge",
    widths=(4, 4),
    middle=("ask_norm.weight",),
    scale="size.value",
)
ROLES = {
    "before.weight",
    "ask.weight",
    "ask.bias",
    "key.weight",
    "ask_norm.weight",
    "merge.weight",
    "merge.bias",
    "size.value",
}


def test_a_branch_owns_what_it_names_and_nothing_that_only_begins_alike():
    assert all(map(SPEC.owns, ROLES))
    assert SPEC.owns("ask.lora_B")
    others = ("behind.weight", "asking.weight", "ask_norm.bias", "size.other", "key_norm.weight")
    assert not any(map(SPEC.owns, others))


def test_where_everything_trains_every_gradient_is_wanted():
    everything = Trains.of(ROLES | {"other.weight"}, SPEC)
    assert everything == Trains(
        True, True, True, True, True, True, (True, True), (False, False), (False, False)
    )
    assert Trains.of({"other.weight"}, SPEC) == Trains(
        False, False, False, False, False, False, (False, False), (False, False), (False, False)
    )


def test_what_trains_decides_which_gradients_are_wanted():
    out = Trains.of({"merge.weight"}, SPEC)  # a product with z; nothing of what lies before it
    assert (out.anything, out.inward, out.y, out.z) == (True, False, False, True)
    bias = Trains.of({"ask.bias"}, SPEC)  # within the branch, but no product with y
    assert (bias.inward, bias.y, bias.weights) == (True, False, (False, False))
    middle = Trains.of({"ask_norm.weight"}, SPEC)
    assert (middle.inward, middle.y, middle.z) == (True, False, False)
    assert Trains.of({"key.weight"}, SPEC).y  # of any product in


def test_of_loras_factors_a_needs_what_goes_in_and_b_does_not():
    a, b = (Trains.of({f"ask.lora_{factor}"}, SPEC) for factor in "AB")
    assert (a.y, a.far, a.near) == (True, (True, False), (False, False))
    assert (b.y, b.far, b.near) == (False, (False, False), (True, False))
    a, b = (Trains.of({f"merge.lora_{factor}"}, SPEC) for factor in "AB")
    assert (a.z, a.far, a.near) == (True, (False, False), (False, True))
    assert (b.z, b.far, b.near) == (False, (False, True), (False, False))


def test_branches_of_a_vision_transformer():
    _, arch = build(embed_dim=28, num_heads=7, mlp_ratio=66 / 28, init_values=0.1, qk_norm=True)
    attention, feed_forward = arch.branches
    assert arch.attention is attention
    assert arch.possible_targets == TARGETS
    assert attention.middle == tuple(f"{n}_norm.{p}" for n in "qk" for p in ("weight", "bias"))
    assert (attention.scale, feed_forward.scale) == ("ls1.gamma", "ls2.gamma")
    assert arch.widths == ((4,) * 7, (10, 10, 10, 9, 9, 9, 9))
    assert arch.rows_in(0)["qkv"].tolist() == [12] * 7
    assert np.array_equal(arch.rows_in(1)["fc1"], feed_forward.widths)
    owned = {p.role for p in arch.parameters if p.block == 0}
    assert all(attention.owns(role) != feed_forward.owns(role) for role in owned)


def test_a_gate_is_a_product_in_and_has_no_factors():
    _, arch = build(gated=True)
    assert arch.branches[0].inward == ("qkv", "gate")
    assert arch.rows_in(0)["gate"].tolist() == [6] * 4
    assert with_lora(arch, Lora(rank=2)).targets == set(TARGETS)


def test_the_classifier_is_a_module_and_no_prefix():
    _, arch = build()
    names = [p.name for p in arch.parameters if arch.is_classifier(p)]
    assert names == ["head.weight", "head.bias"]
    assert not arch.is_classifier(Parameter("head_norm.weight", (3,), Kind.FINAL))


def test_without_dropout_nothing_is_dropped_anywhere():
    _, arch = build(attn_drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3)
    still = arch.without_dropout()
    assert [b.dropout for b in arch.branches] == [0.1, 0.2]
    assert [b.dropout for b in still.branches] == [0, 0]
    assert (still.output_dropout, still.drop_path) == (0, 0)
