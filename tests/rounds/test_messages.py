"""Messages to clients, field by field, of a small architecture made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_fl.aggregation.mean_compensation import MeanBook
from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.probe_costs import NO_PROBES, Probes
from d2ft_fl.errors import Refusal
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.rounds.messages import Message, encode_assignment
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.parameter_cache import digests, write
from d2ft_fl.wire.quantization import quantize_rows
from tests.aggregation.tiny import ARCH, EVERYTHING, FORWARD, FULL, SKIP, WEIGHTS, schedule

PART = schedule([[SKIP, FULL, FORWARD], [SKIP] * 3])
FIXED = replace(
    ARCH,
    parameters=tuple(replace(p, fixed=p.name.startswith("0.ask")) for p in ARCH.parameters),
)


def federation(arch=ARCH, **options):
    return Federation(Components(RunConfig(clients=5, rounds=9, **options)), arch)


def assigned(own=PART, **options):
    return Assignment(3, own, None, examples=17, **options)


def sent(stage, state, assignment, *arguments, **options):
    """Tensors and metadata of a message."""
    return wire.decode(encode_assignment(stage, state, assignment, *arguments, **options))


def changed(blob, **fields):
    """The message with other metadata."""
    tensors, meta = wire.decode(blob)
    return wire.encode(tensors, {**meta, **fields})


def test_a_message_says_what_is_to_be_done():
    policy = ExecutionPolicy(micro_batches=2, bits_up=8, weight=1.5, batch=6)
    own = assigned(policy=policy)
    tensors, meta = sent(stage := federation(), State(4, WEIGHTS), own)
    assert meta == {
        "round": 5,
        "client": 3,
        "operations": "000301000000",
        "shape": [1, 2, 3],
        "passes": [0, 0],
        "examples": 17,
        "way": [2, None, None, 8, None, False, 1.0, 1.5, 1.0, 6],
        "calibrate": False,
        "keeps": ["flops", "memory", "bytes_up", "bytes_down"],  # a deadline is the server's
    }
    assert set(tensors) == {n for n in WEIGHTS if not n.startswith("1.")}
    assert torch.equal(tensors["0.give.weight"], WEIGHTS["0.give.weight"][:, [1, 2, 5, 3, 4]].T)
    blob = encode_assignment(stage, State(4, WEIGHTS), own)
    message, came = Message.decode(blob, stage)
    assert (message.client, message.round, message.examples) == (3, 5, 17)
    assert (message.schedule.operations == PART.operations).all()
    assert (message.policy, message.probes, message.keeps) == (
        policy,
        NO_PROBES,
        stage.keeps[:4],
    )
    assert message.calibrates is False
    assert message.budget is message.cached is None
    assert message.digests == {}
    assert message.carried is message.schedule
    assert set(came) == set(tensors)
    assert message.whole_size(ARCH, {}, 32) == len(blob)


@pytest.mark.parametrize("finished,asked", [(0, True), (1, False), (3, True), (4, False)])
def test_clients_calibrate_in_every_third_round(finished, asked):
    stage = federation(compensation=True, score_every=3)
    blob = encode_assignment(stage, State(finished, WEIGHTS), assigned())
    assert Message.decode(blob, stage)[0].calibrates is asked
    with pytest.raises(Refusal, match="differ on whether to calibrate"):
        Message.decode(changed(blob, calibrate=not asked), stage)


@pytest.mark.parametrize("binding", [None, True, False])
def test_a_budget_binds_where_the_message_says_so(binding):
    budget = Budget.from_json({"flops": 1000.0, "memory": {"share": 0.5}})
    options = {} if binding is None else {"binding": binding}
    stage = federation()
    blob = encode_assignment(stage, State(0, WEIGHTS), assigned(), budget, **options)
    meta = wire.decode(blob)[1]
    assert meta["budget"] == budget.to_json()
    assert meta["held"] == (0 if binding is False else 1)
    assert Message.decode(blob, stage)[0].budget == (None if binding is False else budget)


def test_where_probes_come_first_everything_is_sent():
    probes = Probes(4, 6, ("fisher",))
    stage, means = federation(), MeanBook({}, np.ones((2, 3), dtype=bool))
    state = State(0, WEIGHTS, means=means)
    tensors, meta = sent(stage, state, assigned(probes=probes))
    assert meta["passes"] == [4, 6, "fisher"]
    assert set(tensors) == set(WEIGHTS)  # and no compensation
    blob = encode_assignment(stage, state, assigned(probes=probes))
    message, _ = Message.decode(blob, stage)
    assert message.probes == probes
    assert (message.carried.operations == EVERYTHING.operations).all()
    assert message.whole_size(ARCH, {}, 32) == len(blob)
    two = schedule(*([[[SKIP, FULL, FORWARD], [SKIP] * 3]] * 2))
    stage = federation(slots=2)
    blob = encode_assignment(stage, state, assigned(two, probes=probes))
    carried = Message.decode(blob, stage)[0].carried
    assert carried.operations.tolist() == [[[Operation.FULL] * 3] * 2]


@pytest.mark.parametrize(
    "policy,bits", [(ExecutionPolicy(), 32), (ExecutionPolicy(bits_down=8), 8)]
)
def test_slices_travel_in_the_bits_of_the_policy_or_of_the_run(policy, bits):
    stage, state = federation(), State(0, WEIGHTS)
    tensors, _ = sent(stage, state, assigned(policy=policy))
    rows = WEIGHTS["0.ask.weight"][[1, 2, 5, 3, 4]]
    wanted = rows if bits == 32 else quantize_rows(rows, 8)
    assert torch.equal(tensors["0.ask.weight"], wanted)
    configured = federation(upload_bits=8, download_bits=8)
    assert sent(configured, state, assigned())[0]["0.ask.weight"].dtype == torch.uint8
    blob = encode_assignment(stage, state, assigned(policy=policy))
    message = Message.decode(blob, stage)[0]
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert {n: (s, dtype) for n, s, dtype in message.slices(ARCH, bits)} == shapes
    # A message whose slices lie in shared memory counts as one that has them.
    short = encode_assignment(stage, state, assigned(policy=policy), shared=True)
    message, came = Message.decode(short, stage)
    assert came == {}
    assert message.whole_size(ARCH, came, bits) == len(blob)


def test_shortcuts_are_compensated_with_what_is_known():
    means = {
        (block, branch): torch.ones(5, width)
        for block in (0, 1)
        for branch, width in ((0, 6), (1, 7))
    }
    book = MeanBook(means, np.ones((2, 3), dtype=bool))
    stage, state = federation(), State(0, WEIGHTS, means=book)
    wanted = book.offsets(ARCH, WEIGHTS, PART)
    for shared in (False, True):
        tensors, _ = sent(stage, state, assigned(), shared=shared)
        found = {name: t for name, t in tensors.items() if name.startswith("d2ft.")}
        assert set(found) == set(wanted) == {"d2ft.skip.0", "d2ft.skip.1"}
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    short = encode_assignment(stage, state, assigned(), shared=True)
    message, came = Message.decode(short, stage)
    whole = encode_assignment(stage, state, assigned())
    assert message.whole_size(ARCH, came, 32) == len(whole)


def test_ranks_are_two_bytes_each_the_lower_first():
    ranks = np.array([[1, 258, 3], [4, 5, 65535]])
    own = Schedule(PART.operations, ranks)
    _, meta = sent(federation(), State(0, WEIGHTS), assigned(own))
    assert meta["ranks"] == "01000201030004000500ffff"


def test_what_a_client_has_cached_is_left_out_and_said():
    stage = federation(FIXED)
    cached = np.array([[False, True, False], [False, False, True]])
    state = State(0, WEIGHTS, digests=digests(FIXED, WEIGHTS), cached={3: cached})
    tensors, meta = sent(stage, state, assigned())
    assert meta["holds"] == f"{0b01000100:02x}"
    assert meta["digests"] == write(PART, state.digests)
    assert torch.equal(tensors["0.ask.weight"], WEIGHTS["0.ask.weight"][[3, 4]])
    blob = encode_assignment(stage, state, assigned())
    message, _ = Message.decode(blob, stage)
    assert (message.cached == cached).all()
    groups = [(-1, -1), (0, -1), (0, 1), (0, 2)]
    assert message.digests == {group: state.digests[group] for group in groups}
    assert message.whole_size(FIXED, {}, 32) == len(blob)
    probing = assigned(probes=Probes(4, 0, ("fisher",)))
    everything = Message.decode(encode_assignment(stage, state, probing), stage)[0]
    assert everything.digests == state.digests
    for own, other in ((stage, federation()), (federation(), stage)):
        blob = encode_assignment(own, state, assigned())
        with pytest.raises(Refusal, match="differ on whether parameters are fixed"):
            Message.decode(blob, other)


@pytest.mark.parametrize(
    "field,good,bad",
    [
        ("round", (1, 9), (0, 10, True, 1.0)),
        ("client", (0, 4), (-1, 5, "3")),
        ("examples", (1, 10**9), (0, 10**9 + 1, None)),
    ],
)
def test_numbers_are_within_their_ranges(field, good, bad):
    stage = federation()
    blob = encode_assignment(stage, State(0, WEIGHTS), assigned())
    for number in good:
        assert getattr(Message.decode(changed(blob, **{field: number}), stage)[0], field) == number
    for number in bad:
        with pytest.raises(Refusal, match=f"the message has {field} .*, which is not a whole"):
            Message.decode(changed(blob, **{field: number}), stage)


def test_fields_that_do_not_belong_to_a_message_are_named():
    stage = federation()
    blob = encode_assignment(stage, State(0, WEIGHTS), assigned())
    for name in ("odd", "held", "digests"):
        with pytest.raises(Refusal, match=f"the message cannot have '{name}'"):
            Message.decode(changed(blob, **{name: 1}), stage)


def test_a_budget_is_held_or_not():
    stage, budget = federation(), Budget.from_json({"flops": 10.0})
    blob = encode_assignment(stage, State(0, WEIGHTS), assigned(), budget)
    for number in (2, -1, True):
        with pytest.raises(Refusal, match="the message has held"):
            Message.decode(changed(blob, held=number), stage)
    assert json.loads(json.dumps(wire.decode(blob)[1]))["held"] == 1


def test_a_message_takes_no_more_than_is_planned_for():
    """2,048 bytes, 160 for each tensor and 4 for each number; two for each operation."""
    stage = federation()
    # embed, head.weight, head.bias; then of heads 1 and 2 of block 0: ask and give with 5 rows of
    # 4, rise with 6 numbers, fall with 6 rows of 4; and two shared parameters of 4.
    numbers = 8 + 12 + 3 + 20 + 20 + 6 + 24 + 4 + 4
    planned = 2048 + 2 * 6 + 9 * 160 + 4 * numbers
    assert stage.costs.bytes_down(PART) == planned
    message = encode_assignment(stage, State(0, WEIGHTS), assigned())
    assert planned - 2048 - 9 * 160 < len(message) <= planned
    # What comes back: of head 1 alone, which has 3 rows and 4, and no embedding.
    numbers = 12 + 3 + 12 + 12 + 4 + 16 + 4 + 4
    assert stage.costs.bytes_up(PART) == 2048 + 8 * 160 + 4 * numbers
