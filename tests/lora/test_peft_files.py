"""Adapters against peft itself: what we write it loads, what it writes we read.

All tests that import peft are here; it takes seconds.
"""

import copy
import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, delta, factor_name, merged, targeted, weights, with_lora
from d2ft_fl.lora.peft_export import total_changes, write_adapter
from d2ft_fl.lora.peft_files import CONFIG, PREFIX, TENSORS
from d2ft_fl.lora.peft_import import read_adapter
from d2ft_fl.models.export import base_model, save_tuned
from tests.conftest import TARGETS, build, images_for
from tests.engine.test_lora_engine import adapted
from tests.engine.test_partial_model import relative
from tests.models.test_export import finished_run

LORAS = [
    Lora(rank=3, alpha=5.0),
    Lora(rank=3, alpha=5.0, rslora=True, dropout=0.1),
    Lora(rank=2, alpha=1.0, targets=("proj",)),
    Lora(rank=4, targets=("fc2", "qkv")),
]


def tuned(lora):
    """A small model, its architecture with factors, and a state with another classifier."""
    model, arch, state = adapted(lora, dtype=torch.float32)
    for name in ("head.weight", "head.bias"):
        state[name] = state[name] + torch.randn(state[name].shape)
    return model, arch, state


def draw(arch):
    """Other factors."""
    return {p.name: 0.3 * torch.randn(p.shape) for p in arch.parameters if p.factor}


@torch.no_grad()
def logits(model, arch):
    return model.eval()(images_for(arch, 4)[0])


def loaded(model, folder):
    """peft's own model with an adapter; the model given stays as it is."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder))


def of_weights(model, state):
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_peft_loads_what_a_run_tuned(lora, tmp_path):
    model, arch, state = tuned(lora)
    assert write_adapter(tmp_path, arch, lora, state, base="some/model") == lora.rank
    expected = logits(of_weights(model, merged(arch, state)), arch)
    assert relative(logits(model, arch), expected) > 1e-2
    assert relative(logits(loaded(model, tmp_path), arch), expected) <= 1e-5
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (lora.rank, lora.alpha)
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["use_rslora"], config["lora_dropout"]) == (lora.rslora, lora.dropout)


@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_factors_taken_out_of_base_weights_are_subtracted(lora, tmp_path):
    """The run's base is W - s B0 A0; the adapter is one of W."""
    model, arch, state = tuned(lora)
    initial = draw(arch)
    for weight, a, b in targeted(arch):
        taken = delta(initial[a.name], initial[b.name], arch.scaling)
        state[weight.name] = (state[weight.name].double() - taken).float()
    assert write_adapter(tmp_path, arch, lora, state, initial) == 2 * lora.rank
    expected = logits(of_weights(model, merged(arch, state)), arch)
    assert relative(logits(loaded(model, tmp_path), arch), expected) <= 1e-5
    grown = lora.alpha * (math.sqrt(2) if lora.rslora else 2)
    assert config_of(tmp_path)["lora_alpha"] == pytest.approx(grown)
    found, _ = read_adapter(tmp_path, build()[1])
    assert found.scaling == pytest.approx(lora.scaling)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("subtracted", [False, True])
def test_changed_base_weights_become_products_of_their_ranks(rslora, subtracted, tmp_path):
    """Also where a change was had by subtracting float32 weights, and so holds their rounding."""
    lora = Lora(rank=2, alpha=6.0, rslora=rslora, targets=("qkv", "fc1"))
    model, arch, state = tuned(lora)
    changes, ranks = {}, {}
    for index, (weight, _, _) in enumerate(targeted(arch)):
        if index == 3:
            continue  # never changed
        rank = 6 if index else 9
        out, into = weight.shape
        change = 0.05 * torch.randn(out, rank) @ torch.randn(rank, into)
        if subtracted:
            change = (state[weight.name] + change) - state[weight.name]
        changes[weight.name] = change
        ranks[weight.name] = rank
    final = {n: t + changes.get(n, 0.0) for n, t in state.items() if n in dict(model.state_dict())}
    assert write_adapter(tmp_path, arch, lora, state, changes=changes) == 9
    expected = logits(of_weights(model, final), arch)
    assert relative(logits(loaded(model, tmp_path), arch), expected) <= 1e-5
    stored = safetensors.torch.load_file(tmp_path / TENSORS)
    for weight, _, _ in targeted(arch):
        a = stored[PREFIX + factor_name(weight.name, "A")]
        assert len(a) == ranks.get(weight.name, 1)
    config = config_of(tmp_path)
    assert config["r"] == 6
    assert sorted(config["rank_pattern"].values()) == [1, 9]
    with pytest.raises(ConfigError, match=r"several ranks, 1, 6, 9; only one"):
        read_adapter(tmp_path, build()[1])


