import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.budgets.budget import UNLIMITED, Amount, Budget, ClientDescription
from d2ft_fl.budgets.sources import budget_source
from d2ft_fl.budgets.traces import Trace
from d2ft_fl.config.run_config import resolve_path
from d2ft_fl.costs.machine_speed import LEAST, MOST, standard
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ConfigError

CURVE = json.loads(json.dumps(standard().to_json()))
FULL = Cost(flops=1000, memory=2000, bytes_up=300, bytes_down=400, work=1500)
WHO = ClientDescription(client=2, examples=10, clients=4)


@pytest.mark.parametrize(
    "entry,text,value",
    [
        ("flops", "2 GFLOP", 2e9),
        ("flops", "1.5TFLOPs", 1.5e12),
        ("memory", "512 MiB", 512 * 2**20),
        ("bytes-up", "10 kB", 1e4),
        ("bytes-down", 12345, 12345),
        ("speed", "10 GFLOP/s", 1e10),
        ("bandwidth-up", "8 Mbit/s", 1e6),
        ("bandwidth-down", "1 MB/s", 1e6),
        ("deadline", "30 s", 30),
        ("deadline", "500 ms", 0.5),
        ("deadline", "2 min", 120),
        ("deadline", "1 h", 3600),
        ("deadline", 45, 45),
    ],
)
def test_units(entry, text, value):
    got = getattr(Budget.from_mapping({entry: text}), entry.replace("-", "_"))
    assert (got.value if isinstance(got, Amount) else got) == value


def test_shares_are_of_full_fine_tuning_and_absent_entries_are_no_limit():
    budget = Budget.from_mapping({"flops": "40 %", "memory": "100%", "bytes-up": "100 B"})
    assert budget.capacity(FULL).tolist() == [400, 2000, 100, UNLIMITED]


@given(st.integers(1, 2**52))
def test_a_whole_share_is_exactly_everything(full):
    assert Amount(1.0, relative=True).resolve(full) == full


def test_simulated_seconds_add_download_compute_and_upload():
    budget = Budget.from_mapping(
        {"speed": "100 FLOP/s", "bandwidth-up": "100 B/s", "bandwidth-down": "200 B/s"}
    )
    assert budget.seconds(FULL) == pytest.approx(1500 / 100 + 300 / 100 + 400 / 200)


def test_a_budget_survives_the_wire():
    budget = Budget.from_mapping(
        {"flops": "33.3 %", "memory": "1 GiB", "speed": "3 FLOP/s", "deadline": "500 ms"}
    )
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget


@pytest.mark.parametrize(
    "entries",
    [
        {"curve": "curve.json"}, {"flops": "40 %"}, {"speed": "1"},
        {"speed": 5e-324}, {"flops": 1e308}, {"bandwidth_up": 1e-19}, {"deadline": 2e30},
        {"flops": {"share": 1e31}}, {"memory": 10**400}, {"device": "x" * 61}, {"device": 3},
        {"device": "a\nb"}, {"device": "\x1b[2J"}, {"device": "\ud800"}, {"x" * 10**6: 1},
        {"curve": CURVE | {"threads": 10**9}}, {"curve": CURVE | {"threads": True}},
        {"curve": CURVE | {"source": "x" * 301}}, {"curve": CURVE | {"step": 1e31}},
        {"curve": CURVE | {"rows": [*range(1, 102)]}}, {"curve": CURVE | {"tokens": [1e-19]}},
        [], "budget", 3, None,
    ],
)  # fmt: skip
def test_what_another_machine_sends_is_bounded_and_no_path(entries, tmp_path, monkeypatch):
    """Within the bounds no quotient is infinite: the largest count over the smallest rate."""
    monkeypatch.chdir(tmp_path)
    Path("curve.json").write_text(json.dumps(CURVE))
    with pytest.raises(ConfigError) as error:
        Budget.from_json(entries, "client 3")
    assert str(error.value).startswith("client 3")
    assert math.isfinite(2**62 / LEAST)


