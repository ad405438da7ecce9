import tomllib
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2ft_fl.aggregation.robust import ROBUST
from d2ft_fl.budgets.matching import MATCHES
from d2ft_fl.cli.main import app
from d2ft_fl.config.choices import AGGREGATIONS, MATCHED_BUDGETS, SCORES
from d2ft_fl.config.run_config import OPTIONS, RunConfig
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.errors import ConfigError
from d2ft_fl.planning import importance
from d2ft_fl.rounds.checks import checked
from d2ft_fl.rounds.components import Components

ROOT = Path(__file__).parents[2]
APP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def test_pyproject_and_the_record_agree_on_keys_types_and_defaults():
    assert RunConfig().to_mapping() == APP
    assert {k: type(v) for k, v in RunConfig().to_mapping().items()} == {
        k: type(v) for k, v in APP.items()
    }


def test_every_number_has_its_range():
    """But for delta, whose range depends on the number of clients, and a factor that has none."""
    numbers = [one for one in OPTIONS.values() if one.kind in (int, float)]
    free = {one.key for one in numbers if not (one.to_json()["range"] or one.choices)}
    assert free == {"delta", "hostile-scale"}


def test_keys_stand_in_run_folders_in_the_order_that_they_always_had():
    keys = list(RunConfig().to_mapping())
    some = (
        "strategy dataset model tuning lora-lr batch-size aggregation upload-bits budgets device "
        "run-folder"
    )
    places = [keys.index(key) for key in some.split()]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, len(keys) - 1)


def test_training_options_are_options_of_a_run_and_have_no_defaults_of_their_own():
    own = {f.name: f for f in fields(TrainingOptions)}
    run = {f.name: f.type for f in fields(RunConfig)}
    assert {name: f.type for name, f in own.items()} == {name: run[name] for name in own}
    assert all(f.default is MISSING for f in own.values())
    config = RunConfig(lr=0.25, micro_batches=3)
    assert asdict(TrainingOptions.of(config)) == {name: getattr(config, name) for name in own}


def test_names_that_functions_are_found_by_are_the_choices_of_options():
    assert importance.KINDS == SCORES
    assert tuple(MATCHES) == MATCHED_BUDGETS
    assert ("mean", *ROBUST) == AGGREGATIONS


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
        ({"score-every": 0}, "fisher scores need scoring probes"),
        (
            {"score-examples": 0, "backward-score": "taylor", "forward-score": "gradient"},
            "gradient and taylor scores need scoring probes: set score-every and score-examples",
        ),
        ({"score-momentum": 1.0}, "score-momentum = 1.0 must be 0 or more, and below 1"),
        ({"score-momentum": float("nan")}, "score-momentum = nan must be 0 or more"),
        ({"partitioner": "best"}, "use one of .*Dirichlet"),
        ({"partitioner-args": "alpha 0.5"}, "partitioner-args = .* cannot be read"),
        ({"model": "resnet50"}, "model 'resnet50' is not supported"),
        ({"model": "vit_nonsense", "pretrained": "none"}, "is unknown to timm"),
        ({"model": "vit_tiny_patch16_224"}, "'bundled' belongs to model 'vit_glyphs'"),
        ({"pretrained": "/nowhere.safetensors"}, "does not exist"),
        ({"budgets": "rich"}, "budgets = 'rich'"),
        ({"exploration": 1.5}, "exploration = 1.5 must be between 0 and 1"),
        ({"precision": "fp16"}, "use one of fp32, bf16"),
        (
            {"device": "tpu"},
            r"device = 'tpu' is unknown \(did you mean 'cpu'\?\); use one of cpu, cuda",
        ),
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
    assert message in result.stderr  # what will run may stand before it, on standard output
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_folder_that_holds_a_run_is_refused(tmp_path):
    tmp_path.joinpath("rounds.jsonl").write_text("{}\n")
    result = CliRunner().invoke(app, ["run", "--set", f"run-folder={tmp_path}"])
    assert result.exit_code == 2
    assert "already holds a run" in result.output
    assert not tmp_path.joinpath("status.json").exists()


@pytest.mark.parametrize(
    "entries,chosen",
    [
        ({}, True),
        ({"batch-size": 16}, False),
        ({"batch-size": 8, "policy-batch": True}, True),
        ({"policy-batch": False}, False),
    ],
)
def test_a_batch_size_that_is_given_stays_unless_asked_otherwise(entries, chosen):
    assert RunConfig.from_mapping(entries).policy_batch is chosen
