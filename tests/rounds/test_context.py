"""The pure round: folding good and bad replies, and one round against Flower's own FedAvg."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from d2ft_fl.client.trainer import ClientTrainer
from d2ft_fl.errors import RunError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.rounds.checks import checked
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import Round, plan_round
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.messages import encode_assignment
from d2ft_fl.server.replies import RoundReplies
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.wire import blob as wire
from tests.conftest import learning_rate, reports_of

FISHER = TENSOR + "fisher"


def first_round(config):
    """State, pool, plan and blobs of a configuration's first round."""
    model = build_adapter(Components(config).model_spec).model
    federation = Federation(Components(config), TimmViT(model).describe())
    state = State(0, {n: p.detach().clone() for n, p in model.named_parameters()})
    plan = plan_round(federation, state, reports_of(config))
    worker = ClientTrainer(config)
    replies = {a.client: worker.work(encode_assignment(federation, state, a)) for a in plan.working}
    return federation, state, plan, replies


@pytest.fixture(scope="module")
def round_one():
    from d2ft_fl.config.run_config import RunConfig

    config = RunConfig(
        clients=4, train_examples=80, partitioner="Iid", partitioner_args="", slots=2,
        score_examples=2,
    )  # fmt: skip
    return first_round(config)


def folded(round_one, replies):
    federation, state, plan, _ = round_one
    fold = RoundReplies(federation, state, plan)
    for client, blob in replies:
        fold.add(client, blob)
    return fold.finish()


def test_the_order_of_replies_does_not_matter(round_one):
    replies = list(round_one[3].items())
    one, _ = folded(round_one, replies)
    other, _ = folded(round_one, replies[::-1])
    assert all(torch.equal(one.weights[n], other.weights[n]) for n in one.weights)
    assert list(one.scores.means) == ["fisher"]
    assert np.array_equal(one.scores.means["fisher"], other.scores.means["fisher"])


@pytest.mark.parametrize("attack", ["sign-flip", "alie"])
def test_memory_of_an_attackers_reply_may_be_used_again_and_its_faults_are_its_own(attack):
    from d2ft_fl.config.run_config import RunConfig

    config = RunConfig(
        clients=4, train_examples=80, partitioner="Iid", partitioner_args="", score_examples=2,
        hostile_share=0.5, hostile_attack=attack,
    )  # fmt: skip
    federation, state, plan, replies = first_round(config)
    hostile = [client for client in replies if config.hostile(client)]
    weights = []
    for reused in (False, True):
        fold = RoundReplies(federation, state, plan)
        for client, blob in replies.items():
            room = bytearray(blob)
            fold.add(client, memoryview(room) if reused else blob)
            room[:] = bytes(len(room))
        fold.complete()
        weights.append(fold.finish()[0].weights)
    assert len(hostile) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    fold = RoundReplies(federation, state, plan)
    for client, blob in replies.items():
        fold.add(client, b"no reply" if client == hostile[0] else blob)
    fold.add(hostile[1], replies[hostile[1]])  # once more
    fold.complete()
    _, records = fold.finish()
    assert [record.client for record in records if record.failure] == [hostile[0]]
    assert len(fold.outcomes.strays) == 1


def test_what_a_way_says_of_a_clients_examples_and_change_counts_in_the_mean(round_one):
    """The classifier, which everybody trains, by hand from what clients sent."""
    federation, state, plan, replies = round_one
    policies = {
        0: (3.0, 1.25),
        1: (0.5, 1.0),
        2: (1.0, 1.5),
        3: (2.0, 1.0),
    }  # of each: weight, step
    assignments = [
        replace(
            a, policy=replace(a.policy, weight=policies[a.client][0], step=policies[a.client][1])
        )
        for a in plan.assignments
    ]
    after, _ = folded(
        (federation, state, replace(plan, assignments=assignments), replies), replies.items()
    )
    old = state.weights["head.weight"].double()
    top, bottom = torch.zeros_like(old), 0
    for a in plan.working:
        weight, step = policies[a.client]
        examples = sum(round(n * weight) for n in federation.costs.slot_totals(a.examples))
        top += examples * step * (wire.decode(replies[a.client])[0]["head.weight"].double() - old)
        bottom += examples
    assert len(plan.working) > 1
    torch.testing.assert_close(after.weights["head.weight"].double(), old + top / bottom)


