"""Files of weights as people have them: fitted, or refused by name."""

import pickle

import pytest
import safetensors.torch
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from d2ft_fl.errors import ConfigError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.models.weights import check_weights

ARGUMENTS = (
    ("depth", 2), ("embed_dim", 24), ("img_size", 16), ("num_heads", 4), ("patch_size", 4),
)  # fmt: skip
NAME = "vit_tiny_patch16_224"


def build(pretrained="none", classes=3):
    return build_adapter(ModelSpec(NAME, ARGUMENTS, str(pretrained), 0, classes, 1))


@pytest.fixture
def state():
    """Weights that no seed of a model makes."""
    torch.manual_seed(9)
    return {n: torch.randn_like(t) for n, t in build().model.state_dict().items()}


def saved(path, state):
    safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, path)
    return path


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.backbone."],
)
def test_names_of_wrappers_are_taken_off(tmp_path, state, prefix):
    path = saved(tmp_path / "w.safetensors", {prefix + n: t for n, t in state.items()})
    adapter = build(path)
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    (note,) = adapter.notes
    assert all(repr(part + ".") in note for part in prefix.rstrip(".").split("."))


def test_names_without_wrappers_get_no_note(tmp_path, state):
    assert build(saved(tmp_path / "w.safetensors", state)).notes == ()


def test_a_wrapper_around_a_part_of_the_names(tmp_path, state):
    names = {n if n.startswith("head.") else "backbone." + n: t for n, t in state.items()}
    adapter = build(saved(tmp_path / "w.safetensors", names))
    assert torch.equal(adapter.model.state_dict()["norm.bias"], state["norm.bias"])


def test_two_copies_of_the_names_are_refused(tmp_path, state):
    both = state | {"module." + n: t + 1 for n, t in state.items()}
    with pytest.raises(ConfigError, match=r"hold 'module\.[a-z_.0-9]+', which model"):
        build(saved(tmp_path / "w.safetensors", both))


CONFIG = ViTConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    image_size=16, patch_size=4, num_labels=3, layer_norm_eps=1e-6,
)  # fmt: skip


@pytest.mark.parametrize("names", ["file", "modules"])
def test_a_vit_of_hugging_face_gives_the_same_logits(tmp_path, names):
    torch.manual_seed(0)
    theirs = ViTForImageClassification(CONFIG).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.5)
    if names == "file":
        theirs.save_pretrained(tmp_path)
    else:
        saved(tmp_path / "model.safetensors", theirs.state_dict())
    adapter = build(tmp_path / "model.safetensors")
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wanted = theirs(images).logits
        assert torch.allclose(adapter.model(images), wanted, atol=1e-4 * wanted.abs().max())
    assert any("Hugging Face" in note for note in adapter.notes)


def test_a_vit_of_hugging_face_without_a_classifier(tmp_path):
    theirs = ViTModel(CONFIG)  # its names have no prefix, and it has a pooler
    saved(tmp_path / "w.safetensors", theirs.state_dict())
    weight = build(tmp_path / "w.safetensors").model.state_dict()["norm.weight"]
    assert torch.equal(weight, theirs.state_dict()["layernorm.weight"])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.to(torch.int8), r"'blocks.1.attn.qkv.weight' holds int8, not floating-point"),
        (lambda t: t.index_fill(0, torch.tensor(3), float("nan")), "qkv.weight' .* not finite"),
        (lambda t: t.index_fill(0, torch.tensor(3), float("-inf")), "qkv.weight' .* not finite"),
    ],
)
def test_weights_that_are_no_numbers_to_go_on_from(tmp_path, state, change, message):
    state["blocks.1.attn.qkv.weight"] = change(state["blocks.1.attn.qkv.weight"])
    with pytest.raises(ConfigError, match=message):
        build(saved(tmp_path / "w.safetensors", state))


def test_files_that_are_no_safetensors(tmp_path, state):
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    tmp_path.joinpath("plain.pkl").write_bytes(pickle.dumps({}))
    tmp_path.joinpath("lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    saved(tmp_path / "b.safetensors", state)
    tmp_path.joinpath("text.safetensors").write_text("{}")
    for name, message in {
        "new.pth": "is a pickle of PyTorch.*save_file",
        "old.pth": "is a pickle",
        "plain.pkl": "is a pickle",
        "lfs.safetensors": "git lfs pull",
        "": "is a folder; name one of its files: b.safetensors, lfs.safetensors",
        "no.safetensors": "does not exist",
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            check_weights(NAME, str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is not safetensors"):
        build(tmp_path / "text.safetensors")
