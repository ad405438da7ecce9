"""What nodes say is not believed: malformed, of others' clients, or in Flower's own name."""

import json
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from d2ft_fl.client_app import pack_blob
from d2ft_fl.errors import ConfigError
from d2ft_fl.server_app import MALFORMED, FlowerPool, _reports, _results
from d2ft_fl.work import Fault


def reply(results=None, faults="{}", node=7, error=None, answer=None):
    records = {"results": ArrayRecord(results or {}), "faults": ConfigRecord({"json": faults})}
    if answer is not None:
        records["answer"] = ConfigRecord({"json": answer})
    return SimpleNamespace(
        content=RecordDict(records),
        has_error=lambda: error is not None,
        error=SimpleNamespace(reason=error, code=5),
        metadata=SimpleNamespace(src_node_id=node, reply_to_message_id="m"),
    )


class Grid:
    """Answers every message with what it was told."""

    def __init__(self, *replies):
        self.replies = replies

    def get_node_ids(self):
        return [7, 8]

    def send_and_receive(self, messages, timeout=None):
        return self.replies


def test_a_node_answers_for_its_own_clients_only():
    given = {"1": pack_blob(b"one"), "2": pack_blob(b"two")}
    found = list(_results(reply(given, json.dumps({"3": "hung", "9": "no"})), [1, 3]))
    assert found == [(1, b"one"), (3, Fault("hung"))]


@pytest.mark.parametrize("faults", ["{", "[1]", "3"])
def test_a_malformed_answer_is_a_fault_of_all_its_clients(faults):
    found = list(_results(reply({}, faults), [1, 3]))
    assert [client for client, _ in found] == [1, 3]
    assert all("malformed" in fault.reason for _, fault in found)


def test_an_array_that_is_none_is_a_fault():
    array = Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=b"garbage")
    ((client, fault),) = _results(reply({"1": array}), [1])
    assert client == 1
    assert "cannot be read" in fault.reason


@pytest.mark.parametrize(
    "rows",
    [[[0, -1, {}]], [[0, 10**12, {}]], [[0, "many", {}]], [[0, 5, {"flops": "lots"}]], [[0]], 3],
)
def test_reports_that_cannot_be_true_are_refused(rows):
    with pytest.raises((ConfigError, *MALFORMED)):
        _reports({"reports": rows}, [0])


def test_a_node_that_dies_while_it_is_asked_is_silent(quick, monkeypatch):
    """Flower says so in its own name, not the node's."""
    from d2ft_fl import server_app

    monkeypatch.setattr(server_app, "Message", lambda *a, **k: None)
    there = {"reports": [[1, 5, {}]]}
    grid = Grid(
        reply(node=1, error="Node Unavailable"),
        reply(node=8, answer=json.dumps(there)),
    )
    pool = FlowerPool(grid, quick())
    pool.nodes = {7: range(0, 4, 2), 8: range(1, 4, 2)}
    found, silent = pool.reports(1, [0, 1])
    assert [(r.client, r.examples) for r in found] == [(1, 5)]
    assert silent == {0: Fault("its SuperNode does not answer")}


def test_a_node_whose_place_cannot_be_is_left_out(quick, monkeypatch):
    from d2ft_fl import server_app

    monkeypatch.setattr(server_app, "Message", lambda *a, **k: None)
    place = {"node": 0, "nodes": 0, "cpus": None}
    right = {"node": 1, "nodes": 2, "cpus": None}
    grid = Grid(reply(node=7, answer=json.dumps(place)), reply(node=8, answer=json.dumps(right)))
    pool = FlowerPool(grid, quick(min_replies=1))
    pool._meet()
    assert list(pool.nodes) == [8]
    assert list(pool.refused) == [7]
