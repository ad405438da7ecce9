"""What a client does with a message, and in which order."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.budgets.process_memory import told
from d2ft_fl.client import refusals, trainer
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


def first_work(config):
    """Return federation and state of a configuration's first round, and its first assignment."""
    components = Components(config)
    adapter = build_adapter(components.model_spec)
    federation = Federation(components, adapter.describe()).at(1)
    original = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    state = federation.prepared(State(0, original), original)
    plan = plan_round(federation, state, reports_of(config))
    return federation, state, plan.working[0]


def first_message(config):
    """Return the first message of a configuration's first round."""
    return encode_assignment(*first_work(config))


def test_free_memory_is_read_when_the_model_is_there(quick, monkeypatch):
    config = quick()
    message, client, seen = first_message(config), ClientTrainer(config), []

    def free_memory(device):
        seen.append("model" in vars(client))
        return 2**40

    monkeypatch.setattr(refusals, "free_memory", free_memory)
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


def on_device(config, monkeypatch, resident, budget):
    """A trainer on a device whose process has so much, with a budget of its own."""
    monkeypatch.setattr(trainer, "resident", lambda: resident)
    client = ClientTrainer(config, on_device=True)
    monkeypatch.setattr(client, "budgets", lambda *_: Budget.from_mapping(budget))
    return client


def test_a_device_refuses_by_what_its_process_takes(quick, monkeypatch, tmp_path):
    """Whatever the server planned with; what the process takes is measured, not told."""
    path = tmp_path / "any.toml"
    path.write_text("[classes.a]\n")
    config = quick(budgets=str(path))
    message = first_message(config)
    _, reply = on_device(config, monkeypatch, 0, {"memory": 1}).answer(message)
    whole = int(reply["error"].split("needs ")[1].split(" ")[0])
    assert 0.5 * full_memory(config) < whole <= full_memory(config)
    for spare, fits in ((0, True), (-1, False)):
        budget = {"memory": 400 * 2**20 + whole + spare}
        client = on_device(config, monkeypatch, 400 * 2**20 + len(message), budget)
        _, reply = client.answer(message)
        assert ("error" not in reply) == fits
    assert f"beside the {400 * 2**20} bytes that the process takes" in reply["error"]
    # Of tensors, the same amount is more than enough.
    client = on_device(config, monkeypatch, 10**12, {"memory": whole, "memory-of": "tensors"})
    assert "error" not in client.answer(message)[1]


def full_memory(config):
    """What the cost model says that a client's whole training takes."""
    components = Components(config)
    federation = Federation(components, build_adapter(components.model_spec).describe())
    (report, *_) = reports_of(config)
    return federation.full_cost(report.examples, report.budget).memory


def test_a_device_measures_its_process_before_its_first_round_alone(quick, monkeypatch):
    """What tensors of former rounds left behind is no part of it."""
    config = quick(strategy="fedavg", transport="message")
    client = on_device(config, monkeypatch, 400 * 2**20, {"memory": "4 GiB"})
    first = client.report(0, 1).budget
    monkeypatch.setattr(trainer, "resident", lambda: 2**40)
    assert client.report(0, 2).budget == first
    model = sum(p.numel() * 4 for p in client._adapter.model.parameters())
    assert first.memory_base == told(400 * 2**20 + 3 * model)
    assert first.of_process


def test_a_process_budget_of_a_simulation_needs_what_it_takes(quick, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[classes.a]\nmemory = '2 GiB'\nmemory-of = 'process'\n")
    client = ClientTrainer(quick(budgets=str(path)))
    with pytest.raises(ConfigError, match="a: memory-of = 'process' needs memory-base"):
        client.report(0, 1)
    path.write_text(path.read_text() + "memory-base = '448 MiB'\n")
    assert ClientTrainer(quick(budgets=str(path))).report(0, 1).budget.memory_base == 448 * 2**20
