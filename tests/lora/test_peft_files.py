"""Adapters that peft loads: of factors, of changes, and of whole runs."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, delta, factor_name, merged, targeted, weights
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
NAMES = ("plain", "rslora", "one", "some")  # which no default is part of


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


@pytest.mark.parametrize("lora", LORAS, ids=NAMES)
def test_peft_loads_what_a_run_tuned(lora, tmp_path):
    model, arch, state = tuned(lora)
    folder = tmp_path / "of" / "mine"
    assert write_adapter(folder, arch, lora, state, base="some/model") == lora.rank
    expected = logits(of_weights(model, merged(arch, state)), arch)
    assert relative(logits(model, arch), expected) > 1e-2
    assert relative(logits(loaded(model, folder), arch), expected) <= 1e-5
    config = config_of(folder)
    assert config["inference_mode"]
    assert (config["r"], config["lora_alpha"]) == (lora.rank, lora.alpha)
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["use_rslora"], config["lora_dropout"]) == (lora.rslora, lora.dropout)


@pytest.mark.parametrize("lora", LORAS, ids=NAMES)
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


def of_values(shape, values):
    """A matrix whose singular vectors are unit vectors."""
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return matrix


def exported_ranks(folder):
    """The ranks by weight of an adapter that holds factors."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    end = ".lora_A.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(end): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(end)
    }


@pytest.mark.parametrize("largest", [2.0**10, 2.0**-10])
def test_without_weights_a_change_has_the_rank_that_float32_can_tell(largest, tmp_path):
    """1e-7 of the largest singular value is nothing; what never changed has rank 1."""
    lora = Lora(rank=3, alpha=6.0, targets=("qkv",))
    _, arch, state = tuned(lora)
    head = {name: state[name] for name in ("head.weight", "head.bias")}
    changed = of_values((96, 24), [largest, 0.1 * largest, 2e-7 * largest, 5e-8 * largest])
    name = "blocks.1.mlp.fc1"  # no target of the run
    assert write_adapter(tmp_path, arch, lora, head, changes={f"{name}.weight": changed}) == 3
    modules = [f"blocks.{block}.{of}" for of in ("attn.qkv", "mlp.fc1") for block in range(3)]
    assert exported_ranks(tmp_path) == {module: 3 if module == name else 1 for module in modules}
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    a, b = (tensors[PREFIX + factor_name(f"{name}.weight", factor)] for factor in "AB")
    torch.testing.assert_close(delta(a, b, 2.0), changed, rtol=1e-6, atol=1e-7 * largest)


def test_a_change_within_the_rounding_of_its_weight_is_nothing(tmp_path):
    """A product [72, 24] of weights 3: 2^-23 * 3 * (sqrt(72) + sqrt(24)), or 4.79e-6."""
    lora = Lora(rank=3, targets=("qkv",))
    _, arch, state = tuned(lora)
    noise = 2**-23 * 3 * (72**0.5 + 24**0.5)
    name = "blocks.0.attn.qkv.weight"
    state[name] = torch.full((72, 24), 3.0)
    changes = {name: of_values((72, 24), [1.0, 1.05 * noise, 0.95 * noise])}
    write_adapter(tmp_path, arch, lora, state, changes=changes)
    assert exported_ranks(tmp_path)["blocks.0.attn.qkv"] == 2


def test_all_that_a_run_added_is_what_changed_and_what_factors_add_less_what_they_added():
    lora = Lora(rank=1, alpha=2.0, targets=("proj", "fc1"))
    _, arch, state = tuned(lora)
    proj, fc1 = "blocks.0.attn.proj.weight", "blocks.2.mlp.fc1.weight"

    def factors(name, *values):
        names = [factor_name(name, factor) for factor in "AB"]
        return {
            name: torch.full(arch.by_name[name].shape, float(value))
            for name, value in zip(names, values, strict=True)
        }

    state |= factors(proj, 3, 5) | factors(fc1, 7, 2)
    initial = factors(proj, 2, 4)
    found = total_changes(arch, state, initial, {proj: torch.ones(24, 24)})
    assert found.keys() == {weight.name for weight, _, _ in targeted(arch)}
    assert found[proj].tolist() == [[1.0 + 2 * (15 - 8)] * 24] * 24
    assert found[fc1].tolist() == [[2.0 * 14] * 24] * 96


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


@pytest.mark.parametrize("lora", LORAS, ids=NAMES)
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