def test_equal_ranks_need_no_patterns(tmp_path):
    lora = Lora(rank=2, alpha=6.0)
    _, arch, state = tuned(lora)
    changes = total_changes(arch, state, draw(arch), {})
    assert write_adapter(tmp_path, arch, lora, state, changes=changes) == 4
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert read_adapter(tmp_path, build()[1])[0] == Lora(rank=4, alpha=12.0, targets=TARGETS)


def test_a_change_of_anything_else_is_refused(tmp_path):
    lora = Lora(rank=2)
    _, arch, state = tuned(lora)
    changes = {"blocks.0.norm1.weight": torch.ones(24)}
    with pytest.raises(ConfigError, match=r"change of 'blocks.0.norm1.weight' cannot be part"):
        write_adapter(tmp_path, arch, lora, state, changes=changes)


@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_what_is_written_is_read(lora, tmp_path):
    _, arch, state = tuned(lora)
    write_adapter(tmp_path, arch, lora, state)
    found, tensors = read_adapter(tmp_path, build()[1])
    assert set(found.targets) == set(lora.targets_in(arch))
    assert found == Lora(lora.rank, lora.alpha, found.targets, lora.rslora, lora.dropout)
    factors = {p.name for p in arch.parameters if p.factor}
    assert tensors.keys() == factors | {"head.weight", "head.bias"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name]), name