def test_used_is_measured_and_within_the_budget(round_one):
    _, records = folded(round_one, round_one[3].items())
    for record in records:
        assert record.failure is None
        assert record.used.flops == record.predicted.flops
        assert record.used.bytes_up == len(round_one[3][record.client])
        assert (record.used.vector() <= record.allowed).all()
        assert (record.used.vector() > 0).all()


def tampered(blob, change):
    tensors, meta = wire.decode(blob)
    change(tensors, meta)
    return wire.encode(tensors, meta)


def set_nan(tensors, meta):
    tensors["head.bias"][0] = float("nan")


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda t, m: t.pop("head.weight"), "'head.weight' is missing"),
        (lambda t, m: t.update({"head.bias": torch.zeros(3)}), "has shape"),
        (set_nan, "not finite"),
        (lambda t, m: t.update({"pos_embed": torch.zeros(1)}), "'pos_embed' was not assigned"),
        (lambda t, m: m.pop("used"), "incomplete or malformed"),
        (lambda t, m: m.update({"slot_examples": [1, 1]}), "trained on 2 examples, not"),
        (lambda t, m: m.update({"round": 7}), "an answer to round 7"),
        (lambda t, m: m.update({"loss": 1e308}), "loss 1e+308 is no number up to 1e+15"),
        (lambda t, m: m.update({"loss": float("inf")}), "loss None is no number"),
        (lambda t, m: m["used"].update(flops=True), "counts must be whole numbers"),
        (lambda t, m: m["used"].update(memory=2**63), "numbers that cannot be"),
        (lambda t, m: m["used"].update(seconds="inf"), "seconds are 00000000.000"),
        (lambda t, m: m.update({"device": "x"}), "it has other entries"),
        (lambda t, m: m.update({"error": "OSError: disk full"}), "OSError: disk full"),
        (lambda t, m: t.pop(FISHER), "fisher scores are missing"),
        (lambda t, m: t.update({FISHER: torch.full((6, 6), torch.inf)}), "not a finite"),
        (lambda t, m: t.update({FISHER: torch.ones(6, 5)}), "not a finite"),
        (lambda t, m: t.update({FISHER: torch.ones(6, 6).double()}), "not torch.float32"),
        (lambda t, m: t.update({FISHER: -torch.ones(6, 6)}), "fisher scores are negative"),
        (lambda t, m: t.update({TENSOR + "taylor": torch.ones(6, 6)}), "was not assigned"),
    ],
)
def test_a_bad_reply_is_left_out_counted_and_named(round_one, change, reason):
    replies = dict(round_one[3])
    scored = next(a.client for a in round_one[2].assignments if a.probes.scored)
    replies[scored] = tampered(replies[scored], change)
    state, records = folded(round_one, replies.items())
    assert reason in records[scored].failure
    assert [r.failure for r in records if r.client != scored] == [None] * 3
    without, _ = folded(round_one, [(c, b) for c, b in replies.items() if c != scored])
    assert all(torch.equal(state.weights[n], t) for n, t in without.weights.items())


def test_garbage_silence_and_a_second_answer_change_nothing(round_one):
    replies = list(round_one[3].items())
    state, records = folded(round_one, [*replies[:-1], (replies[-1][0], b"garbage")])
    assert "not a safetensors message" in records[replies[-1][0]].failure
    silent, records = folded(round_one, replies[:-1])
    assert records[replies[-1][0]].failure == "no answer"
    twice, _ = folded(round_one, [*replies[:-1], replies[0]])
    for name, tensor in silent.weights.items():
        assert torch.equal(state.weights[name], tensor)
        assert torch.equal(twice.weights[name], tensor)


def test_one_pass_measures_both_directions_kinds(quick):
    config = quick(backward_score="taylor", forward_score="gradient", verify_costs=True)
    one = first_round(checked(config))
    after, records = folded(one, one[3].items())
    assert sorted(after.scores.means) == ["gradient", "taylor"]
    who = [record.client for record in records if record.scored]
    assert len(who) >= 2
    for record in records:
        assert record.failure is None
        assert record.used.flops == record.predicted.flops
        assert record.used.bytes_up <= record.predicted.bytes_up
    for kind in ("gradient", "taylor"):
        found = [wire.decode(one[3][client])[0][TENSOR + kind] for client in who]
        assert {(t.dtype, *t.shape) for t in found} == {(torch.float32, 6, 6)}
        expected = sum(t / t.mean() for t in found) / len(found)  # 4 examples of each client
        np.testing.assert_allclose(after.scores.means[kind], expected, rtol=1e-5)
    now = Round(one[0], after, [])
    assert np.array_equal(now.backward_scores(), now.scores("taylor"))
    assert np.array_equal(now.forward_scores(), now.scores("gradient"))
    assert now.scores("magnitude").mean() == pytest.approx(1)


