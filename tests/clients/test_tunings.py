"""How tunings are found, and what they answer."""

import sys
from types import ModuleType

import pytest

from d2ft_fl.aggregation.lora_sums import LoraSums
from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.clients.slora import SparseStage
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import Lora, targets_alone
from d2ft_fl.rounds.checks import checked_options
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Federation
from d2ft_fl.rounds.tuning import Tuning, load_tuning
from tests.conftest import build, weights_of


def lora(**changes):
    return Components(RunConfig(tuning="lora", lora_rank=2, **changes)).tuning


@pytest.fixture
def module(monkeypatch):
    """An empty module that can be named as a tuning."""
    made = ModuleType("mine.tuning")
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))
    monkeypatch.setitem(sys.modules, "mine.tuning", made)
    return made


def test_a_module_with_plain_functions_gets_the_configuration(module):
    asked = []
    module.learning_rate = lambda kind, factor, options: 0.25
    module.architecture = lambda arch, config, number: asked.append((config, number)) or arch
    components = Components(RunConfig(tuning="mine.tuning"))
    _, arch = build()
    federation = Federation(components, arch)
    assert federation.at(3) is federation
    assert asked == [(components.config, 3)]
    assert components.tuning.learning_rate(None, False, None) == 0.25
    weights = {}
    assert components.tuning.prepare(weights, arch, 1, {}) == (weights, {})


def test_what_is_no_tuning_is_refused(module):
    config = RunConfig(tuning="mine.tuning")
    with pytest.raises(ConfigError, match=r"^tuning = 'mine.tuning' has no function learning_rate"):
        load_tuning(config)
    module.tuning = lambda config: "none"
    with pytest.raises(ConfigError, match="returned a str; return a Tuning"):
        load_tuning(config)


def test_a_tuning_without_a_learning_rate_is_refused_before_a_run_starts(module):
    class Rateless(Tuning):
        """Trains at no rate."""

    module.tuning = Rateless
    with pytest.raises(ConfigError, match=r"raised TypeError: .*learning_rate") as error:
        checked_options(RunConfig(tuning="mine.tuning"))
    assert "\n" not in str(error.value)


def test_slora_is_lora_after_a_sparse_stage():
    """The first round of LoRA is round 1 of `alternate`, in which A rests, whenever it comes."""
    _, arch = build()
    assert not isinstance(lora(), SparseStage)
    plain = lora(lora_aggregation="alternate")
    staged = lora(lora_aggregation="alternate", slora_rounds=1)
    assert staged.architecture(arch, 1) == targets_alone(arch, Lora.of(staged.config))
    assert staged.architecture(arch, 2) == plain.architecture(arch, 1)
    assert staged.architecture(arch, 2) != plain.architecture(arch, 2)


def test_factors_are_aggregated_where_there_are_some():
    model, arch = build()
    tuning = lora(slora_rounds=1)
    weights = weights_of(model)
    assert isinstance(tuning.aggregator(tuning.architecture(arch, 1), weights, 8), Sums)
    with_factors = tuning.architecture(arch, 2)
    state, _ = tuning.prepare(weights, with_factors, 2, weights)
    assert isinstance(tuning.aggregator(with_factors, dict(state), 8), LoraSums)


@pytest.mark.parametrize("changes", [{"aggregation": "median"}, {"clip_norm": 1.0}])
def test_no_change_is_multiplied_where_something_bounds_it(changes):
    assert Components(RunConfig()).takes_steps
    assert not Components(RunConfig(**changes)).takes_steps
    assert not Components(RunConfig(tuning="lora")).takes_steps


@pytest.mark.parametrize(
    "key,value", [("slora_rounds", 1), ("lora_adapter", "somewhere"), ("lora_ranks", "2")]
)
def test_options_of_factors_are_refused_where_nobody_reads_them(key, value, module):
    module.learning_rate = lambda kind, factor, options: options.lr
    for name in ("full", "mine.tuning"):
        with pytest.raises(ConfigError, match=f"belongs to tuning = 'lora', not '{name}'"):
            checked_options(RunConfig(tuning=name, **{key: value}))
