"""What a node takes from a run, and from a server that may be another than it should be."""

import json
import sys
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, RecordDict

from d2ft_fl.client.trainer import ClientTrainer
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.flower import client_app
from d2ft_fl.flower.node_terms import NodeTerms
from d2ft_fl.flower.records import pack_blobs

RUN = RunConfig(budgets="devices", dataset="/server/says", clients=5).to_mapping()
PLACE = {"partition-id": 1, "num-partitions": 2}  # serves clients 1 and 3
OWN = PLACE | {"dataset": "/data/photos", "budgets": "measured"}
TAKES = PLACE | {"takes": "data, budgets"}


def terms(node, simulated=False, **run):
    changed = {key.replace("_", "-"): value for key, value in run.items()}
    return NodeTerms.of(RUN | changed, node, simulated)


@pytest.mark.parametrize(
    "node,run,message",
    [
        (PLACE, {}, 'takes no data from a run: set dataset in its --node-config, or takes="data"'),
        (PLACE | {"dataset": "/d"}, {}, "takes no budget from a run: set budgets"),
        (PLACE | {"budgets": "measured"}, {}, "takes no data from a run"),
        (PLACE | {"partitioner": "Iid", "budgets": "measured"}, {}, "takes no data from a run"),
        (PLACE | {"takes": "data"}, {}, "takes no budget from a run"),
        (PLACE | {"takes": "data; budgets"}, {}, "takes = 'data; budgets' is unknown"),
        (PLACE | {"takes": 3}, {}, "takes = 3 must be text"),
        (OWN | {"tuning": "full"}, {}, "'tuning' is unknown; use one of partition-id"),
        (OWN, {"tuning": "evil.module"}, "tuning = 'evil.module' names a module"),
        (OWN | {"plug-ins": "evil"}, {"tuning": "evil.module"}, "names a module"),
        (OWN | {"plug-ins": "evil.module.more"}, {"tuning": "evil.module"}, "names a module"),
        (TAKES, {"budgets": "evil:budget"}, "budgets = 'evil:budget' names a module"),
        (TAKES | {"plug-ins": "a, b"}, {"budgets": "evil:a"}, "names a module"),
    ],
)
def test_what_a_node_does_not_allow_is_refused(node, run, message):
    with pytest.raises(ConfigError, match=message) as error:
        terms(node, **run)
    assert "\n" not in str(error.value)


def test_a_node_with_data_of_its_own_has_all_of_them_from_itself():
    """Even what its configuration leaves open: else a run chose which examples are used."""
    run = {"label_column": "x", "partitioner": "Iid", "partitioner_args": "y=1"}
    found = terms(OWN, **run, train_examples=1)
    data = {k: found.options[k] for k in ("dataset", "label-column", "partitioner")}
    assert data == {"dataset": "/data/photos", "label-column": "label", "partitioner": "all"}
    assert (found.options["partitioner-args"], found.options["train-examples"]) == ("", 0)
    assert found.options["budgets"] == "measured"
    assert found.owns_budget
    own = terms(OWN | {"label-column": "kind", "train-examples": 7, "device": "cpu"})
    assert (own.options["label-column"], own.options["train-examples"]) == ("kind", 7)


def test_a_node_takes_what_it_says_that_it_takes():
    found = terms(TAKES | {"train-examples": 7}, threads_per_client=2)
    assert found.options["dataset"] == "/server/says"
    assert found.options["train-examples"] == 7
    assert found.options["budgets"] == "devices"
    assert found.options["threads-per-client"] == 2
    assert not found.owns_budget
    named = terms(TAKES | {"plug-ins": "mine.tuning, b"}, tuning="mine.tuning", budgets="b:of")
    assert (named.options["tuning"], named.options["budgets"]) == ("mine.tuning", "b:of")


def test_of_what_only_servers_need_a_node_has_the_defaults():
    names = {"strategy": "evil.plan", "trackers": "evil:t", "pretrained": "/x", "resume": "/y"}
    found = terms(OWN, **names, run_folder="/z", lora_adapter="/w").options
    assert {k: found[k] for k in ("strategy", "trackers", "pretrained", "resume")} == {
        "strategy": "d2ft", "trackers": "", "pretrained": "bundled", "resume": "",
    }  # fmt: skip
    assert (found["run-folder"], found["lora-adapter"]) == ("", "")
    RunConfig.from_mapping(found).check_values()


def test_in_a_simulation_everything_is_as_the_run_says():
    run = {"tuning": "my.tuning", "budgets": "my:budget", "strategy": "my.plan"}
    found = terms(PLACE, simulated=True, **run)
    assert found == NodeTerms(RUN | run)


