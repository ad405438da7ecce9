"""LoRA as a tuning: what trains in a round, how factors begin and are saved, what is refused."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from d2ft_fl.clients.lora import LoraTuning, SLoraTuning, tuning
from d2ft_fl.config.choices import LORA_AGGREGATIONS
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, factor_name, targeted, targets_alone, with_lora
from d2ft_fl.lora.init import begin
from d2ft_fl.lora.peft_files import CONFIG, PREFIX, TENSORS
from d2ft_fl.models.export import load_tuned
from d2ft_fl.subnets.architecture import Kind
from tests.conftest import TARGETS, build, training_options, weights_of

torch.manual_seed(0)
MODEL, BASE = build(depth=2)
WEIGHTS = weights_of(MODEL)
OWN = Lora(rank=3, alpha=6.0, targets=TARGETS)
ALL_A, ALL_B = ([(target, factor) for target in TARGETS] for factor in "AB")
COMMON = [("qkv", "A"), ("proj", "B"), ("fc1", "A"), ("fc2", "B")]


def tuned(**changes):
    """The tuning of a run with factors of rank 3."""
    config = RunConfig(tuning="lora", lora_rank=3, lora_alpha=6.0, rounds=5)
    return LoraTuning(replace(config, **changes))


def test_slora_rounds_ask_for_a_first_stage():
    assert type(tuning(RunConfig(tuning="lora"))) is LoraTuning
    assert type(tuning(RunConfig(tuning="lora", slora_rounds=1))) is SLoraTuning


def test_classifier_factors_and_weights_have_rates_of_their_own():
    options = training_options(lr=0.3, head_lr=0.5, lora_lr=0.7)
    rate = tuned().learning_rate
    assert rate(Kind.FINAL, False, options) == 0.5
    for kind in (Kind.SHARED, Kind.SLICED):
        assert rate(kind, True, options) == 0.7
        assert rate(kind, False, options) == 0.3


RESTS = {  # mode -> what rests in rounds 1 and 2, and what never changes
    "factors": ([], [], []),
    "freeze-a": (ALL_A, ALL_A, ALL_A),
    "alternate": (ALL_A, ALL_B, []),
    "freeze-common": (COMMON, COMMON, COMMON),
    "product": ([], [], []),
    "stack": ([], [], ALL_A + ALL_B),
}


@pytest.mark.parametrize("mode", LORA_AGGREGATIONS)
def test_a_mode_says_what_trains_in_a_round_and_what_never_changes(mode):
    *rounds, fixed = RESTS[mode]
    for number, frozen in enumerate(rounds, 1):
        arch = tuned(lora_aggregation=mode).architecture(BASE, number)
        assert arch == with_lora(BASE, OWN, frozen, fixed)


@pytest.mark.parametrize(
    "changes,common",
    [
        ({}, False),
        ({"lora_aggregation": "freeze-common"}, True),
        ({"lora_init": "federa"}, False),
    ],
)
def test_factors_begin_before_the_first_round(changes, common):
    one = tuned(seed=11, **changes)
    arch = one.architecture(BASE, 1)
    state, figures = one.prepare(WEIGHTS, arch, 1, WEIGHTS)
    expected = begin(arch, WEIGHTS, changes.get("lora_init", "lora"), 11, common)
    assert state.keys() == expected.keys() == arch.by_name.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert figures == {}
    assert one.prepare(state, arch, 2, WEIGHTS) == (state, {})


def an_adapter(folder, lora, **config):
    """Write an adapter as peft does, of random factors and classifier; return its tensors."""
    arch = with_lora(BASE, lora)
    names = [p.name for p in arch.parameters if p.trains]
    tensors = {name: torch.randn(arch.by_name[name].shape) for name in names}
    safetensors.torch.save_file({PREFIX + n: t for n, t in tensors.items()}, folder / TENSORS)
    entries = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
    }
    (folder / CONFIG).write_text(json.dumps(entries | config))
    return tensors


def test_a_run_may_begin_with_the_factors_of_an_adapter(tmp_path):
    """Whatever its dropout, and in whichever order the run names its targets."""
    tensors = an_adapter(tmp_path, replace(OWN, targets=("qkv", "fc2")), lora_dropout=0.5)
    one = tuned(lora_adapter=str(tmp_path), lora_targets="fc2, qkv", lora_dropout=0.25)
    one.check_model(BASE)
    arch = one.architecture(BASE, 1)
    state, figures = one.prepare(WEIGHTS, arch, 1, WEIGHTS)
    assert figures == {}
    assert state.keys() == arch.by_name.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors.get(name, WEIGHTS.get(name))), name
    assert one.prepare(state, arch, 2, WEIGHTS)[0] is state


@pytest.mark.parametrize(
    "lora",
    [
        replace(OWN, rank=2),
        replace(OWN, alpha=5.0),
        replace(OWN, rslora=True),
        replace(OWN, targets=("qkv", "proj", "fc1")),
    ],
    ids=["rank", "alpha", "rslora", "targets"],
)
def test_an_adapter_of_other_factors_is_refused(lora, tmp_path):
    an_adapter(tmp_path, lora)
    wanted = (
        f"set lora-rank={lora.rank} lora-alpha={lora.alpha} "
        f"lora-rslora={str(lora.rslora).lower()} lora-targets='{', '.join(lora.targets)}'"
    )
    with pytest.raises(ConfigError, match="has other factors than the run") as error:
        tuned(lora_adapter=str(tmp_path)).check_model(BASE)
    assert str(error.value).endswith(wanted)


def test_a_rank_that_the_model_has_not_is_refused():
    tuned(lora_rank=24).check_model(BASE)
    with pytest.raises(ConfigError, match="lora-rank = 25 must lie between 1 and 24"):
        tuned(lora_rank=25).check_model(BASE)


@pytest.mark.parametrize("init", ["lora", "federa"])
@pytest.mark.parametrize("mode", ["factors", "stack"])
def test_what_is_saved_tells_the_end_from_the_beginning(mode, init, tmp_path):
    """First factors where these came out of weights, changes where weights themselves changed."""
    one = tuned(lora_aggregation=mode, lora_init=init, lora_targets="fc1, qkv", seed=3)
    arch = one.architecture(BASE, 1)
    first, _ = one.prepare(WEIGHTS, arch, 1, WEIGHTS)
    end = {name: tensor + 0.25 for name, tensor in first.items()}
    one.save(tmp_path, end, arch, WEIGHTS)
    found = load_tuned(tmp_path)
    assert found.lora == replace(OWN, targets=("fc1", "qkv"))
    factors = {p.name for p in arch.parameters if p.factor}
    for name in factors | {"head.weight", "head.bias"}:
        assert torch.equal(found.state[name], end[name])
    assert found.initial.keys() == (factors if init == "federa" else set())
    assert all(torch.equal(tensor, first[name]) for name, tensor in found.initial.items())
    weights = {weight.name for weight, _, _ in targeted(arch)}
    assert found.changed.keys() == (weights if mode == "stack" else set())
    for name, change in found.changed.items():
        assert torch.equal(change, end[name].double() - first[name].double())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upload_bits": 32},
        {"lora_aggregation": "freeze-common"},
        {"lora_aggregation": "stack", "lora_ranks": "1, 3"},
        {"lora_aggregation": "product", "lora_ranks": " 2 "},
        {"planner": "two-stage", "lora_ranks": " "},
        {"lora_init": "federa"},
        {"lora_adapter": "somewhere"},
        {"slora_rounds": 1},
        {"server_optimizer": "fedadam", "clip_norm": 1.0},
        {"aggregation": "median"},
    ],
    ids=str,
)
def test_options_that_go_together_are_taken(changes):
    tuned(**changes).check_options()


MIXED = {"lora_aggregation": "stack", "lora_ranks": "2"}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"upload_bits": 8}, "upload-bits = 8 quantizes the weights of heads"),
        ({"lora_targets": "fc1, qkv, fc1"}, "names one twice"),
        (MIXED | {"lora_ranks": "0"}, "'0' is no whole number from 1 to lora-rank = 3"),
        (MIXED | {"lora_ranks": "2, 4"}, "'4' is no whole number from 1 to lora-rank = 3"),
        (MIXED | {"lora_ranks": "-2"}, "'-2' is no whole number"),
        (MIXED | {"lora_ranks": "2, ,3"}, "'' is no whole number"),
        (MIXED | {"lora_aggregation": "alternate"}, "'alternate' cannot aggregate different ranks"),
        (MIXED | {"planner": "two-stage"}, "knows one rank"),
        ({"lora_init": "federa", "slora_rounds": 1}, "choose one"),
        ({"lora_init": "federa", "lora_adapter": "x"}, "choose one"),
        ({"lora_adapter": "x", "slora_rounds": 1}, "choose one"),
        ({"lora_aggregation": "freeze-common", "slora_rounds": 1}, "draws the factors"),
        ({"lora_aggregation": "freeze-common", "lora_adapter": "x"}, "draws the factors"),
        ({"lora_aggregation": "freeze-common", "lora_init": "federa"}, "draws the factors"),
        ({"lora_aggregation": "product", "server_optimizer": "fedavgm"}, "'fedavgm' steps factors"),
        ({"lora_aggregation": "stack", "clip_norm": 1.0}, "clip-norm acts on factors"),
        ({"lora_aggregation": "stack", "aggregation": "median"}, "aggregation acts on factors"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tuned(**changes).check_options()


def test_the_first_stage_of_slora_ends_before_the_run():
    config = RunConfig(tuning="lora", lora_rank=3, lora_alpha=6.0, rounds=3, slora_rounds=2)
    SLoraTuning(config).check_options()
    with pytest.raises(ConfigError, match="slora-rounds = 2 must be below rounds = 2"):
        SLoraTuning(replace(config, rounds=2)).check_options()
    one = SLoraTuning(config)
    assert one.architecture(BASE, 2) == targets_alone(BASE, OWN)
    assert one.architecture(BASE, 3) == with_lora(BASE, OWN)


def test_slora_begins_with_what_its_stage_changed_and_restores_the_weights():
    """A change of rank one is within the rank: 6 / 3 B A is all of it."""
    one = SLoraTuning(RunConfig(tuning="lora", lora_rank=3, lora_alpha=6.0, slora_rounds=2))
    arch, name = one.architecture(BASE, 3), "blocks.1.mlp.fc2.weight"
    tuned_weights = WEIGHTS | {name: WEIGHTS[name] + 1.0, "head.bias": WEIGHTS["head.bias"] + 1.0}
    assert one.prepare(tuned_weights, arch, 2, WEIGHTS) == (tuned_weights, {})
    state, figures = one.prepare(tuned_weights, arch, 3, WEIGHTS)
    assert figures == {"slora_discarded": pytest.approx(0.0, abs=1e-6)}
    for weight, tensor in WEIGHTS.items():
        expected = tensor + 1.0 if weight == "head.bias" else tensor
        assert torch.equal(state[weight], expected)
    a, b = (state[factor_name(name, factor)] for factor in "AB")
    torch.testing.assert_close(2 * b @ a, torch.ones(24, 96), rtol=1e-5, atol=1e-5)
