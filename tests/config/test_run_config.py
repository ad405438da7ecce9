import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.rounds.checks import checked
from d2ft_fl.rounds.components import Components

ROOT = Path(__file__).parents[2]
APP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def test_pyproject_and_the_record_agree_on_keys_types_and_defaults():
    assert RunConfig().to_mapping() == APP
    assert {k: type(v) for k, v in RunConfig().to_mapping().items()} == {
        k: type(v) for k, v in APP.items()
    }


def test_every_option_is_documented_where_it_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[tool.flwr.app.config]") : text.index("[tool.ruff]")]
    options = [line for line in section.splitlines() if " = " in line and line[0] != "#"]
    assert len(options) == len(APP)
    assert all("  # " in line for line in options)


def test_the_default_configuration_checks():
    assert checked(RunConfig()) == RunConfig()


@pytest.mark.parametrize(
    "entries,message",
    [
        ({"round": 3}, "unknown option 'round'; did you mean 'rounds'"),
        ({"zzz": 3}, "unknown option 'zzz'; known are strategy"),
        ({"rounds": "ten"}, "rounds = 'ten' is a str; write a whole number"),
        ({"lr": "fast"}, "lr = 'fast' is a str; write a number"),
        ({"rounds": True}, "is a bool"),
        ({"rounds": 0}, "rounds = 0 must be 1 or more"),
        ({"clients": -1}, "clients = -1 must be 1 or more"),
        ({"lr": -1.0}, "lr = -1.0 must be a finite number"),
        ({"lr": float("nan")}, "must be a finite number"),
        ({"optimizer": "adam"}, "use one of adamw, sgd"),
        ({"planner": "magic"}, "use one of joint, two-stage"),
        ({"backward-score": "size"}, "use one of magnitude, fisher, gradient, taylor, uniform"),
        ({"strategy": "best"}, "use one of d2ft, d2ft-paper, .*, or the dotted path"),
        ({"strategy": "no.such"}, "cannot import 'no.such'"),
        ({"strategy": "d2ft_fl.wire.blob"}, "has no function schedule"),
        ({"tuning": "half"}, "use one of full"),
        ({"slots": 20}, "slots = 20 is more than batch-size = 16"),
        ({"score-every": 0}, "fisher scores need a scoring pass"),
        (
            {"score-examples": 0, "backward-score": "taylor", "forward-score": "gradient"},
            "gradient and taylor scores need a scoring pass: set score-every and score-examples",
        ),
        ({"score-momentum": 1.0}, "score-momentum = 1.0 must be 0 or more, and below 1"),
        ({"score-momentum": float("nan")}, "score-momentum = nan must be 0 or more"),
        ({"partitioner": "best"}, "use one of .*Dirichlet"),
        ({"partitioner-args": "alpha 0.5"}, "partitioner-args = .* cannot be read"),
        ({"model": "resnet50"}, "model 'resnet50' is not supported"),
        ({"model": "vit_nonsense", "pretrained": "none"}, "cannot be built"),
        ({"model": "vit_tiny_patch16_224"}, "'bundled' belongs to model 'vit_glyphs'"),
        ({"pretrained": "/nowhere.safetensors"}, "does not exist"),
        ({"budgets": "rich"}, "budgets = 'rich'"),
        ({"exploration": 1.5}, "exploration = 1.5 must be between 0 and 1"),
        ({"precision": "fp16"}, "use one of fp32, bf16"),
        ({"device": "tpu"}, "device = 'tpu' is unknown; use one of cpu, cuda"),
        ({"micro-batches": 0}, "micro-batches = 0 must be 1 or more"),
        ({"pretrained": "hub"}, "'hub' has no weights of model 'vit_glyphs'"),
        (
            {
                "compensation": True,
                "score-every": 0,
                "backward-score": "uniform",
                "forward-score": "uniform",
            },
            "compensation needs rounds in which clients measure",
        ),
        ({"clients": 5000}, "clients = 5000 is more than the 1078 training examples"),
        ({"round-timeout": 0.0}, "round-timeout = 0.0 must be a finite number above 0"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(entries, message):
    with pytest.raises(ConfigError, match=message) as error:
        checked(RunConfig.from_mapping(entries))
    assert "\n" not in str(error.value)


def test_random_needs_no_scoring_pass():
    config = RunConfig(strategy="random", score_every=0)
    assert Components(checked(config)).measured_scores == ()


@pytest.mark.parametrize(
    "backward,forward,measured",
    [
        ("fisher", "fisher", ("fisher",)),
        ("taylor", "fisher", ("fisher", "taylor")),
        ("magnitude", "gradient", ("gradient",)),
        ("magnitude", "uniform", ()),
    ],
)
def test_scoring_passes_measure_what_either_direction_names(backward, forward, measured):
    config = RunConfig(backward_score=backward, forward_score=forward)
    assert Components(config).measured_scores == measured


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--set", "rounds=x"], "rounds = 'x' is a str"),
        (["--set", "rounds"], "is not key=value"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--set", "budgets=gone:f"], "cannot import 'gone'"),
    ],
)
def test_the_command_refuses_in_one_line_with_exit_code_2(arguments, message):
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_run_folder_that_holds_a_run_is_refused(tmp_path):
    tmp_path.joinpath("rounds.jsonl").write_text("{}\n")
    result = CliRunner().invoke(app, ["run", "--set", f"run-folder={tmp_path}"])
    assert result.exit_code == 2
    assert "already holds a run" in result.output
    assert not tmp_path.joinpath("status.json").exists()
