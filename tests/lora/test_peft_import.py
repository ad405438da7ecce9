"""Adapters that peft writes are read, or refused in one line."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, merged, with_lora
from d2ft_fl.lora.peft_export import write_adapter
from d2ft_fl.lora.peft_files import CONFIG, PREFIX, TENSORS
from d2ft_fl.lora.peft_import import read_adapter
from tests.conftest import build
from tests.engine.test_partial_model import relative
from tests.lora.test_peft_files import config_of, logits, of_weights, tuned


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


def test_a_classifier_that_fits_in_part_is_left_out(good, tmp_path):
    """Weights of seven classes, and biases of five."""
    folder = shutil.copytree(good, tmp_path / "other")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    tensors[PREFIX + "head.weight"] = torch.ones(7, 24)
    safetensors.torch.save_file(tensors, folder / TENSORS)
    _, found = read_adapter(folder, build()[1])
    assert found.keys() == {n.removeprefix(PREFIX) for n in tensors if ".lora_" in n}


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


@pytest.mark.parametrize("rank", [1, 24])
def test_a_rank_may_be_one_or_that_of_the_smallest_product(rank, tmp_path):
    lora = Lora(rank, targets=("qkv",))
    _, arch, state = tuned(lora)
    write_adapter(tmp_path, arch, lora, state)
    assert read_adapter(tmp_path, build()[1])[0] == lora


def test_what_a_configuration_leaves_out_is_as_in_peft(tmp_path):
    from peft import LoraConfig

    by_default = LoraConfig()
    expected = Lora(
        by_default.r, by_default.lora_alpha, ("qkv",), by_default.use_rslora,
        by_default.lora_dropout,
    )  # fmt: skip
    assert expected == Lora(targets=("qkv",))
    _, arch, state = tuned(expected)
    write_adapter(tmp_path, arch, expected, state)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    found, tensors = read_adapter(tmp_path, build()[1])
    assert found == expected
    assert tensors.keys() == {p.name for p in arch.parameters if p.trains}


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
        ({"lora_dropout": -0.5}, "lora_dropout = -0.5 must be 0 or more, and below 1"),
        ({"r": True}, "r = True is not a whole number"),
        ({"r": 2.0}, "r = 2.0 is not a whole number"),
        ({"r": 25}, "its r = 25 does not lie between 1 and 24"),
        ({"lora_alpha": float("inf")}, "its lora_alpha = inf is no number above 0"),
        ({"init_lora_weights": None}, "init_lora_weights = None changes the base weights"),
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


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dropout_is_read(dropout, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "other")
    (folder / CONFIG).write_text(json.dumps(config_of(good) | {"lora_dropout": dropout}))
    assert read_adapter(folder, build()[1])[0] == Lora(2, targets=("qkv",), dropout=dropout)


def without(name):
    return lambda tensors: tensors.pop(PREFIX + name)


def adding(name):
    return lambda tensors: tensors.update({PREFIX + name: torch.ones(2, 2)})


def spoiling(name, value):
    return lambda tensors: tensors[PREFIX + name][0].fill_(value)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("blocks.0.attn.qkv.lora_B.weight"), "lacks 'blocks.0.attn.qkv.lora_B.weight'"),
        (without("head.bias"), "its classifier holds head.weight, but the model's head.weight, he"),
        (adding("head.weight"), "'head.weight' has shape [2, 2], but the model wants [5, 24]"),
        (adding("norm.weight"), "holds 'norm.weight', which is no factor of LoRA"),
        (adding("blocks.0.attn.qkv.lora_C.weight"), "lora_C.weight', which is no factor of LoRA"),
        (lambda tensors: tensors.clear(), "holds no factors of LoRA"),
        (spoiling("blocks.2.attn.qkv.lora_B.weight", float("nan")), "holds numbers that are not"),
        (spoiling("head.bias", float("inf")), "'head.bias' holds numbers that are not finite"),
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
