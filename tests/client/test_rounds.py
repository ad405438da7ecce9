"""A client's round, step by step: what is asked of whom, and what training is given."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2ft_fl.budgets.budget import Budget, ClientDescription
from d2ft_fl.client import trainer
from d2ft_fl.client.trainer import ClientTrainer
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.probe_costs import Probes
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.rounds.messages import encode_assignment
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.parameter_cache import ParameterCache
from tests.client.test_trainer import first_message, first_work


@pytest.mark.parametrize(
    "budgets,on_device,expected",
    [("devices", None, False), ("devices", True, True), ("measured", None, True)],
)
def test_budgets_are_of_this_device_where_that_is_said_or_they_are_measured(
    quick, budgets, on_device, expected
):
    said = {} if on_device is None else {"on_device": on_device}
    assert ClientTrainer(quick(budgets=budgets), **said).on_device is expected


def test_a_trainer_cleans_its_cache_and_warms_its_device(quick, monkeypatch):
    done = []
    monkeypatch.setattr(ParameterCache, "prune", lambda self: done.append("pruned"))
    monkeypatch.setattr(trainer, "warm_up", done.append)
    client = ClientTrainer(quick())
    assert done == ["pruned"]
    assert client.model is client.model
    assert done == ["pruned", torch.device("cpu")]


def test_a_report_is_of_the_client_and_round_that_it_is_asked_for(quick, monkeypatch):
    client, asked = ClientTrainer(quick(train_examples=100)), []
    monkeypatch.setattr(client, "budgets", lambda *of: asked.append(of) or Budget())
    found = client.report(2, 5)
    assert asked == [(ClientDescription(client=2, examples=25, clients=4), 5)]
    assert (found.client, found.examples) == (2, 25)
    assert {"model", "data"} <= vars(client).keys()  # no round waits for them


@pytest.mark.parametrize(
    "error,reason",
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(" \n"), "ValueError: no message"),
        (RuntimeError(), "RuntimeError: no message"),
    ],
)
def test_a_failure_is_a_reply_of_one_line(quick, monkeypatch, error, reason):
    client = ClientTrainer(quick())

    def fails(*_):
        raise error

    monkeypatch.setattr(client, "_answer", fails)
    assert client.answer(b"") == ({}, {"error": reason})


def test_a_message_is_worked_on_with_the_threads_that_clients_have(quick, monkeypatch):
    config, seen = quick(threads_per_client=2), []
    message, client = first_message(config), ClientTrainer(config)
    monkeypatch.setattr(trainer, "set_threads", seen.append)
    _, reply = wire.decode(client.work(message))
    assert seen == [2]
    assert (reply["round"], reply["client"]) == (1, 0)
    _, same = wire.decode(client.work(message, asked=(1, 0)))
    assert same["used"]["flops"] == reply["used"]["flops"] > 0  # of this message alone
    _, refused = wire.decode(client.work(message, asked=(1, 1)))
    assert "a message of round 1 for client 0 came in round 1 for client 1" in refused["error"]


PROBED = {"backward_score": "fisher", "data_selection": "entropy", "data_share": 0.5}


@pytest.mark.parametrize(
    "changes",
    [
        PROBED,
        {"upload_bits": 4, "download_bits": 8},
        {"tuning": "lora", "lora_rank": 2},
    ],
    ids=str,
)
def test_a_model_at_hand_is_as_good_as_slices_that_come(quick, changes):
    """To the bit, and counted as if they had come."""
    config = quick(train_examples=40, **changes)
    federation, state, work = first_work(config)
    operations = work.schedule.operations.copy()
    operations[:, 1, 2:] = operations[:, 4, 1] = Operation.SHORTCUT
    work = replace(work, schedule=Schedule(operations))
    client = ClientTrainer(config)
    replies = []
    for weights in (None, state.weights, None, state.weights):
        message = encode_assignment(federation, state, work, shared=weights is not None)
        tensors, reply = client.answer(message, weights)
        assert "error" not in reply, reply["error"]
        used = {name: value for name, value in reply.pop("used").items() if name != "seconds"}
        del used["training"]
        replies.append(({name: t.clone() for name, t in tensors.items()}, reply, used))
    (first, reply, used), *others = replies
    for tensors, *rest in others:
        assert rest == [reply, used]
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensor, first[name]) for name, tensor in tensors.items())


def test_a_model_at_hand_is_laid_out_once_for_its_architecture_and_bits(quick, monkeypatch):
    client, laid_out, gone = ClientTrainer(quick()), [], []
    of = SimpleNamespace(of=lambda *asked: laid_out.append(asked) or object())
    monkeypatch.setattr(trainer, "Arriving", of)
    monkeypatch.setattr(client.model, "let_go", lambda: gone.append(len(laid_out)))
    arch, weights = client.model.arch, {"of": "one"}

    def lay_out(arch, weights, bits):
        job = SimpleNamespace(arch=arch, costs=SimpleNamespace(bits_down=bits))
        return client._lay_out(job, weights)

    one, few = lay_out(arch, weights, 32), lay_out(arch, weights, 8)
    assert one is not few
    assert lay_out(arch, weights, 32) is one
    assert lay_out(arch, weights, 8) is few
    other, tuned = {"of": "other"}, replace(arch, rank=1)
    assert lay_out(arch, other, 32) is not one
    assert lay_out(tuned, other, 32) is not lay_out(arch, other, 32)
    asked = [
        (arch, weights, 32),
        (arch, weights, 8),
        (arch, other, 32),
        (tuned, other, 32),
        (arch, other, 32),
    ]
    assert [found[2] for found in laid_out] == [found[2] for found in asked]
    assert all(f[0] is a[0] and f[1] is a[1] for f, a in zip(laid_out, asked, strict=True))
    assert gone == [0, 2, 3, 4]  # before another model or architecture comes


def test_rates_follow_the_round_and_the_policy(quick):
    config = quick(rounds=4, lr_schedule="linear", lr=1.0, head_lr=2.0, lora_lr=4.0)
    policy = ExecutionPolicy(rate=0.25, batch=5, micro_batches=2)
    message = SimpleNamespace(round=3, policy=policy)
    found = ClientTrainer(config)._training_options(message)
    assert (found.lr, found.head_lr, found.lora_lr) == (0.125, 1.0, 0.5)
    assert (found.batch_size, found.micro_batches) == (5, 2)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_is_tuned_anew_where_something_else_trains(quick, monkeypatch, lora):
    """Factors are multiplied out, which counts."""
    options = {"tuning": "lora", "lora_aggregation": "alternate"} if lora else {}
    client = ClientTrainer(quick(**options))
    model, done = client.model, []
    monkeypatch.setattr(model, "tune", lambda arch: done.append(("tuned", arch)))
    monkeypatch.setattr(model, "reset", lambda *of: done.append(("reset", of)))
    monkeypatch.setattr(client.meter, "count", lambda step: done.append("counted") or step())
    reset = ("reset", ("schedule", "source", "offsets"))
    policy = ExecutionPolicy(tokens=7)
    for arch, tuned in ((model.arch, []), (replace(model.arch), ["tuned"])):
        done.clear()
        message = SimpleNamespace(policy=policy, schedule="schedule")
        job = SimpleNamespace(arch=client._federation.at(1).arch if lora else arch, message=message)
        expected = [("tuned", job.arch)] if lora or tuned else []
        client._load(job, "source", "offsets", client.options)
        assert done == expected + (["counted"] if lora else []) + [reset]
        assert model.tokens == 7


@pytest.mark.parametrize("owns", [False, True])
def test_a_plan_is_held_against_the_budget_it_came_with_or_the_clients_own(
    quick, monkeypatch, owns
):
    client = ClientTrainer(quick(), owns_budget=owns)
    own, theirs = Budget.from_mapping({"flops": 5}), Budget.from_mapping({"flops": 7})
    monkeypatch.setattr(client, "_budget", lambda *of: own if of == (2, 3) else None)
    message = SimpleNamespace(client=2, round=3, budget=theirs, keeps=("memory",))
    kept = [(theirs, ("memory",))]
    assert client._kept_budgets(message) == kept + ([(own, RESOURCES)] if owns else [])
    message.budget = None
    assert client._kept_budgets(message) == [(own, RESOURCES if owns else ("memory",))]


@pytest.mark.parametrize("quantizes", [False, True])
def test_changes_are_rounded_by_draws_of_the_clients_round(quick, monkeypatch, quantizes):
    client, asked = ClientTrainer(quick(seed=9)), []

    def changes(before, trained, seed):
        asked.append((before, dict(trained), seed))
        return {"weight": "change"}

    job = SimpleNamespace(
        message=SimpleNamespace(client=2, round=3),
        quantizes_changes=quantizes,
        quantized_changes=changes,
        as_sent_down=lambda values: {"weight": ("sent", values)},
        taken_from=lambda whole: {"weight": ("taken", whole)},
    )
    monkeypatch.setattr(client, "_values", lambda: "values")
    sent = ("sent", "values"), ("taken", "whole")
    assert client._sent_down(job, None) == ({"weight": sent[0]} if quantizes else {})
    assert client._sent_down(job, "whole") == ({"weight": sent[1]} if quantizes else {})

    after = {"weight": "new", "bias": "other"}
    monkeypatch.setattr(client, "_train", lambda *of: asked.append(of) or (0.5, dict(after)))
    found = client._train_and_pack(job, "options", "chosen", {"weight": "old"})
    assert asked[0] == (job.message, "options", "chosen", ["old"])
    assert asked[1:] == ([({"weight": "old"}, after, (9, 3, 2))] if quantizes else [])
    assert found == (0.5, after | {"weight": "change"} if quantizes else after)


@pytest.mark.parametrize(
    "examples,slots,every_slot",
    [(20, 4, True), (20, 5, False), (16, 8, True), (16, 9, False), (17, 2, False), (7, 7, True)],
)
def test_training_is_given_what_the_message_says(quick, monkeypatch, examples, slots, every_slot):
    """In batches of eight, two epochs; whether the last batch has an example for every slot."""
    client, seen = ClientTrainer(quick(seed=9, epochs=2, batch_size=8)), {}

    def spy(model, batches, task, options, rate, meter, beside, every_slot):
        seen.update(every_slot=every_slot, batches=list(batches), seed=torch.initial_seed())
        assert (model, task) == (client.model, client.components.task)
        assert (options, meter, beside) == (client.options, client.meter, ["other"])
        assert rate == client.rate
        torch.rand(3)
        return 0.25

    monkeypatch.setattr(trainer, "train", spy)
    schedule = SimpleNamespace(slots=slots)
    message = SimpleNamespace(
        client=2, round=3, examples=examples, calibrates=False, schedule=schedule
    )
    chosen, before = np.arange(30)[::-1][:examples], torch.get_rng_state()
    loss, trained = client._train(message, client.options, chosen, ["other"])
    assert torch.equal(before, torch.get_rng_state())
    assert (loss, seen["every_slot"]) == (0.25, every_slot)
    assert trained.keys() == client.model.update().keys()
    assert seen["seed"] == int(np.random.default_rng([9, 3, 2]).integers(2**62))
    expected = [
        client.examples.batch(2, epoch[start : start + 8])
        for epoch in client.examples.epochs(2, 3, chosen)
        for start in range(0, examples, 8)
    ]
    assert len(seen["batches"]) == len(expected)
    for found, batch in zip(seen["batches"], expected, strict=True):
        assert torch.equal(found.inputs, batch.inputs)
        assert torch.equal(found.targets, batch.targets)


class Probing:
    """What probes a model, as far as a client sees it."""

    def __init__(self, *given):
        Probing.given, Probing.seen = given, {}

    def entropy(self, batches, temperature):
        """Two neighbouring examples are equally uncertain, fourteen after the last two."""
        Probing.seen |= {"sizes": [len(batch) for batch in batches], "temperature": temperature}
        return np.arange(30) // 2 % 7 / 7

    def scores(self, batch, task, kinds):
        """One number a kind."""
        Probing.seen |= {"targets": batch.targets.tolist(), "task": task}
        return {kind: np.full((2, 3), 0.5) for kind in kinds}


@pytest.mark.parametrize("viewed", [0, 30])
def test_the_most_uncertain_examples_are_trained_on_and_the_first_of_them_scored(
    quick, monkeypatch, viewed
):
    """Of 30 those whose half is 6 modulo 7: 12, 13, 26 and 27; then comes the first with 5."""
    client = ClientTrainer(quick(selection_temperature=0.5))
    monkeypatch.setattr(trainer, "ProbeRunner", Probing)
    probes = Probes(scored=2, viewed=viewed, kinds=("fisher", "taylor"))
    message = SimpleNamespace(client=1, examples=5, probes=probes, policy=ExecutionPolicy(batch=8))
    job = SimpleNamespace(message=message, arch="tuned")
    asked = np.array([7, 3, 1, 4, 9])
    chosen, scores = client._probe(job, "tensors", asked)
    arch = client._federation.arch
    assert Probing.given[1] is arch
    assert Probing.given[0] is client.model
    assert Probing.given[2:] == ("tuned", "tensors", client.options, client.meter)
    expected = [12, 13, 26, 27, 10] if viewed else asked.tolist()
    assert chosen.tolist() == expected
    if viewed:
        assert Probing.seen["sizes"] == [8, 8, 8, 6]
        assert Probing.seen["temperature"] == 0.5
    first = client.examples.batch(1, np.array(expected[:2]))
    assert Probing.seen["targets"] == first.targets.tolist()
    assert Probing.seen["task"] is client.components.task
    assert scores.keys() == {TENSOR + "fisher", TENSOR + "taylor"}
    for tensor in scores.values():
        assert tensor.tolist() == [[0.5] * 3] * 2
        assert tensor.dtype == torch.float32
