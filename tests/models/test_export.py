"""What a finished run leaves for others: files that LoRA tuned, whole weights, refusals.

Adapters are tested in test_adapters.py.
"""

import importlib
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.models import build
from d2ft_fl.models.build import build_adapter, register
from d2ft_fl.models.export import base_model, load_tuned, save_tuned
from d2ft_fl.models.family import Family
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.models.timm_build import build_timm
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.records.run_folder import write_status
from d2ft_fl.util.toml import dump_toml
from tests.conftest import SMALL, images_for
from tests.engine.test_lora_engine import adapted

ARGUMENTS = tuple((k, v) for k, v in SMALL.items() if k not in ("model_name", "num_classes"))
SPEC = ModelSpec(SMALL["model_name"], ARGUMENTS, "none", 0, SMALL["num_classes"], seed=3)


def finished_run(folder, lora=None, spec=SPEC):
    """A run's folder as the recorder leaves it, with the model it began with; model, arch."""
    adapter = build_adapter(spec)
    model = adapter.model
    folder.mkdir()
    config = RunConfig(
        model=spec.name, pretrained="none", seed=spec.seed, run_folder=str(folder),
        tuning="lora" if lora else "full",
    )  # fmt: skip
    folder.joinpath("config.toml").write_text(dump_toml(config.to_mapping()))
    adapter.export(folder, model.state_dict())
    write_status(folder, "finished")
    arch = adapter.describe()
    return model, with_lora(arch, lora) if lora else arch


def run_export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def refused(*arguments):
    """The one line with which a command ends."""
    result = run_export(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("d2ft: ")
    assert result.output.count("\n") == 1
    return result.output


def test_what_lora_tuned_is_saved_and_loaded(tmp_path):
    lora = Lora(rank=3, alpha=5.0, targets=("qkv", "fc2"), rslora=True, dropout=0.1)
    _, arch, state = adapted(lora)
    initial = {p.name: torch.randn(p.shape) for p in arch.parameters if p.factor}
    changed = {"blocks.1.mlp.fc2.weight": torch.randn(24, 96)}
    save_tuned(tmp_path, arch, lora, state, initial, changed)
    found = load_tuned(tmp_path)
    assert found.lora == lora
    assert found.state.keys() == initial.keys() | {"head.weight", "head.bias"}
    for saved, wanted in ((found.state, state), (found.initial, initial), (found.changed, changed)):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved.items())
    assert found.initial.keys() == initial.keys()
    assert found.changed.keys() == changed.keys()


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("lora.json", "{", "is not JSON"),
        ("lora.json", '{"rank": 3}', "does not say how a run was tuned"),
        ("lora.json", None, "cannot be read"),
        ("lora.safetensors", "x", "is not safetensors"),
        ("lora.safetensors", None, "does not exist"),
    ],
)
def test_broken_files_are_named(file, text, message, tmp_path):
    _, arch, state = adapted(Lora(rank=2))
    save_tuned(tmp_path, arch, Lora(rank=2), state)
    tmp_path.joinpath(file).unlink()
    if text is not None:
        tmp_path.joinpath(file).write_text(text)
    with pytest.raises(ConfigError, match=f"{file}' {message}"):
        load_tuned(tmp_path)


def test_targets_that_are_all_are_written_by_name_and_none_are_refused(tmp_path):
    _, arch, state = adapted(Lora(rank=2))
    save_tuned(tmp_path, arch, Lora(rank=2), state)
    assert load_tuned(tmp_path).lora.targets == ("qkv", "proj", "fc1", "fc2")
    rewritten("lora.json", targets=[])(tmp_path)
    with pytest.raises(ConfigError, match=r"lora.json' does not say how a run was tuned"):
        load_tuned(tmp_path)


def test_the_model_that_a_run_began_with_is_built_again(tmp_path):
    model, _ = finished_run(tmp_path / "run")
    found = base_model(tmp_path / "run").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_whole_weights_load_into_timm(lora, tmp_path):
    """By the lines that the command prints."""
    run, out = tmp_path / "run", tmp_path / "out"
    model, arch = finished_run(run, lora)
    if lora:
        factors = {p.name: torch.randn(p.shape) for p in arch.parameters if p.factor}
        save_tuned(run, arch, lora, dict(model.state_dict()) | factors)
    result = run_export(run, "--format", "timm", "--output", out)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{out}: whole weights for timm")
    names: dict = {}
    exec("\n".join(line.strip() for line in result.output.splitlines()[2:]), names)
    images, _ = images_for(arch, 3)
    assert torch.equal(names["model"].eval()(images), model(images))
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "model.json"}


def shorter(model):
    """timm's model as another library might have it: by a depth and a number of labels."""

    class Adapter(TimmViT):
        def export(self, folder, weights):
            safetensors.torch.save_file(dict(weights), folder / "model.safetensors")
            entries = {"depth": len(self.model.blocks), "labels": self.model.num_classes}
            (folder / "model.json").write_text(json.dumps(entries))

    return Adapter(model, {})