def by_peft(folder, model=None, **options):
    """An adapter that peft makes, random, and saves; its model."""
    from peft import LoraConfig, get_peft_model

    model = model or build()[0]
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**{"init_lora_weights": False, **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    adapted.save_pretrained(str(folder))
    return adapted


BY_PEFT = [
    {"r": 2, "target_modules": ["qkv", "fc1"]},
    {"r": 3, "target_modules": ["attn.proj", "fc2"], "modules_to_save": ["head"]},
    {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": r"blocks\.\d+\..*(qkv|proj|fc1|fc2)",
        "use_rslora": True,
        "modules_to_save": ["head"],
    },
    {"r": 8, "target_modules": ["qkv"], "rank_pattern": {"qkv": 5}, "alpha_pattern": {"qkv": 7}},
]


@pytest.mark.parametrize("options", BY_PEFT, ids=str)
def test_adapters_of_peft_are_read(options, tmp_path):
    model, base = build()
    original = {name: t.clone() for name, t in model.state_dict().items()}
    expected = logits(by_peft(tmp_path, model, **options), base)
    lora, tensors = read_adapter(tmp_path, base)
    assert lora.rank == options.get("rank_pattern", {}).get("qkv", options["r"])
    found = merged(with_lora(base, lora), original | tensors)
    assert relative(logits(of_weights(build()[0], found), base), expected) <= 1e-5
    assert ("head.weight" in tensors) == ("modules_to_save" in options)


def test_a_classifier_of_other_classes_is_left_out(tmp_path):
    by_peft(tmp_path, target_modules=["qkv"], modules_to_save=["head"])
    _, tensors = read_adapter(tmp_path, build(num_classes=7)[1])
    assert not any(name.startswith("head.") for name in tensors)


REFUSED_OF_PEFT = [
    ({"target_modules": ["proj"]}, "adapts 'patch_embed.proj'; only qkv, proj, fc1, fc2"),
    ({"target_modules": ["qkv", "head"]}, "adapts 'head'; only"),
    ({"target_modules": ["qkv"], "use_dora": True}, "use_dora = True is not plain LoRA"),
    ({"target_modules": ["qkv"], "bias": "lora_only"}, "bias = 'lora_only' trains biases"),
    (
        {"target_modules": ["qkv"], "modules_to_save": ["norm"]},
        "modules_to_save names 'norm'; only 'head'",
    ),
    (
        {"target_modules": ["qkv", "fc1"], "rank_pattern": {"fc1": 4}},
        "several ranks, 4, 8; only one",
    ),
    (
        {"target_modules": ["qkv", "fc1"], "alpha_pattern": {"fc1": 4}},
        "several alphas, 4, 8; only one",
    ),
    (
        {"target_modules": ["qkv"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
        "lacks 'blocks.1.attn.qkv.lora_A.weight'; use one that adapts all 3 blocks",
    ),
    (
        {"target_modules": ["qkv"], "init_lora_weights": "pissa"},
        "init_lora_weights = 'pissa' changes the base weights",
    ),
    ({"target_modules": ["qkv"], "r": 40}, "its r = 40 does not lie between 1 and 24"),
]


def refusal(folder, arch):
    """The one line with which an adapter is refused."""
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder, arch)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"adapter {str(folder)!r}: ")
    return text


@pytest.mark.parametrize("options, message", REFUSED_OF_PEFT, ids=[m for _, m in REFUSED_OF_PEFT])
def test_what_peft_can_and_we_cannot_is_named(options, message, tmp_path):
    by_peft(tmp_path, **options)
    assert message in refusal(tmp_path, build()[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 2}, "adapts 'blocks.2.attn.qkv', but the model has 2 blocks"),
        ({"depth": 4}, "lacks 'blocks.3.attn.qkv.lora_A.weight'; use one that adapts all 4 blocks"),
        ({"embed_dim": 32}, "has shape [2, 24], but the model and rank 2 want [2, 32]"),
    ],
)
def test_adapters_of_other_models_are_refused(changes, message, tmp_path):
    by_peft(tmp_path, r=2, target_modules=["qkv"], modules_to_save=["head"])
    assert message in refusal(tmp_path, build(**changes)[1])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    lora = Lora(rank=2, targets=("qkv",))
    _, arch, state = tuned(lora)
    write_adapter(folder, arch, lora, state)
    return folder


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not 'LORA'"),
        ({"lora_bias": True}, "lora_bias = True is not plain LoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not plain LoRA"),
        ({"modules_to_save": "norm"}, "modules_to_save names 'norm'; only 'head'"),
        ({"target_parameters": ["x"]}, "target_parameters = ['x'] is not plain LoRA"),
        ({"r": "four"}, "r = 'four' is not a whole number"),
        ({"lora_alpha": None}, "lora_alpha = None is not a number"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0 must be 0 or more, and below 1"),
        ({"r": 3}, "has shape [2, 24], but the model and rank 3 want [3, 24]"),
        ({"r": 0}, "its r = 0 does not lie between 1 and 24"),
        ({"lora_alpha": 0}, "its lora_alpha = 0.0 is no number above 0"),
        ({"lora_alpha": float("nan")}, "its lora_alpha = nan is no number above 0"),
        ({"lora_alpha": 10**400}, "lora_alpha is too large a number"),
        ({"modules_to_save": 5}, "modules_to_save = 5 is not a list"),
        ({"rank_pattern": [3]}, "rank_pattern = [3] is not a table"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern holds no regular expression"),
    ],
)
def test_configurations_that_do_not_fit_are_named(entries, message, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    (folder / CONFIG).write_text(json.dumps(config_of(good) | entries))
    assert message in refusal(folder, build()[1])


def without(name):
    return lambda tensors: tensors.pop(PREFIX + name)


def adding(name):
    return lambda tensors: tensors.update({PREFIX + name: torch.ones(2, 2)})


@pytest.mark.parametrize(
    "change, message",
    [
        (without("blocks.0.attn.qkv.lora_B.weight"), "lacks 'blocks.0.attn.qkv.lora_B.weight'"),
        (without("head.bias"), "its classifier holds head.weight, but the model's head.weight, he"),
        (adding("head.weight"), "'head.weight' has shape [2, 2], but the model wants [5, 24]"),
        (adding("norm.weight"), "holds 'norm.weight', which is no factor of LoRA"),
        (adding("blocks.0.attn.qkv.lora_C.weight"), "lora_C.weight', which is no factor of LoRA"),
        (lambda tensors: tensors.clear(), "holds no factors of LoRA"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / TENSORS)
    assert message in refusal(folder, build()[1])


@pytest.mark.parametrize(
    "file, text, message",
    [
        (CONFIG, None, "lacks 'adapter_config.json'"),
        (CONFIG, "{", "'adapter_config.json' is not JSON"),
        (CONFIG, "[]", "'adapter_config.json' is not a JSON object"),
        (TENSORS, None, "lacks 'adapter_model.safetensors'"),
        (TENSORS, "weights", "'adapter_model.safetensors' is not safetensors"),
    ],
)
def test_files_that_cannot_be_read_are_named(file, text, message, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    assert message in refusal(folder, build()[1])
    assert "there is no such folder" in refusal(tmp_path / "nowhere", build()[1])


# -- of runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "initial", "changed", "both"])
def test_a_run_is_exported_for_peft(kind, tmp_path):
    """On the model that the run began with, the adapter makes the model that it ended with."""
    lora = Lora(rank=3, alpha=5.0, targets=("qkv", "fc2"))
    run = tmp_path / "run"
    model, arch = finished_run(run, lora)
    state = {n: p.detach().clone() for n, p in model.named_parameters()} | draw(arch)
    state["head.weight"] += 0.1
    initial = draw(arch) if kind in ("initial", "both") else None
    changed = {}
    if kind in ("changed", "both"):
        changed = {w.name: 0.1 * torch.randn(w.shape) for w in weights(arch)[:1]}
    base = dict(state)
    for weight, a, b in targeted(arch):
        if initial:
            base[weight.name] = base[weight.name] - arch.scaling * initial[b.name] @ initial[a.name]
        base[weight.name] = base[weight.name] + changed.get(weight.name, 0.0)
    final = merged(arch, base)
    save_tuned(run, arch, lora, state, initial, changed)
    safetensors.torch.save_file(final, run / "model.safetensors")
    result = CliRunner().invoke(app, ["export", str(run), "--json"])
    assert result.exit_code == 0, result.output
    entries = json.loads(result.output)
    folder = run / "adapter"
    ranks = {"plain": 3, "initial": 6, "changed": 24, "both": 24}
    assert entries == {
        "format": "peft",
        "folder": str(folder),
        "rank": ranks[kind],
        "targets": ["qkv", "fc2"],
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    expected = logits(of_weights(model, final), arch)
    assert relative(logits(loaded(base_model(run), folder), arch), expected) <= 1e-5


def test_export_says_how_to_load_an_adapter(tmp_path):
    """The lines it prints are run."""
    lora, run, out = Lora(rank=2), tmp_path / "run", tmp_path / "to hand on"
    model, arch = finished_run(run, lora)
    state = dict(model.state_dict()) | draw(arch)
    save_tuned(run, arch, lora, state)
    result = CliRunner().invoke(app, ["export", str(run), "--format", "peft", "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert "an adapter of rank 2 of qkv, proj, fc1, fc2" in result.output
    lines = [line.strip() for line in result.output.splitlines()[2:]]
    assert len(lines) == 2
    names: dict = {}
    exec("\n".join(lines), names)
    expected = logits(of_weights(model, merged(arch, state)), arch)
    assert relative(logits(names["model"], arch), expected) <= 1e-5