def test_the_bounds_of_figures_are_in_them():
    budget = Budget.from_json(
        {"speed": LEAST, "deadline": MOST, "flops": 0, "device": "x" * 60, "curve": CURVE}
    )
    assert (budget.speed, budget.deadline, budget.flops) == (LEAST, MOST, Amount(0.0))
    assert Budget.from_json(budget.to_json()) == budget


def test_a_fraction_of_a_byte_survives_the_wire():
    """A trace may make one; people who write one mean a share."""
    budget = Trace("list", (0.5,)).apply(Budget.from_mapping({"memory": 1}), 0, 1)
    assert Budget.from_json(budget.to_json()) == budget


@pytest.mark.parametrize(
    "entries,message",
    [
        ({"flops": "-40 %"}, "negative"),
        ({"memory": -1}, "negative"),
        ({"flops": "lots"}, "cannot be read"),
        ({"flops": "2 GB"}, "has unit 'GB'"),
        ({"memory": "512 MIB"}, "has unit 'MIB'"),
        ({"flop": "40 %"}, r"unknown entry 'flop' \(did you mean 'flops'\?\); allowed are flops"),
        ({"flops": 0.4}, 'is less than one: if 0.4 of training everything is meant, write "40 %"'),
        ({"bytes-up": "0.25 B"}, 'write "25 %"'),
        ({"speed": "50 %"}, "unit '%'|absolute"),
        ({"bandwidth-up": "0 B/s"}, "above 0"),
        ({"flops": True}, "cannot be read"),
        ({"flops": float("nan")}, "not finite"),
        ({"deadline": 0}, "above 0"),
        ({"deadline": "-1 s"}, "negative"),
        ({"deadline": "30 S"}, "has unit 'S'"),
        ({"deadline": "30"}, 'has unit \'\'; write something like "30 s" or "2 min"'),
        ({"deadline": "5 %"}, "absolute"),
        ({"deadline": float("inf")}, "not finite"),
        ({"bytes-up": 1, "bytes_up": 2}, "bytes_up is given twice"),
    ],
)
def test_wrong_entries_are_named(entries, message):
    with pytest.raises(ConfigError, match=message) as error:
        Budget.from_mapping(entries, "client 3")
    assert "client 3" in str(error.value)
    assert "\n" not in str(error.value)


def test_built_in_classes_have_a_mean_compute_of_sixty_percent_over_ten_clients():
    source = budget_source("devices", resolve_path)
    shares = [source(ClientDescription(c, 100, 10), 1).flops.value for c in range(10)]
    assert np.mean(shares) == pytest.approx(0.6)


PLUGIN = """
def good(client, round):
    return {"flops": f"{10 * (client.client + round)} %"}

def raises(client, round):
    raise OSError("no battery")

def wrong(client, round):
    return 7

value = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    tmp_path.joinpath("my_budgets.py").write_text(PLUGIN)
    tmp_path.joinpath("my_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_plugin_sees_the_client_and_the_round(plugin):
    source = budget_source("my_budgets:good", resolve_path)
    assert source(WHO, 3).flops == Amount(0.5, relative=True)
    assert source.varies


@pytest.mark.parametrize(
    "spec,message",
    [
        ("my_budgets:raises", "raised OSError: no battery for client 2 in round 1"),
        ("my_budgets:wrong", "returned a int"),
        ("my_budgets:value", "not a callable"),
        ("my_budgets:absent", "has no 'absent'"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("my_broken:f", "raised ZeroDivisionError"),
        ("whatever", "use 'devices', 'hardware', 'measured', a path ending in .toml"),
    ],
)
def test_a_bad_plugin_is_named(plugin, spec, message):
    with pytest.raises(ConfigError, match=message):
        budget_source(spec, resolve_path)(WHO, 1)
