"""Hostile clients and servers: what is said wrongly is refused, and stops nobody.

Real messages with one to three fields changed (:mod:`tests.rounds.hostile`, which says of each
change what may become of it). The whole is ``pytest -s -m slow tests/rounds/test_hostile.py``,
which prints how many were refused.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from d2ft_fl.client.trainer import ClientTrainer
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.probe_costs import round_cost
from d2ft_fl.models.build import build_adapter
from d2ft_fl.records.round_line import round_line
from d2ft_fl.rounds.checks import checked
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import plan_round
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.messages import encode_assignment
from d2ft_fl.server.replies import RoundReplies
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.parameter_cache import ParameterCache
from tests.conftest import reports_of
from tests.rounds import hostile

SHARED = {
    "clients": 3, "rounds": 2, "train_examples": 60, "test_examples": 20, "partitioner": "Iid",
    "partitioner_args": "", "transport": "message", "score_every": 1,
}  # fmt: skip
SCENES = {
    "two slots, scores": {"slots": 2, "score_examples": 2},
    "compensated, 8 bits": {
        "compensation": True, "upload_bits": 8, "download_bits": 8, "backward_score": "magnitude",
        "forward_score": "magnitude",
    },
    "LoRA of several ranks, weights cached": {
        "tuning": "lora", "lora_aggregation": "product", "lora_rank": 4, "lora_ranks": "2",
        "backward_score": "uniform", "forward_score": "uniform",
    },
}  # fmt: skip


@dataclass
class OneRound:
    """A round as it was: what was sent and what came back."""

    stage: Federation
    state: State
    plan: object
    messages: dict[int, bytes]
    replies: dict[int, bytes]

    def fold(self):
        return RoundReplies(self.stage, self.state, self.plan)

    def outcome(self, replies):
        """The state after some replies, every client's line, and the round's."""
        fold = self.fold()
        for client, blob in replies.items():
            fold.add(client, blob)
        state, records = fold.finish()
        lines = {r.client: r.line(self.plan.round) for r in records}
        return state, lines, round_line(self.stage, state, self.plan, records, None, 1.0)


class Untrained(ClientTrainer):
    """A client that does all but train; it owns its budget."""

    def _train_and_pack(self, job, options, chosen, sent_down):
        self.job = job
        return 1.0, {}


@dataclass
class Scene:
    """Two rounds of a federation, and a client whose files are in a folder of its own."""

    config: RunConfig
    rounds: list[OneRound]
    client: Untrained
    folder: object
    local: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, options, folder):
        config = checked(RunConfig(**SHARED, **options))
        adapter = build_adapter(Components(config).model_spec)
        federation = Federation(Components(config), adapter.describe())
        original = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
        store = ParameterCache(folder / "1" / "2" / "3" / "store")
        worker, client = ClientTrainer(config), Untrained(config, owns_budget=True)
        worker.store = client.store = store
        reports, state, rounds = reports_of(config), State(0, original), []
        for number in (1, 2):
            stage = federation.at(number)
            state = stage.prepared(state, original)
            plan = plan_round(stage, state, reports)
            budgets = {c.client: c.budget for c in plan.clients}
            messages = {
                a.client: encode_assignment(stage, state, a, budgets[a.client])
                for a in plan.working
            }
            replies = {c: worker.work(m, asked=(number, c)) for c, m in messages.items()}
            rounds.append(OneRound(stage, state, plan, messages, replies))
            state = rounds[-1].outcome(replies)[0]
        return cls(config, rounds, client, folder, {r.client: r.examples for r in reports})

    def others(self, which, number, client):
        """Real messages beside a client's."""
        here, there = (getattr(self.rounds[n], which) for n in (number, 1 - number))
        return hostile.Others(
            [wire.decode(blob) for other, blob in here.items() if other != client],
            [wire.decode(blob) for other, blob in there.items() if other == client],
            self.local[client],
        )

    def files(self):
        return {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", params=SCENES)
def scene(request, tmp_path_factory):
    return Scene.of(SCENES[request.param], tmp_path_factory.mktemp("hostile"))


def draws(scene, which, changes, count, seed):
    """Yield changed messages: number of the round, client, message, changes.

    About half of them have one change, each in turn; the others have one to three, or are noise.
    """
    draw = np.random.default_rng(seed)
    meaning = [change for change in changes if change.well_formed]
    alone = [change for _ in range(max(1, count // (2 * len(changes)))) for change in changes]
    kept, made, tries = {}, 0, 0
    while made < count:
        number = int(draw.integers(len(scene.rounds)))
        messages = getattr(scene.rounds[number], which)
        client = int(draw.choice(list(messages)))
        if (number, client) not in kept:
            kept[number, client] = scene.others(which, number, client)
        others, kind = kept[number, client], draw.random()
        if alone:
            found = hostile.changed(draw, messages[client], alone[-1:], others)
            tries += 1
            if found or tries == 8:  # not every scene has every field
                alone.pop()
                tries = 0
        elif kind < 0.08:
            noise = hostile.Change("bytes", None, False)
            found = hostile.broken(draw, messages[client]), [noise]
        else:
            among = meaning if kind < 0.7 else changes
            found = hostile.changed(draw, messages[client], among, others)
        if found:
            made += 1
            yield number, client, *found


def allowed(made):
    """What may become of a message with these changes; None where it must be refused."""
    if any(change.may is None for change in made):
        return None
    return frozenset().union(*(change.may for change in made))


def check_numbers(value):
    """Every number in what is written is finite."""
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            check_numbers(inner)
        assert not isinstance(inner, float) or math.isfinite(inner)


def check_line(line, clean, may, length):
    """A client's line is as without the changes, but for what it may say of itself."""
    assert json.loads(write_json(line)) == line
    check_numbers(line)
    same = dict(clean) | {key: line[key] for key in may - {hostile.MODEL}}
    if "used" not in may:  # the answer may be longer or shorter
        same |= {"used": clean["used"] | {"bytes_up": length}, "seconds": line["seconds"]}
    assert line == same


def attack_with_replies(scene, count, seed):
    """Feed changed replies to the server; return how many of which kind were refused."""
    counts, wrong = Counter(), []
    clean = [one.outcome(one.replies) for one in scene.rounds]
    folds = [one.fold() for one in scene.rounds]
    for number, client, blob, made in draws(scene, "replies", hostile.REPLIES, count, seed):
        one, fold, may = scene.rounds[number], folds[number], allowed(made)
        pending = fold.outcomes.pending[client]
        fold.add(client, blob)
        failure = fold.outcomes.records.pop(client).failure
        kind = "well-formed" if all(c.well_formed for c in made) else "malformed"
        counts[kind] += 1
        if failure:
            counts[f"{kind}, refused"] += 1
            assert "\n" not in failure
            assert len(failure) <= 300
            fold.outcomes.pending[client] = pending  # it may try again
            continue
        folds[number] = one.fold()
        if may is None:
            wrong.append([c.name for c in made])
            continue
        state, lines, row = one.outcome(one.replies | {client: blob})
        check_line(lines[client], clean[number][1][client], may, len(blob))
        check_numbers(row)
        assert all(lines[c] == clean[number][1][c] for c in lines if c != client)
        for name, tensor in state.weights.items():
            assert tensor.isfinite().all()
            assert hostile.MODEL in may or torch.equal(tensor, clean[number][0].weights[name])
    for number, fold in enumerate(folds):  # nothing of what was refused is left
        for client, blob in scene.rounds[number].replies.items():
            fold.add(client, blob)
        state, records = fold.finish()
        assert not any(record.failure for record in records)
        weights = clean[number][0].weights
        assert all(torch.equal(state.weights[n], tensor) for n, tensor in weights.items())
    return counts, wrong


def within_budget(scene, number, client, job):
    """Whether what a client began keeps the budget that it reported, by the plan's cost model."""
    message = job.message
    cost = round_cost(job.costs, message.schedule, message.examples, message.probes, message.cached)
    of_client = {c.client: c for c in scene.rounds[number].plan.clients}[client]
    return bool((cost.vector() <= of_client.capacity).all())


def attack_with_assignments(scene, count, seed):
    """Give changed assignments to a client; return how many of which kind were refused."""
    counts, wrong = Counter(), []
    before = scene.files()
    for number, client, blob, made in draws(scene, "messages", hostile.ASSIGNMENTS, count, seed):
        tensors, reply = scene.client.answer(blob, asked=(number + 1, client))
        json.loads(write_json(reply), parse_constant=pytest.fail)
        kind = "well-formed" if all(c.well_formed for c in made) else "malformed"
        counts[kind] += 1
        if "error" in reply:
            counts[f"{kind}, refused"] += 1
            assert not tensors
            assert "\n" not in reply["error"]
            assert reply["error"].startswith(("Refusal: ", "ReplyError: ", "ConfigError: ")), (
                reply["error"], [c.name for c in made],
            )  # fmt: skip
        elif allowed(made) is None or not within_budget(scene, number, client, scene.client.job):
            wrong.append([c.name for c in made])
    after = scene.files()
    assert {path: after.get(path) for path in before} == before
    for path in after.keys() - before.keys():
        assert path.parent.parent == scene.client.store.folder
        assert len(path.stem) == 16
    return counts, wrong


def check(counts, wrong, what):
    total = counts["well-formed"] + counts["malformed"]
    refused = counts["well-formed, refused"] + counts["malformed, refused"]
    print(
        f"\n{total} {what}, {counts['well-formed']} of them well-formed: {refused} refused "
        f"({counts['well-formed, refused']} well-formed), {total - refused} accepted, "
        f"{len(wrong)} of these wrongly"
    )
    assert wrong == []
    assert counts["malformed, refused"] == counts["malformed"]
    assert counts["well-formed"] >= total / 2


def test_real_messages_are_accepted(scene):
    """Else all that is refused here would say nothing."""
    for number, one in enumerate(scene.rounds):
        _, lines, _ = one.outcome(one.replies)
        assert not any(line["fault"] for line in lines.values())
        for client, blob in one.messages.items():
            assert "error" not in scene.client.answer(blob, asked=(number + 1, client))[1]


def test_of_changed_replies_none_is_accepted_wrongly_and_none_is_fatal(scene):
    check(*attack_with_replies(scene, len(hostile.REPLIES) + 30, 0), "replies")


def test_of_changed_assignments_none_is_accepted_wrongly_and_none_is_fatal(scene):
    check(*attack_with_assignments(scene, len(hostile.ASSIGNMENTS) + 20, 0), "assignments")


@pytest.mark.slow
def test_of_two_thousand_replies_and_a_thousand_assignments_none_is_accepted_wrongly(
    tmp_path_factory,
):
    for what, attack, count in (
        ("replies", attack_with_replies, 2000),
        ("assignments", attack_with_assignments, 1000),
    ):
        counts, wrong = Counter(), []
        for place, options in enumerate(SCENES.values()):
            scene = Scene.of(options, tmp_path_factory.mktemp("hostile"))
            share = count // len(SCENES) + (place < count % len(SCENES))
            found, more = attack(scene, share, 1 + place)
            counts += found
            wrong += more
        check(counts, wrong, what)
