"""What a client does with a message, and in which order."""

import re
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
from d2ft_fl.wire import blob as wire
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


def test_a_client_keeps_a_budget_of_its_own_whatever_the_plan_promises(quick, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[classes.small]\nflops = "1 %"\n')
    message = first_message(quick(strategy="fedavg", match="", budgets="devices"))
    tensors, meta = wire.decode(message)
    message = wire.encode(tensors, meta | {"keeps": []})
    config = quick(strategy="fedavg", budgets=str(own))
    assert "error" not in ClientTrainer(config).answer(message)[1]
    _, reply = ClientTrainer(config, owns_budget=True).answer(message)
    assert re.match(r"Refusal: the plan needs \d+ of flops, the budget allows \d+", reply["error"])


def test_a_message_that_came_for_somebody_else_is_refused(quick):
    config = quick()
    message, client = first_message(config), ClientTrainer(config)
    for asked in ((1, 1), (2, 0)):
        _, reply = client.answer(message, asked=asked)
        assert reply["error"].startswith("Refusal: a message of round 1 for client 0 came in round")


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


def test_training_that_diverges_says_so_with_its_rates(quick):
    config = quick(lr=1e30, head_lr=1e30, optimizer="sgd", strategy="fedavg")
    _, reply = ClientTrainer(config).answer(first_message(config))
    assert reply["error"] == (
        "Divergence: the loss of client 0 is not finite: training diverges at "
        "lr = 1e+30, head-lr = 1e+30"
    )


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda t, m: t["head.bias"].fill_(float("nan")), "weights that are not finite"),
        (lambda t, m: t["head.bias"].fill_(-float("inf")), "weights that are not finite"),
        (lambda t, m: m.update(examples=31), "of 31 examples, 0 to score and 0 to select from"),
        (lambda t, m: m.update(passes=[0, 29]), "0 to score and 29 to select from; there are 30"),
    ],
)
def test_what_no_budget_stops_is_refused_all_the_same(quick, change, reason):
    """FedAvg keeps no budget, so that its clients look at none."""
    config = quick(strategy="fedavg", backward_score="uniform", forward_score="uniform")
    tensors, meta = wire.decode(first_message(config))
    change(tensors, meta)
    _, reply = ClientTrainer(config).answer(wire.encode(tensors, meta))
    assert reply["error"].startswith("Refusal: ")
    assert reason in reply["error"]