@pytest.mark.parametrize(
    "strategy,kind,message",
    [
        ("d2ft", "size", "'size' is unknown; use one of magnitude, fisher, gradient, taylor"),
        ("d2ft", "taylor", "nobody measures taylor scores in this run; name taylor in backward"),
        ("random", "fisher", "nobody measures fisher scores"),
    ],
)
def test_scores_that_nobody_measures_are_refused_in_one_line(quick, strategy, kind, message):
    config = quick(strategy=strategy)
    model = build_adapter(Components(config).model_spec).model
    state = State(0, {n: p.detach() for n, p in model.named_parameters()})
    now = Round(Federation(Components(config), TimmViT(model).describe()), state, [])
    with pytest.raises(RunError, match=message) as error:
        now.scores(kind)
    assert "\n" not in str(error.value)
    assert (now.scores("uniform") == 1).all()


def test_a_worker_turns_its_own_fault_into_an_answer(quick):
    _, meta = wire.decode(ClientTrainer(quick()).work(b"garbage"))
    assert meta["error"].startswith("ReplyError")


def follow(federation, schedule):
    """Have a federation's strategy decide by another function."""
    strategy = replace(federation.strategy, schedule=schedule)
    federation.components.__dict__["strategy"] = strategy  # in place of what is resolved once


def test_a_strategy_must_plan_everyone_and_keep_what_it_promises(quick):
    config = quick()
    federation, state, _, _ = first_round(config)
    reports = reports_of(config)
    follow(federation, lambda context: [])
    with pytest.raises(RunError, match="must give each client one assignment"):
        plan_round(federation, state, reports)
    spend = lambda r: [r.assign(c, r.everything()) for c in r.clients]  # noqa: E731
    follow(federation, spend)
    with pytest.raises(RunError, match="breaks the budget of client 0 in flops"):
        plan_round(federation, state, reports)


def test_what_a_strategy_raises_names_it(quick):
    federation, state, _, _ = first_round(quick())
    reports = reports_of(federation.config)

    def schedule(error):
        def fail(round_number):
            raise error

        follow(federation, fail)

    schedule(ValueError("no\nidea"))
    with pytest.raises(RunError, match=r"^strategy 'd2ft' raised ValueError in round 1: no$"):
        plan_round(federation, state, reports)
    schedule(RunError("as it is"))
    with pytest.raises(RunError, match=r"^as it is$"):
        plan_round(federation, state, reports)


@pytest.mark.parametrize("slots", [1, 5])
def test_one_fedavg_round_equals_flowers_own_fedavg(quick, slots, monkeypatch):
    """Same clients, seeds and batches; plain timm training; Flower's aggregation. Within 1e-6."""
    config = quick(strategy="fedavg", slots=slots, optimizer="sgd", lr=0.01, partitioner="Linear")
    federation, state, plan, replies = first_round(config)
    ours, _ = folded((federation, state, plan, replies), replies.items())

    for name in ("run_id", "node_id", "task_id"):  # Flower sets these in its own processes
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    worker = ClientTrainer(config)
    data = worker.data
    options, messages = Components(config).training, []
    for client in range(config.clients):
        model = build_adapter(Components(config).model_spec).model
        groups: dict = {}
        for name, p in model.named_parameters():
            kind = federation.arch.by_name[name].kind
            p.requires_grad_(kind is not Kind.EMBEDDING)
            if p.requires_grad:
                groups.setdefault(learning_rate(kind, False, options), []).append(p)
        optimizer = torch.optim.SGD(
            [{"params": ps, "lr": lr} for lr, ps in groups.items()], momentum=options.momentum
        )
        everyone = np.arange(len(data.partitions[client]))
        (order,) = worker.examples.epochs(client, 1, everyone)
        for batch in worker.examples.batches(client, order, options.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(data.partitions[client])}),
            }
        )
        asked = Message(RecordDict(), dst_node_id=client + 1, message_type="train")
        asked.metadata.__dict__["_message_id"] = str(client)
        messages.append(Message(content, reply_to=asked))
    arrays, _ = FedAvg().aggregate_train(1, messages)
    for name, expected in arrays.to_torch_state_dict().items():
        difference = (ours.weights[name] - expected).norm() / expected.norm()
        assert difference <= 1e-6, name
