"""What a client does with a message, and in which order."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from d2ft_fl.client import trainer
from d2ft_fl.client.trainer import ClientTrainer
from d2ft_fl.data.labels import digest_of
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import plan_round
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.messages import encode_assignment
from tests.conftest import reports_of
from tests.data.files import class_folders


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


def test_copying_values_does_not_count_as_training(quick, monkeypatch):
    config = quick(upload_bits=8)
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


def test_a_node_whose_classes_are_others_says_which_it_has(quick, tmp_path):
    class_folders(tmp_path, ("cat", "dog"))
    other = quick(dataset=str(tmp_path), clients=1, partitioner="Iid", partitioner_args="")
    client = ClientTrainer(other)
    client.check_classes(digest_of(("cat", "dog")))
    client.check_classes("")  # where there is nothing to compare
    for names in (("dog", "cat"), ("bird", "cat", "dog")):
        with pytest.raises(ConfigError, match=r"have the classes 'cat', 'dog', which are not"):
            client.check_classes(digest_of(names))
    listing = ClientTrainer(replace(other, classes="bird, cat, dog"))
    listing.check_classes(digest_of(("bird", "cat", "dog")))
    assert listing.data.train.labels.max() == 2


def test_a_loss_that_is_not_finite_says_so_with_the_rates(quick, monkeypatch):
    config = quick(strategy="fedavg", clients=1, rounds=1)
    message, client = first_message(config), ClientTrainer(config)
    monkeypatch.setattr(trainer, "train", lambda *a, **k: float("nan"))
    _, meta = client.answer(message)
    assert meta["error"] == (
        "Divergence: the loss of client 0 is not finite: training diverges at "
        f"lr = {config.lr:g}, head-lr = {config.head_lr:g}"
    )