SHORTER = Family(
    names="'shorter'",
    library="shorts",
    knows=lambda name: name == "shorter",
    build=lambda spec: shorter(
        build_timm(
            replace(SPEC, arguments=(*ARGUMENTS, *spec.arguments), classes=spec.classes)
        ).model
    ),
    read=lambda entries: ({"depth": entries["depth"]}, entries["labels"]),
    load=lambda folder: ("import shorts", f"model = shorts.load({str(folder)!r})"),
    create=lambda spec: ("import shorts", f"shorts.fetch({spec.classes})"),
)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_run_of_another_family_is_read_and_loaded_by_what_the_family_says(
    lora, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "_families", list(build._families))
    register(SHORTER)
    run = tmp_path / "run"
    spec = ModelSpec("shorter", (("depth", 1),), "none", 0, 7, seed=3)
    model, arch = finished_run(run, lora, spec)
    assert arch.blocks == 1
    found = base_model(run).state_dict()
    assert found["head.bias"].shape == (7,)
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    if lora:
        factors = {p.name: torch.randn(p.shape) for p in arch.parameters if p.factor}
        save_tuned(run, arch, lora, dict(model.state_dict()) | factors)
        config = (
            (run / "config.toml").read_text().replace('pretrained = "none"', 'pretrained = "hub"')
        )
        (run / "config.toml").write_text(config)
        adapter = run_export(run).output.splitlines()
        assert adapter[0].startswith(f"{run / 'adapter'}: an adapter of rank 2")
        assert adapter[2].strip() == "import shorts; from peft import PeftModel"
        assert "PeftModel.from_pretrained(shorts.fetch(7), " in adapter[3]
    whole = run_export(run, "--format", "shorts").output.splitlines()
    assert whole[0].startswith(f"{run / 'shorts'}: whole weights for shorts")
    assert [line.strip() for line in whole[2:]] == list(SHORTER.load(run / "shorts"))
    assert "'timm' is unknown; use one of peft, shorts" in refused(run, "--format", "timm")


def test_json_is_all_that_is_printed(tmp_path):
    finished_run(tmp_path / "run")
    result = run_export(tmp_path / "run", "--json")
    folder = tmp_path / "run" / "timm"
    assert json.loads(result.output) == {
        "format": "timm",
        "folder": str(folder),
        "rank": None,
        "targets": [],
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert state.keys() == build_adapter(SPEC).model.state_dict().keys()


def test_an_adapter_of_a_run_without_lora_is_refused(tmp_path):
    finished_run(tmp_path / "run")
    text = refused(tmp_path / "run", "--format", "peft")
    assert "was not tuned by LoRA, so that it has no adapter; use --format timm" in text
    assert not (tmp_path / "run" / "adapter").exists()


def test_folders_that_hold_no_finished_run_are_refused(tmp_path):
    assert "is not a folder; name the run folder" in refused(tmp_path / "nowhere")
    assert "holds no run: it lacks 'status.json'" in refused(tmp_path)
    run = tmp_path / "run"
    finished_run(run)
    write_status(run, "running")
    assert "is not finished: its status is 'running'" in refused(run)
    write_status(run, "failed", "no client answered")
    assert "its status is 'failed' (no client answered)" in refused(run)
    (run / "status.json").write_text("{")
    assert "status.json' is not JSON" in refused(run)
    write_status(run, "finished")
    (run / "model.safetensors").unlink()
    assert "lacks 'model.safetensors'" in refused(run)


def test_unknown_formats_and_folders_in_use_are_refused(tmp_path):
    run = tmp_path / "run"
    finished_run(run)
    assert "--format 'onnx' is unknown; use one of peft, timm" in refused(run, "--format", "onnx")
    for used in (run, run / "config.toml"):
        assert "is not an empty folder; name another" in refused(run, "--output", used)
    assert run_export(run).exit_code == 0
    assert "is not an empty folder" in refused(run)
    assert "cannot be written to" in refused(run, "--output", run / "config.toml" / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run_export(run, "--output", empty).exit_code == 0


def drop_a_factor(run):
    tensors = safetensors.torch.load_file(run / "lora.safetensors")
    tensors.pop("blocks.1.mlp.fc1.lora_A.weight")
    safetensors.torch.save_file(tensors, run / "lora.safetensors")


def rewritten(name, **changes):
    """Change keys of a JSON file of a run."""

    def damage(run):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(found | changes))

    return damage


@pytest.mark.parametrize(
    "damage, format, message",
    [
        (drop_a_factor, "peft", "does not hold what 'lora.json' says"),
        (rewritten("lora.json", rank=3), "peft", "does not hold what 'lora.json' says"),
        (rewritten("lora.json", rank="two"), "peft", "does not say how a run was tuned"),
        (rewritten("lora.json", rank=0), "peft", "lora.json' does not say how a run was tuned"),
        (rewritten("lora.json", targets=[]), "peft", "lora.json' does not say how a run was tuned"),
        (rewritten("lora.json", targets=["qkv", "keys"]), "", "does not say how a run was tuned"),
        (rewritten("lora.json", targets=["qkv", "qkv"]), "", "does not say how a run was tuned"),
        (rewritten("model.json", embed_dim=48), "peft", "does not hold what 'lora.json' says"),
        (rewritten("model.json", num_classes="ten"), "timm", "does not say how the model is built"),
        (lambda run: (run / "model.safetensors").write_bytes(b"xx"), "timm", "is not safetensors"),
        (lambda run: (run / "lora.json").unlink(), "", "lora.json' cannot be read"),
    ],
)
def test_a_damaged_run_is_named_and_nothing_is_written(damage, format, message, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    model, arch = finished_run(run, Lora(rank=2))
    factors = {p.name: torch.randn(p.shape) for p in arch.parameters if p.factor}
    save_tuned(run, arch, Lora(rank=2), dict(model.state_dict()) | factors)
    damage(run)
    assert message in refused(run, "--format", format, "--output", out)
    assert not out.exists()


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    model, arch = finished_run(run, Lora(rank=2))
    factors = {p.name: torch.randn(p.shape) for p in arch.parameters if p.factor}
    save_tuned(run, arch, Lora(rank=2), dict(model.state_dict()) | factors)

    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    importlib.import_module("peft")  # or it binds what stands for save_file now, for good
    monkeypatch.setattr("d2ft_fl.lora.peft_export.safetensors.torch.save_file", full)
    text = refused(run, "--output", out)
    assert "cannot be written to: I/O error: No space left on device; name another" in text
    assert list(out.iterdir()) == []
