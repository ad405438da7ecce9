import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from d2ft_fl.budgets import machine as module
from d2ft_fl.budgets import speed_profile
from d2ft_fl.budgets.budget import Budget, ClientDescription
from d2ft_fl.budgets.device_classes import read_devices
from d2ft_fl.budgets.kept_speeds import keep, kept, path_of, software, write_curve
from d2ft_fl.budgets.machine import Profile, coarse, profile
from d2ft_fl.budgets.sources import budget_source
from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import resolve_path
from d2ft_fl.costs.machine_speed import MachineSpeed, read_curve, standard
from d2ft_fl.errors import ConfigError
from d2ft_fl.runtime import worker_memory

WHO = ClientDescription(0, 10, 1)
KNOWN = Profile(replace(standard(), products=((2e9, 2.5e9) * 15,) * 3), free=3 * 2**30)


@pytest.fixture
def measured(monkeypatch):
    """A machine that is known already; how often it was measured."""
    calls = []

    def measure(*which):
        calls.append(which)
        return replace(KNOWN.speed, source=f"{software()}, today")

    monkeypatch.setattr(speed_profile, "measure", measure)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(worker_memory, "measure", lambda: 400 * 2**20 + 1)
    return calls


def test_a_machine_is_measured_once_and_that_is_kept(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path / "none"))
    assert kept("cpu", "fp32", 1) is None
    source = budget_source("measured", resolve_path)
    first = source(WHO, 1)
    assert source(WHO, 2).curve == first.curve == kept("cpu", "fp32", 1)
    assert measured == [("cpu", "fp32", 1)]
    assert kept("cpu", "fp32", 2) is None
    assert kept("cpu", "bf16", 1) is None


@pytest.mark.parametrize("spoiled", ["", "{}", "[1]"])
def test_what_is_kept_and_cannot_be_read_is_measured_again(
    measured, monkeypatch, tmp_path, spoiled
):
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path))
    path_of("cpu", "fp32", 1).write_text(spoiled)
    budget_source("measured", resolve_path)(WHO, 1)
    assert len(measured) == 1


def test_what_other_software_measured_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path))
    keep(replace(KNOWN.speed, source="another processor, torch 1.0, today"))
    assert kept("cpu", "fp32", 1) is None


@pytest.mark.slow
def test_products_and_steps_are_really_timed(monkeypatch):
    """Fewer shapes and one model: figures of this machine, and its threads as they were."""
    monkeypatch.setattr(speed_profile, "ROWS", (16.0, 256.0))
    monkeypatch.setattr(speed_profile, "WIDTHS", (32.0, 256.0))
    monkeypatch.setattr(speed_profile, "TOKENS", (16.0,))
    monkeypatch.setattr(speed_profile, "SECONDS", 0.001)
    monkeypatch.setattr(speed_profile, "MODELS", ((24, 3, 2, 16),))
    before = torch.get_num_threads()
    speed = speed_profile.measure("cpu", "fp32", 2)
    assert torch.get_num_threads() == before
    assert speed.threads == 2
    assert 1e8 < speed.peak < 1e14
    assert speed.passes + speed.branch + speed.step > 0
    assert MachineSpeed.from_json(json.loads(json.dumps(speed.to_json())), "x") == speed


@pytest.mark.parametrize(
    "size,expected",
    [(0, 0), (7, 7), (8, 8), (9, 8), (10, 10), (2**30, 2**30), (2**30 - 1, 7 * 2**27)],
)
def test_memory_is_rounded_down_to_quarters_of_a_power_of_two(size, expected):
    assert coarse(size) == expected


def test_half_of_what_is_free_or_held_already_is_the_memory_budget(monkeypatch):
    monkeypatch.setattr(module, "profiled", lambda *which: KNOWN.speed)
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * 2**30)
    monkeypatch.setattr(module, "_held", lambda device: 2**30)
    source = budget_source("measured", resolve_path)
    assert source.varies
    budget = Budget.from_mapping(
        {
            "memory": "1.5 GiB",
            "memory-of": "process",
            "speed": "2.5 GFLOP/s",
            "device": "measured",
        }
    )
    assert source(WHO, 1) == replace(budget, curve=KNOWN.speed)


def test_what_a_process_takes_does_not_change_its_budget(monkeypatch):
    """What it holds more is what is free less, here to the byte."""
    monkeypatch.setattr(module, "profiled", lambda *which: KNOWN.speed)
    budgets = []
    for held in (0, 10**9):
        monkeypatch.setattr(module, "free_memory", lambda device, held=held: 4 * 10**9 - held)
        monkeypatch.setattr(module, "_held", lambda device, held=held: held)
        budgets.append(budget_source("measured", resolve_path)(WHO, 1))
    assert budgets[0] == budgets[1]


def test_the_toml_is_a_class_of_the_same_budget(tmp_path):
    write_curve(KNOWN.speed, tmp_path / "curve.json")
    path = tmp_path / "mine.toml"
    path.write_text(KNOWN.to_toml("curve.json"))
    assert read_devices(path)(WHO, 1) == KNOWN.budget
    path.write_text(KNOWN.to_toml())
    assert read_devices(path)(WHO, 1) == replace(KNOWN.budget, curve=None)


@pytest.mark.parametrize(
    "arguments,message", [(("cpu", 0), "threads = 0 must be"), (("tpu", 1), "use one of cpu, cuda")]
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        profile(*arguments)


def test_the_command_shows_a_class_to_paste(measured, tmp_path):
    curve = tmp_path / "curve.json"
    result = CliRunner().invoke(app, ["profile", "--output", str(curve)])
    assert result.exit_code == 0
    assert "GFLOP/s of products" in result.output
    assert read_curve(curve, "x").products == KNOWN.speed.products
    assert "[classes.measured]" in result.output
    assert 'memory-of = "process"\nmemory-base = "401 MiB"\n' in result.output
    assert "a worker process, before any model" in result.output
    path = tmp_path / "mine.toml"
    path.write_text(result.output[result.output.index("[classes.measured]") :])
    assert read_devices(path)(WHO, 1).memory_base == 401 * 2**20


def test_the_command_prints_json(measured):
    found = json.loads(CliRunner().invoke(app, ["profile", "--json"]).output)
    assert found["speed"]["threads"] == 1
    assert Budget.from_mapping(found["budget"]).speed == KNOWN.speed.peak
    assert found["worker_memory"] == found["budget"]["memory_base"] == 400 * 2**20 + 1


def test_the_command_refuses_in_one_line_with_exit_code_2():
    result = CliRunner().invoke(app, ["profile", "--threads", "0"])
    assert result.exit_code == 2
    assert result.output == "d2ft: threads = 0 must be 1 or more\n"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_measured_with_its_own_memory():
    found = profile("cuda", 1)
    assert found.speed.peak > 1e10
    assert 0 < found.free <= torch.cuda.get_device_properties(0).total_memory
