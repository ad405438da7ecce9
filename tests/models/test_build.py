import json
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch

from d2ft_fl.errors import ConfigError
from d2ft_fl.models import build
from d2ft_fl.models.build import build_adapter, register
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.models.timm_family import TIMM
from d2ft_fl.models.weights import GLYPH_WEIGHTS

SPEC = ModelSpec("vit_glyphs", (), "bundled", 0, 10, seed=0)
TINY = ModelSpec("vit_tiny_patch16_224", (("depth", 2),), "none", 32, 10, seed=0)


def test_the_bundled_model_has_36_subnets_and_travels_in_a_flower_app_bundle():
    arch = build_adapter(SPEC).describe()
    assert (arch.blocks, arch.heads, arch.classes) == (6, 6, 10)
    assert GLYPH_WEIGHTS.suffix == ".json"
    assert GLYPH_WEIGHTS.stat().st_size <= 2e6


def test_the_classifier_depends_on_the_seed_and_nothing_else_does():
    a, same, b = (
        build_adapter(SPEC).model,
        build_adapter(SPEC).model,
        build_adapter(ModelSpec(**{**vars(SPEC), "seed": 1})).model,
    )
    assert torch.equal(a.head.weight, same.head.weight)
    assert not torch.equal(a.head.weight, b.head.weight)
    assert torch.equal(a.blocks[3].mlp.fc1.weight, b.blocks[3].mlp.fc1.weight)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_adapter(TINY)
    assert torch.equal(torch.rand(1), expected)


def test_weights_load_at_another_image_size_and_class_count(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    model = build_adapter(ModelSpec(**{**vars(TINY), "pretrained": str(path)})).model
    assert model.pos_embed.shape == (1, 1 + 2 * 2, 192)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert model.head.out_features == 10
    # Resampling keeps the class token's position as it is.
    torch.testing.assert_close(model.pos_embed[:, 0], source.pos_embed[:, 0])


def save(tmp_path, change):
    state = dict(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).state_dict())
    change(state)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    return ModelSpec(**{**vars(TINY), "pretrained": str(path)})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.update({"norm.weight": torch.ones(7)}), r"'norm.weight' has shape \[7\]"),
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "lack 'blocks.1.mlp.fc2.bias'"),
        (lambda s: s.update({"extra": torch.ones(1)}), "hold 'extra'"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 4, 192)}), "cannot be resampled"),
    ],
)
def test_weights_that_disagree_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_adapter(save(tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a weights file")
    with pytest.raises(ConfigError, match="is not safetensors"):
        build_adapter(ModelSpec(**{**vars(TINY), "pretrained": str(path)}))


@pytest.mark.parametrize(
    "name,arguments,reason",
    [
        ("resnet18", (), "ResNet consists of convolutions and has no attention heads"),
        ("swin_tiny_patch4_window7_224", (), "SwinTransformer attends within shifted windows"),
        ("beit_base_patch16_224", (), "Beit adds a trained bias of relative positions"),
        ("eva02_tiny_patch14_224", (), "Eva rotates queries and keys"),
        ("convnext_atto", (), "ConvNeXt consists of convolutions"),
        ("mixer_s32_224", (), "MlpMixer mixes tokens by a layer of their own"),
        ("vit_small_r26_s32_224", (), "not supported|cannot be built"),
        ("vit_tiny_patch16_224", (("scale_attn_norm", True),), "norms across heads"),
        ("vit_tiny_patch16_224", (("scale_mlp_norm", True),), "norms across heads"),
        ("vit_tiny_patch16_224", (("patch_drop_rate", 0.1),), "drops patches"),
        ("vit_tiny_patch16_224", (("attn_layer", "diff"),), "DiffAttention"),
        ("vit_relpos_small_patch16_224", (), "VisionTransformerRelPos"),
        ("vit_tiny_patch16_224", (("depth", 0),), "no blocks"),
        ("vit_tiny_patch16_224", (("num_heads", 0),), "cannot be built"),
        ("vit_tiny_patch16_224", (("act_layer", "foo"),), "cannot be built"),
        ("vit_tiny_patch16_224", (("global_pool", "map"),), "pools by attention"),
        ("deit_tiny_distilled_patch16_224", (), "VisionTransformerDistilled"),
    ],
)
def test_everything_else_is_refused_by_name(name, arguments, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        build_adapter(ModelSpec(name, arguments, "none", 0, 10, 0))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_deit_is_a_plain_vit(name):
    spec = ModelSpec(name, (("depth", 1),), "none", 32, 10, 0)
    assert len(build_adapter(spec).model.blocks) == 1


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ConfigError, match=r"image-size = 8 is less than a patch .* 16 or more"):
        build_adapter(ModelSpec("vit_tiny_patch16_224", (), "none", 8, 10, 0))


def test_a_border_that_no_patch_sees_is_said():
    (note,) = build_adapter(ModelSpec("vit_glyphs", (), "none", 30, 10, 0)).notes
    assert "a border of 2 is not seen; image-size = 28 or 32 has none" in note
    assert build_adapter(ModelSpec("vit_glyphs", (), "none", 32, 10, 0)).notes == ()


def test_the_exported_model_says_which_class_is_which(tmp_path):
    adapter = build_adapter(ModelSpec("vit_glyphs", (), "none", 16, 2, 0, ("cat", "dog")))
    adapter.export(tmp_path, {n: p.detach() for n, p in adapter.model.named_parameters()})
    again = timm.create_model(**json.loads((tmp_path / "model.json").read_text()))
    assert list(again.pretrained_cfg["label_names"]) == ["cat", "dog"]


def test_the_exported_model_is_what_timm_takes(tmp_path):
    adapter = build_adapter(SPEC)
    model = adapter.model
    adapter.export(tmp_path, {n: p.detach() for n, p in model.named_parameters()})
    again = timm.create_model(**json.loads((tmp_path / "model.json").read_text()))
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(again.eval()(images), model(images))


def test_a_family_of_a_plug_in_builds_the_models_it_knows_and_no_others(monkeypatch):
    monkeypatch.setattr(build, "_families", list(build._families))
    mine = {"knows": lambda name: name == "mine", "build": lambda spec: ("mine", spec.classes)}
    register(replace(TIMM, names="'mine'", **mine))
    assert build_adapter(ModelSpec("mine", (), "none", 0, 7, 0)) == ("mine", 7)
    assert len(build_adapter(TINY).model.blocks) == 2
    with pytest.raises(ConfigError, match="'other' is not supported: use 'mine' or 'vit_glyphs'"):
        build_adapter(ModelSpec("other", (), "none", 0, 7, 0))


@pytest.mark.parametrize(
    "name", ["checkpoint_path", "model_name", "pretrained", "pretrained_cfg", "cache_dir"]
)
def test_arguments_name_no_other_model_and_no_file(name):
    spec = replace(TINY, arguments=(("depth", 2), (name, "/nowhere/other.pth")))
    with pytest.raises(ConfigError, match=f"model-args sets '{name}'"):
        build_adapter(spec)
