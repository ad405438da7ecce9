"""Choosing a model by the layers that clients can train."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.preview.model_selection import choose
from d2ft_fl.preview.plan_preview import preview

BUDGETS = """mix = ["small"]
[classes.small]
memory = "110 MB"
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(BUDGETS)
    return RunConfig(strategy="caff", clients=3, budgets=str(path), image_size=32, batch_size=4)


def test_the_model_with_most_trained_layers_is_chosen(config):
    names = ["vit_base_patch16_224", "vit_tiny_patch16_224", "vit_small_patch16_224"]
    large, tiny, small = choose(config, names, examples=20)
    assert tiny.chosen
    assert not large.chosen
    assert not small.chosen
    assert (large.trained_layers, large.sit_out) == (0, 3)  # 86 million weights are 344 MB
    assert tiny.trained_layers == tiny.layers == 12  # 5.5 million are 22 MB, 88 MB with moments
    assert 0 <= small.trained_layers < 12  # 22 million weights are 88 MB, and what trains four-fold
    planned = preview(replace(config, model=small.model, pretrained="none"), 20)
    assert small.trained_layers == planned.rounds[0].clients[0].trained_layers


def test_the_command(config, tmp_path):
    arguments = ["choose", "vit_tiny_patch16_224", "--examples", "20", "--set", "clients=2"]
    result = CliRunner().invoke(app, [*arguments, "--set", f"budgets={config.budgets}", "--json"])
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert found["chosen"]
    shown = CliRunner().invoke(app, [*arguments, "--set", f"budgets={config.budgets}"])
    assert "vit_tiny_patch16_224 *" in shown.stdout
    wrong = CliRunner().invoke(app, ["choose", "resnet18", "--set", "budgets=hardware"])
    assert wrong.exit_code == 2
    assert "resnet18" in wrong.stderr


def test_shares_of_each_model_cannot_choose(config):
    """Every model affords 60 % of itself."""
    with pytest.raises(ConfigError, match="shares of each model itself"):
        choose(replace(config, budgets="devices"), ["vit_tiny_patch16_224"], examples=20)


def test_no_model_is_an_error(config):
    with pytest.raises(ConfigError, match="name the models"):
        choose(config, [])
