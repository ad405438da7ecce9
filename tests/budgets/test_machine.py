import json

import pytest
import torch
from typer.testing import CliRunner

from d2ft_fl.budgets import machine as module
from d2ft_fl.budgets.budget import Budget, ClientDescription
from d2ft_fl.budgets.device_classes import read_devices
from d2ft_fl.budgets.machine import Profile, Speeds, coarse, measure, profile
from d2ft_fl.budgets.sources import budget_source
from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import resolve_path
from d2ft_fl.errors import ConfigError

WHO = ClientDescription(0, 10, 1)
KNOWN = Profile("cpu", 1, Speeds(4e9, 1e9, 2.5e9), free=3 * 2**30)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.01)


def test_speed_is_all_flops_over_all_time(monkeypatch):
    seconds = iter([2.0, 0.5])
    monkeypatch.setattr(module, "_median_seconds", lambda step, device: next(seconds))
    products, attention = 2 * 256 * 384 * 1536, 4 * 12 * 128**2 * 64  # 6 to 1
    assert products == 6 * attention
    got = measure.__wrapped__("cpu", 1)
    assert got == Speeds(products / 2, attention * 2, (products + attention) / 2.5)


def test_a_machine_is_measured_once_a_process_and_keeps_its_threads():
    before = torch.get_num_threads()
    measure.cache_clear()
    first = profile("cpu", 1)
    assert torch.get_num_threads() == before
    assert profile("cpu", 1).speeds is first.speeds
    s = first.speeds
    assert min(s.products, s.attention) <= s.speed <= max(s.products, s.attention)
    assert 1e8 < s.speed < 1e14


@pytest.mark.parametrize(
    "size,expected",
    [(0, 0), (7, 7), (8, 8), (9, 8), (10, 10), (2**30, 2**30), (2**30 - 1, 7 * 2**27)],
)
def test_memory_is_rounded_down_to_quarters_of_a_power_of_two(size, expected):
    assert coarse(size) == expected


def test_half_of_what_is_free_or_held_already_is_the_memory_budget(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda device, threads: KNOWN.speeds)
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * 2**30)
    monkeypatch.setattr(module, "_held", lambda device: 2**30)
    source = budget_source("measured", resolve_path)
    assert source.varies
    assert source(WHO, 1) == Budget.from_mapping(
        {"memory": "1.5 GiB", "speed": "2.5 GFLOP/s", "device": "measured"}
    )


def test_what_a_process_takes_does_not_change_its_budget(monkeypatch):
    """What it holds more is what is free less, here to the byte."""
    monkeypatch.setattr(module, "measure", lambda device, threads: KNOWN.speeds)
    budgets = []
    for held in (0, 10**9):
        monkeypatch.setattr(module, "free_memory", lambda device, held=held: 4 * 10**9 - held)
        monkeypatch.setattr(module, "_held", lambda device, held=held: held)
        budgets.append(budget_source("measured", resolve_path)(WHO, 1))
    assert budgets[0] == budgets[1]


def test_the_toml_is_a_class_of_the_same_budget(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(KNOWN.to_toml())
    assert read_devices(path)(WHO, 1) == KNOWN.budget


@pytest.mark.parametrize(
    "arguments,message", [(("cpu", 0), "threads = 0 must be"), (("tpu", 1), "use one of cpu, cuda")]
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        profile(*arguments)


def test_the_command_shows_a_class_to_paste():
    result = CliRunner().invoke(app, ["profile"])
    assert result.exit_code == 0
    assert "feed-forward products" in result.output
    assert "[classes.measured]" in result.output


def test_the_command_prints_json():
    found = json.loads(CliRunner().invoke(app, ["profile", "--json"]).output)
    assert found["threads"] == 1
    assert Budget.from_mapping(found["budget"]).speed == found["speeds"]["speed"]


def test_the_command_refuses_in_one_line_with_exit_code_2():
    result = CliRunner().invoke(app, ["profile", "--threads", "0"])
    assert result.exit_code == 2
    assert result.output == "d2ft: threads = 0 must be 1 or more\n"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_measured_with_its_own_memory():
    found = profile("cuda", 1)
    assert found.speeds.speed > 1e10
    assert 0 < found.free <= torch.cuda.get_device_properties(0).total_memory
