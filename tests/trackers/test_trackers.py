"""Trackers: what each wrote, read back with its own reader, is what ``rounds.jsonl`` says."""

import importlib.util
import json
import math
import os
import socket
import struct
import sys

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.trackers import BUILTIN, load_trackers, scalars, tracking

HERE = [name for name in BUILTIN if importlib.util.find_spec(name)]
CURVES = ("accuracy", "loss", "train_loss", "coverage", "round_seconds", "wall_seconds", "sat_out")
TINY = {"rounds": 2, "clients": 2, "train_examples": 60, "test_examples": 50, "partitioner": "Iid",
        "partitioner_args": ""}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _closed_world(tmp_path_factory):
    """Nobody's settings, no network, and an empty current folder that has to stay so."""
    empty, connect, asked = tmp_path_factory.mktemp("current"), socket.socket.connect, []

    def local_only(self, address):
        if self.family != socket.AF_UNIX:
            asked.append(address)
            raise OSError("no network")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("WANDB_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(socket.socket, "connect", local_only)
        patch.chdir(empty)
        yield
    assert list(empty.iterdir()) == []
    assert asked == []


@pytest.fixture(scope="module")
def folder(_closed_world, tmp_path_factory):
    """The folder of a tiny run with all trackers whose packages are there."""
    folder = tmp_path_factory.mktemp("tracked") / "a run"
    config = RunConfig(**TINY, run_folder=str(folder), trackers=", ".join(HERE))
    summary = run_local(checked(config))
    assert summary["trackers_switched_off"] == []
    assert summary == json.loads((folder / "summary.json").read_text())
    assert services() == []
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def totals(folder):
    return scalars(json.loads((folder / "summary.json").read_text()), "summary/")


def services():
    """Processes that a tracker has started."""
    found = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    return [line for line in found if "wandb" in line]


# -- figures -------------------------------------------------------------------------------------


def test_names_of_figures_are_stable(folder):
    first = rows(folder)[0]
    found = scalars(first)
    assert {name: found[name] for name in CURVES} == {name: first[name] for name in CURVES}
    for name in ("flops", "memory", "bytes_up", "bytes_down"):
        part = first[name]
        assert found[f"{name}/used_mean"] == part["used_mean"]
        assert found[f"{name}/share"] == part["used_mean"] / part["full_mean"]
        assert found[f"{name}/allowed_share"] == part["allowed_share"]
    assert "round" not in found


def test_what_is_missing_is_left_out_and_lists_are_counted():
    row = {
        "round": 3,
        "aggregation_error": None,
        "loss": math.nan,
        "faults": ["client 1: gone", "client 2: gone"],
        "violations": [],
        "trained": [[1, 2]],
        "flops": {"used_mean": 3.0, "full_mean": 4, "worst": None},
        "memory": {"used_mean": 0.0, "full_mean": 0.0},
    }
    found = scalars(row, "x/")
    assert math.isnan(found.pop("x/loss"))
    assert found == {
        "x/faults": 2, "x/violations": 0, "x/flops/used_mean": 3, "x/flops/full_mean": 4,
        "x/flops/share": 0.75, "x/memory/used_mean": 0, "x/memory/full_mean": 0,
    }  # fmt: skip


# -- each tracker --------------------------------------------------------------------------------


def test_tensorboard_holds_the_run(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in scalars(rows(folder)[0]):
        points = [(p.step, p.value) for p in found.Scalars(name)]
        expected = [(r["round"], pytest.approx(scalars(r)[name], rel=1e-6)) for r in rows(folder)]
        assert points == expected
    for name, value in totals(folder).items():
        assert found.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6)

    from tensorboard.plugins.hparams import metadata

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = metadata.parse_session_start_info_plugin_data(content).hparams
    assert options["lr"].number_value == RunConfig().lr
    assert options["strategy"].string_value == "d2ft"
    assert options["checkpointing"].bool_value is False


def wandb_records(folder):
    """What a W&B file holds: LevelDB's log format in blocks of 32 kB, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header
            position += 32768 - position % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def values(items):
    return {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}


def test_wandb_holds_the_run(folder):
    pytest.importorskip("wandb")
    history, summary, config, exits = [], {}, {}, []
    for record in wandb_records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert record.run.display_name == "a run"
            config |= values(record.run.config.update)
        elif kind == "history":
            history.append(values(record.history.item))
        elif kind == "summary":
            summary |= values(record.summary.update)
        elif kind == "exit":
            exits.append(record.exit.exit_code)
    assert [step["_step"] for step in history] == [1, 2]
    for step, row in zip(history, rows(folder), strict=True):
        assert {k: v for k, v in step.items() if k[0] != "_"} == scalars(row)
    assert summary.items() >= totals(folder).items()
    assert config["lr"] == RunConfig().lr
    assert config["run-folder"] == str(folder)
    assert exits == [0]


def mlflow_run(folder):
    client = pytest.importorskip("mlflow").MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("d2ft-fl")
    [run] = client.search_runs([experiment.experiment_id])
    return client, run


def test_mlflow_holds_the_run(folder):
    client, run = mlflow_run(folder)
    assert run.info.run_name == "a run"
    assert run.info.status == "FINISHED"
    for name in scalars(rows(folder)[0]):
        points = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert points == [(r["round"], scalars(r)[name]) for r in rows(folder)]
    assert run.data.metrics.items() >= totals(folder).items()
    options = RunConfig(**TINY, run_folder=str(folder), trackers=", ".join(HERE)).to_mapping()
    assert run.data.params == {key: str(value) for key, value in options.items()}


numbers = st.none() | st.integers(-(2**62), 2**62) | st.floats()
resources = st.dictionaries(st.sampled_from(["used_mean", "full_mean", "worst"]), numbers)
holey = st.dictionaries(st.sampled_from(CURVES), numbers) | st.fixed_dictionaries(
    {"flops": st.none() | resources, "faults": st.lists(st.text(), max_size=2)}
)


@pytest.mark.parametrize("name", HERE)
def test_rows_with_holes_break_no_tracker(name, tmp_path):
    with tracking(load_trackers(name), {"text": "", "none": None}, tmp_path) as trackers:
        steps = iter(range(1, 1000))

        @settings(max_examples=15, deadline=None, database=None)
        @given(holey)
        def told(row):
            trackers.round({**row, "round": next(steps)})
            assert trackers.switched_off == []

        told()
        trackers.finish({"accuracy": None, "loss": math.nan, "resources": {}, "strategy": "d2ft"})
    assert trackers.switched_off == []


def test_a_run_that_fails_is_told_and_leaves_no_process(tmp_path):
    def fails():
        with tracking(load_trackers(", ".join(HERE)), {}, tmp_path) as trackers:
            trackers.round({"round": 1, "loss": 1.0})
            assert bool(services()) == ("wandb" in HERE)
            raise RunError("no client answered")

    with pytest.raises(RunError):
        fails()
    assert services() == []
    assert "WANDB_SERVICE" not in os.environ
    if "mlflow" in HERE:
        _, run = mlflow_run(tmp_path)
        assert run.info.status == "FAILED"
        assert run.data.tags["failure"] == "RunError: no client answered"
    if "wandb" in HERE:
        kinds = {r.WhichOneof("record_type"): r for r in wandb_records(tmp_path)}
        assert kinds["exit"].exit.exit_code == 1


# -- trackers of one's own, and those that break ---------------------------------------------------

SINKS = """
events = []

class Listening:
    def __init__(self, config, folder):
        events.append(("start", config["rounds"], folder.name))
    def round(self, row):
        events.append(("round", row["round"]))
        row.clear()
    def finish(self, summary):
        events.append(("finish", summary["rounds"]))
    def fail(self, reason):
        events.append(("fail", reason))

class Breaking(Listening):
    def round(self, row):
        if row["round"] == 2:
            raise {error}

def broken(config, folder):
    raise OSError("no such server\\nat all")
"""


@pytest.fixture
def sinks(tmp_path, monkeypatch):
    """A module of sinks, importable as ``sinks``; returns how to write it."""

    def write(error="ValueError('full')"):
        tmp_path.joinpath("sinks.py").write_text(SINKS.replace("{error}", error))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "sinks", raising=False)
        import sinks

        return sinks

    yield write
    sys.modules.pop("sinks", None)


def test_a_sink_of_ones_own_hears_everything_and_changes_nothing(sinks, tmp_path):
    heard = sinks().events
    folder = tmp_path / "run"
    config = RunConfig(**TINY, run_folder=str(folder), trackers="sinks:Listening")
    summary = run_local(checked(config))
    assert heard == [("start", 2, "run"), ("round", 1), ("round", 2), ("finish", 2)]
    assert summary["accuracy"] == rows(folder)[-1]["accuracy"]


@pytest.mark.parametrize("error", ["ValueError('full')", "SystemExit(3)"])
def test_a_sink_that_raises_is_switched_off_and_the_rest_goes_on(sinks, tmp_path, caplog, error):
    heard = sinks(error).events
    factories = load_trackers("sinks:Breaking, sinks:Listening")
    with tracking(factories, {"rounds": 3}, tmp_path) as trackers:
        for number in (1, 2, 3):
            trackers.round({"round": number})
        trackers.finish({"rounds": 3})
    [line] = trackers.switched_off
    said = error.replace("('", ": ").replace("(", ": ").rstrip("')")
    assert line == f"tracker sinks:Breaking raised {said} in round 2 and was switched off"
    assert [r.getMessage() for r in caplog.records] == [line]
    assert heard[2:] == [
        ("round", 1), ("fail", line), ("round", 2), ("round", 3), ("finish", 3)
    ]  # fmt: skip


def test_a_run_says_at_its_end_what_was_switched_off(sinks, tmp_path):
    sinks()
    options = {**TINY, "run_folder": tmp_path / "run", "trackers": "sinks:Breaking"}
    pairs = [f"{key.replace('_', '-')}={value}" for key, value in options.items()]
    arguments = [x for pair in pairs for x in ("--set", pair)]
    ended = CliRunner().invoke(app, ["run", "--backend", "local", *arguments])
    assert ended.exit_code == 0, ended.output
    line = "tracker sinks:Breaking raised ValueError: full in round 2 and was switched off"
    assert line in ended.stdout.splitlines()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    assert len(rows(tmp_path / "run")) == 2


def test_a_tracker_that_cannot_be_started_ends_the_run_before_it_begins(sinks, tmp_path):
    heard = sinks().events
    folder = tmp_path / "run"
    config = checked(
        RunConfig(**TINY, run_folder=str(folder), trackers="sinks:Listening, sinks:broken")
    )
    with pytest.raises(RunError) as error:
        run_local(config)
    assert str(error.value) == (
        "tracker sinks:broken cannot be started (OSError: no such server at all); mend that, or "
        "leave it out of trackers"
    )
    assert [event for event, *_ in heard] == ["start", "fail"]
    assert not folder.joinpath("rounds.jsonl").exists()


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "tensorbord",
            r"'tensorbord' is unknown \(did you mean 'tensorboard'\?\); use one of tensorboard",
        ),
        ("tensorboard, csv", "trackers = 'csv' is unknown"),
        ("nowhere:Sink", "trackers = 'nowhere:Sink': cannot import 'nowhere'"),
        ("math:sink", "module 'math' has no 'sink'"),
        ("math:pi", "trackers = 'math:pi' is not callable; name a factory"),
    ],
)
def test_unknown_trackers_are_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        checked_options(RunConfig(trackers=text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_with_the_extra_to_install(name, monkeypatch, tmp_path):
    message = rf"needs a package that is not installed; .* pip install -e '.\[{name}\]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=message):
            checked_options(RunConfig(trackers=name))
    tmp_path.joinpath(name).mkdir()  # what an earlier run left in the current folder
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=message):
        load_trackers(name)


def test_without_trackers_nothing_is_started():
    assert load_trackers("") == load_trackers(" , ") == {}
