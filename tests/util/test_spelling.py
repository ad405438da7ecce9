import pytest

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.data.partition import partitioner_class
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.rounds.components import Components
from d2ft_fl.util.spelling import meant


@pytest.mark.parametrize(
    "name,known,wanted",
    [
        ("dft2", ("fedavg", "d2ft"), " (did you mean 'd2ft'?)"),
        ("FEDAVG", ("fedavg", "d2ft"), " (did you mean 'fedavg'?)"),
        ("iid", ("Iid", "Dirichlet"), " (did you mean 'Iid'?)"),
        ("zebra", ("fedavg", "d2ft"), ""),
    ],
)
def test_the_nearest_name_whatever_the_case(name, known, wanted):
    assert meant(name, known) == wanted


@pytest.mark.parametrize(
    "ask,wanted",
    [
        (lambda: Components(RunConfig(strategy="d2tf")).strategy, "d2ft"),
        (lambda: Components(RunConfig(tuning="lorra")).tuning, "lora"),
        (lambda: RunConfig.from_mapping({"label-colum": "x"}), "label-column"),
        (lambda: RunConfig(optimizer="adamx").check_values(), "adamw"),
        (lambda: RunConfig(bad_examples="leave").check_values(), "leave-out"),
        (lambda: partitioner_class("Dirichlett"), "Dirichlet"),
        (
            lambda: build_adapter(ModelSpec("vit_tiny_patch16_244", (), "none", 0, 2, 0)),
            "vit_tiny_patch16_224",
        ),
    ],
)
def test_refusals_of_names_suggest_the_nearest(ask, wanted):
    with pytest.raises(ConfigError, match="did you mean") as error:
        ask()
    assert f"did you mean {wanted!r}?" in str(error.value)
