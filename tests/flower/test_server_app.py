"""What nodes say is not believed: malformed, of others' clients, or in Flower's own name."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.flower import grid_messages, nodes, wake
from d2ft_fl.flower.answers import answer_of, reports_of, results_of
from d2ft_fl.flower.client_app import simulated
from d2ft_fl.flower.grid_pool import FlowerPool
from d2ft_fl.flower.records import BUNDLE_BYTES, pack_blobs, unpack_blobs
from d2ft_fl.server.dispatch import ClientFailure


def reply(results=None, failures=None, error=None, answer=None, outcome=None):
    arrays, index = pack_blobs(results or {})
    told = {"index": index, "failures": failures or {}} if outcome is None else outcome
    records = {"results": arrays, "outcome": ConfigRecord({"json": json.dumps(told)})}
    if answer is not None:
        records["answer"] = ConfigRecord({"json": answer})
    return SimpleNamespace(
        content=RecordDict(records),
        has_error=lambda: error is not None,
        error=SimpleNamespace(reason=error, code=5),
        metadata=SimpleNamespace(reply_to_message_id=None),
    )


@pytest.fixture
def grid(monkeypatch):
    """A grid whose nodes answer as they are told: node -> a reply, or what pulling it raises."""

    def sent(content, dst_node_id, message_type, ttl):
        return dst_node_id

    monkeypatch.setattr(grid_messages, "Message", sent)

    class Nodes:
        def __init__(self, **replies):
            self.replies = {int(name.removeprefix("node_")): r for name, r in replies.items()}
            self.asked = []

        def get_node_ids(self):
            return list(self.replies)

        def push_messages(self, messages):
            self.asked += messages
            return [f"message {node}" for node in messages]

        def pull_messages(self, ids):
            found = []
            for own in ids:
                given = self.replies.get(int(own.split()[1]))
                if isinstance(given, Exception):
                    raise given
                if given is not None:
                    given.metadata.reply_to_message_id = own
                    found.append(given)
            return found

    return Nodes


@given(st.dictionaries(st.integers(0, 2**40), st.integers(0, 3 << 19), max_size=12))
@settings(max_examples=30, deadline=None)
def test_blobs_come_back_and_small_ones_share_an_array(sizes):
    blobs = {client: bytes([client % 256]) * size for client, size in sizes.items()}
    arrays, index = pack_blobs(blobs)
    assert dict(unpack_blobs(arrays, json.loads(json.dumps(index)))) == blobs
    assert all(len(own) == 1 or sum(s for _, s in own) <= BUNDLE_BYTES for own in index)
    assert len(arrays) <= 1 + 2 * sum(sizes.values()) / BUNDLE_BYTES


def test_a_node_answers_for_its_own_clients_only():
    given = reply({1: b"one", 2: b"two"}, {"3": "hung", "9": "no"})
    assert list(results_of(given, [1, 3])) == [(1, b"one"), (3, ClientFailure("hung"))]


@pytest.mark.parametrize(
    "outcome",
    [
        3, [1], {}, {"index": [], "failures": 3}, {"index": [], "failures": {"x": "y"}},
        {"index": [[[1, 2]]], "failures": {}}, {"index": [[[1, -1], [3, 4]]], "failures": {}},
        {"index": [[[1]]], "failures": {}}, {"index": [[[[], 3]]], "failures": {}},
        {"index": [[], [[1, 3]]], "failures": {}},
        {"index": [[[True, 3]]], "failures": {}}, {"index": [[[1.0, 3]]], "failures": {}},
        {"index": [[["1", 3]]], "failures": {}}, {"index": [[[1, 3.0]]], "failures": {}},
    ],
)  # fmt: skip
def test_a_malformed_answer_is_a_fault_of_all_its_clients(outcome):
    found = list(results_of(reply({1: b"one"}, outcome=outcome), [1, 3]))
    assert [client for client, _ in found] == [1, 3]
    assert all("malformed" in failure.reason for _, failure in found)


@pytest.mark.parametrize(
    "stype,data", [("numpy.ndarray", b"PK\x03\x04"), ("numpy.ndarray", b""), ("else", b"x")]
)
def test_an_array_that_holds_no_blobs_is_a_fault_and_not_parsed(stype, data):
    odd = reply({1: b"one"})
    array = Array(dtype="uint8", shape=(3,), stype=stype, data=data)
    odd.content["results"] = ArrayRecord({"0": array})
    ((client, failure),) = results_of(odd, [1])
    assert client == 1
    assert "malformed" in failure.reason


@pytest.mark.parametrize(
    "rows",
    [
        [[0, -1, {}]], [[0, 10**12, {}]], [[0, "many", {}]], [[0, 5, {"flops": "lots"}]], [[0]], 3,
        [[0, 5, {"device": "x" * 61}]], [[0, 5, {"curve": "/etc/passwd"}]], [[0, True, {}]],
        [[0, 5, {"speed": 5e-324}]], [[0, 5, []]],
    ],
)  # fmt: skip
def test_reports_that_cannot_be_true_are_refused(rows):
    with pytest.raises((ConfigError, ValueError, TypeError)):
        reports_of({"reports": rows}, [0])


@pytest.mark.parametrize("letters", [20_000_000, 40_000])
def test_an_answer_that_is_too_long_is_not_read(letters):
    """A client may have 16 KiB, beside as much for the node."""
    told = {"reports": [[0, 5, {"device": "x" * letters}]]}
    failure = answer_of(reply(answer=json.dumps(told)), 1)
    assert failure.reason.startswith("its SuperNode's answer is malformed: JSON of ")
    outcome = {"index": [], "failures": {"1": "x" * letters}}
    assert [f.reason[:30] for _, f in results_of(reply(outcome=outcome), [1])] == [
        "its SuperNode's answer is malf"
    ]


@pytest.mark.parametrize("text", ['{"reports": [[0, 5, {"speed": NaN}]]}', '{"reports": 1e999}'])
def test_an_answer_is_json(text):
    assert "no finite number" in answer_of(reply(answer=text), 1).reason


def test_a_reason_is_one_line_that_can_be_printed():
    reason = ClientFailure("\x1b[31m" + "y" * 10**7 + "\nsecond").reason
    assert reason.startswith("?[31my")
    assert len(reason) == 300
    assert ClientFailure(" \n ").reason == "no reason is known"
    assert ClientFailure("a\ud800\nb").reason == "a?"


def place(node, count):
    return reply(answer=json.dumps({"node": node, "nodes": count, "cpus": None}))


def test_reports_of_nodes_that_fail_answer_nonsense_or_leave_some_out(grid, quick):
    there = {"reports": [[1, 5, {}], [True, 5, {}], [4.0, 5, {}]]}
    own = grid(
        node_6=reply(error="Node Unavailable"),
        node_7=ValueError("no protobuf"),
        node_8=reply(answer=json.dumps(there)),
        node_9=reply(answer="{"),
    )
    pool = FlowerPool(own, quick(clients=16))
    pool.nodes.serving = {6: range(0, 1), 7: range(2, 3), 8: range(1, 5, 3), 9: range(5, 6)}
    found, silent = pool.reports(1, [0, 1, 2, 4, 5])
    assert [(r.client, r.examples) for r in found] == [(1, 5)]
    assert {c: failure.reason for c, failure in silent.items()} == {
        0: "its SuperNode failed: Node Unavailable",
        2: "its SuperNode's answer cannot be read: ValueError: no protobuf",
        4: "its SuperNode says nothing of it",
        5: silent[5].reason,
    }
    assert "malformed" in silent[5].reason


def test_a_silent_node_is_not_waited_for_longer_than_a_round(grid, quick):
    pool = FlowerPool(grid(node_7=None), quick(round_timeout=0.3))
    pool.nodes.serving = {7: range(0, 4)}
    found, silent = pool.reports(1, [0])
    assert (found, silent) == ([], {0: ClientFailure("its SuperNode does not answer")})


@pytest.mark.parametrize(
    "odd", [(0, 0), (2, 2), (-1, 2), (0.0, 2), (False, 2), ("0", 2), (0, None)]
)
def test_a_node_whose_place_cannot_be_is_left_out(grid, quick, odd):
    pool = FlowerPool(grid(node_7=place(*odd), node_8=place(1, 2)), quick())
    for _ in range(2):
        pool.nodes.meet()
    assert list(pool.nodes.serving) == [8]
    assert list(pool.nodes.refused) == [7]


def test_a_newcomer_that_says_nothing_holds_nobody_up(grid, quick):
    own = grid(node_7=place(0, 1))
    pool = FlowerPool(own, quick())
    assert pool.clients(1) == dict.fromkeys(range(4), 1)
    own.replies[8] = None
    assert pool.clients(2) == dict.fromkeys(range(4), 1)
    assert own.asked == [7, 8]


def test_a_simulation_goes_on_with_all_of_its_nodes_or_not_at_all(grid, quick, monkeypatch):
    monkeypatch.setattr(nodes, "simulated", lambda: True)
    monkeypatch.setattr(nodes, "NODES_TIMEOUT", 0.5)
    own = grid(node_7=place(0, 2), node_8=None)
    with pytest.raises(RunError, match="SuperNodes of 2 of 4 clients answer, after 0 s"):
        FlowerPool(own, quick(round_timeout=0.4)).clients(1)
    own.replies[8] = reply(error="it broke")
    with pytest.raises(RunError, match="its SuperNode failed: it broke"):
        FlowerPool(own, quick()).clients(1)
    own.replies[8] = reply(answer=json.dumps({"error": "a bad option"}))
    with pytest.raises(ConfigError, match="a bad option"):
        FlowerPool(own, quick()).clients(1)


def test_ray_that_is_still_being_imported_is_no_simulation_yet(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert not simulated()
    monkeypatch.delitem(sys.modules, "ray")
    assert not simulated()
    there = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", there)
    assert simulated()


def test_a_node_that_was_slow_to_say_its_place_is_asked_again(grid, quick, monkeypatch):
    monkeypatch.setattr(nodes, "PLACE_SECONDS", 0.3)
    monkeypatch.setattr(nodes, "NODES_TIMEOUT", 0.5)
    own = grid(node_7=place(0, 2), node_8=None)
    pool = FlowerPool(own, quick(round_timeout=0.1, min_replies=2))
    assert sorted(pool.clients(1)) == [0, 2]
    assert own.asked.count(8) >= 2
    assert pool.nodes.refused == {}
    own.replies[8] = place(1, 2)
    for _ in range(2):
        pool.nodes.meet()
    assert len(pool.clients(2)) == 4


def test_of_two_nodes_with_the_same_clients_one_waits_until_the_other_is_gone(grid, quick):
    own = grid(node_9=place(0, 2), node_8=place(1, 2))
    pool = FlowerPool(own, quick())
    assert len(pool.clients(1)) == 4
    own.replies[3] = place(0, 2)  # in place of 9, which has died and is not yet given up
    for _ in range(2):
        pool.clients(2)
    assert pool.nodes.serving == {9: range(0, 4, 2), 8: range(1, 4, 2)}
    del own.replies[9]
    assert pool.clients(3) == {0: 3, 2: 3, 1: pool.nodes.joined[8], 3: pool.nodes.joined[8]}
    assert pool.nodes.serving == {3: range(0, 4, 2), 8: range(1, 4, 2)}


def test_nodes_are_woken_once_they_are_there(grid, monkeypatch):
    monkeypatch.setattr(wake, "Message", lambda content, **sent: (sent, content))
    nodes = grid(node_3=None, node_4=None)
    there = iter([[], [], [3, 4]])
    nodes.get_node_ids = lambda: next(there)
    wake.wake(nodes)
    assert [sent["dst_node_id"] for sent, _ in nodes.asked] == [3, 4]
    for sent, content in nodes.asked:
        assert sent["message_type"] == "query"
        assert json.loads(content["query"]["json"]) == {"clients": None}


def test_flowers_own_grid_of_a_simulation_is_known(grid):
    simulated = pytest.importorskip("flwr.superlink.grid").InMemoryGrid
    assert wake.is_simulated(simulated.__new__(simulated))
    assert not wake.is_simulated(grid())


def test_a_server_that_wakes_nodes_has_not_imported_torch():
    """Else waking them would come too late to be of use."""
    code = "import sys, d2ft_fl.flower.server_app; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
