"""What a client does with a message, and in which order."""

from types import SimpleNamespace

import pytest

from d2ft_fl.client import trainer
from d2ft_fl.client.trainer import ClientTrainer
from d2ft_fl.models.build import build_adapter
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import plan_round
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.messages import encode_assignment
from tests.conftest import reports_of


def first_message(config):
    """Return the first message of a configuration's first round."""
    components = Components(config)
    adapter = build_adapter(components.model_spec)
    federation = Federation(components, adapter.describe())
    weights = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    state = State(0, weights)
    plan = plan_round(federation, state, reports_of(config))
    return encode_assignment(federation, state, plan.working[0])


def test_free_memory_is_read_when_the_model_is_there(quick, monkeypatch):
    config = quick()
    message, client, seen = first_message(config), ClientTrainer(config), []

    def free_memory(device):
        seen.append("model" in vars(client))
        return 2**40

    monkeypatch.setattr(trainer, "free_memory", free_memory)
    _, reply = client.answer(message)
    assert "error" not in reply
    assert seen == [True]


@pytest.mark.parametrize("options", [{"hostile_share": 1.0}, {"upload_bits": 8}])
def test_copying_values_does_not_count_as_training(quick, monkeypatch, options):
    config = quick(**options)
    message, client, now = first_message(config), ClientTrainer(config), [0.0]
    copy = client._values

    def slow():
        now[0] += 100
        return copy()

    monkeypatch.setattr(client, "_values", slow)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    _, reply = client.answer(message)
    assert float(reply["used"]["seconds"]) == 100
    assert float(reply["used"]["training"]) == 0