@pytest.fixture
def node(monkeypatch):
    """Ask a node of a deployment, or send it work; pools are not started."""
    monkeypatch.setattr(client_app, "Message", lambda content, reply_to: content)
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = []

    class Pool:
        def __init__(self, options, size, owns_budget, on_device):
            assert on_device
            asked.append((options, owns_budget))

        def reports(self, clients, round_number, seconds, classes):
            return [[client, 5, {}] for client in clients]

        def work(self, jobs, seconds, client_seconds):
            asked.extend(jobs)
            yield from ((job.client, b"reply") for job in jobs)

    monkeypatch.setattr(client_app, "WorkerPool", Pool)
    client_app._worker_pool.cache_clear()
    yield SimpleNamespace(asked=asked)
    client_app._worker_pool.cache_clear()


def context(config=OWN, **run):
    return SimpleNamespace(node_config=config, run_config=RUN | run)


def ask(text, where=None):
    content = RecordDict({"query": ConfigRecord({"json": text})})
    found = client_app.query(SimpleNamespace(content=content), where or context())
    return json.loads(found["answer"]["json"])


def test_a_node_says_at_once_why_it_cannot_serve(node):
    assert ask('{"clients": null}') == {"node": 1, "nodes": 2, "cpus": None}
    assert "takes no data" in ask('{"clients": null}', context(PLACE))["error"]
    assert "'evil.module' names" in ask('{"clients": null}', context(tuning="evil.module"))["error"]
    assert node.asked == []


def test_a_node_reports_of_its_own_clients_alone(node):
    answer = ask('{"clients": [1, 3], "round": 2}')
    assert answer == {"reports": [[1, 5, {}], [3, 5, {}]]}
    ((options, owns_budget),) = node.asked
    assert options["dataset"] == "/data/photos"
    assert owns_budget


@pytest.mark.parametrize(
    "question",
    [
        '{"clients": [0], "round": 1}', '{"clients": [5], "round": 1}',
        '{"clients": [-1], "round": 1}', '{"clients": [true], "round": 1}',
        '{"clients": ["1"], "round": 1}', '{"clients": {"1": 1}, "round": 1}',
        '{"clients": [1]}', '{"clients": [1], "round": "../x"}', '{"clients": [1], "round": 1e3}',
        '{"clients": [1], "round": 99999999999}', '{"clients": [1], "round": NaN}', "[1]", "{",
        '{"clients": [1], "round": 1, "x": "' + "y" * 20_000 + '"}',
    ],
)  # fmt: skip
def test_other_questions_are_refused_in_one_line(node, question):
    error = ask(question)["error"]
    assert "\n" not in error
    assert len(error) < 200
    assert node.asked == []


def work(where=None, clients=(1, 3), **changes):
    arrays, index = pack_blobs(dict.fromkeys(clients, b"work"))
    dispatch = {"round": 1, "index": index, "seconds": 9.0, "client-seconds": 0.0}
    dispatch |= {key.replace("_", "-"): value for key, value in changes.items()}
    records = {"assignments": arrays, "dispatch": ConfigRecord({"json": json.dumps(dispatch)})}
    content = RecordDict(records)
    return client_app.train(SimpleNamespace(content=content), where or context())


def test_a_node_works_for_its_own_clients(node):
    outcome = json.loads(work()["outcome"]["json"])
    assert [client for group in outcome["index"] for client, _ in group] == [1, 3]
    assert [(job.client, job.model, job.reply) for job in node.asked[1:]] == [
        (1, None, None), (3, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"clients": [0]}, {"clients": [1, 2]}, {"clients": [7]},
        {"round": 0}, {"round": "../../x"}, {"round": 2.0}, {"round": 2**63}, {"round": None},
        {"seconds": -1}, {"seconds": float("inf")}, {"seconds": "9"}, {"seconds": True},
        {"client_seconds": float("nan")}, {"client_seconds": 1e300}, {"client_seconds": None},
        {"model": "/nowhere/evil/1.model"}, {"model": ""}, {"model_store": "other"}, {"model": 3},
        {"index": "x" * 20_000},
    ],
)  # fmt: skip
def test_a_node_refuses_other_work_before_it_begins(node, changes, tmp_path):
    """A model's path would be one to read, and replies would be written beside it."""
    with pytest.raises(Exception, match=r"message|serve|JSON"):
        work(**changes)
    assert node.asked == []


def test_no_module_that_the_server_names_is_imported(tmp_path, monkeypatch):
    tmp_path.joinpath("evil_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    for key, value in (("tuning", "evil_module.x"), ("budgets", "evil_module:x")):
        with pytest.raises(ConfigError, match="names a module"):
            terms(TAKES, **{key: value})
    names = {"strategy": "evil_module.x", "trackers": "evil_module:x"}
    config = RunConfig.from_mapping(terms(TAKES, dataset="digits", **names).options)
    assert ClientTrainer(config).report(1, 1).examples > 0
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("simulated", [True, False])
def test_budgets_are_of_this_device_but_in_a_simulation(monkeypatch, simulated):
    monkeypatch.setattr(client_app, "simulated", lambda: simulated)
    monkeypatch.setattr(client_app, "_cpus", lambda: 2.0)
    made = client_app._worker_pool.__wrapped__(json.dumps(RunConfig().to_mapping()), False)
    assert made.on_device == (not simulated)
    assert made.size == (2 if simulated else 1)
