import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from d2ft_fl.budgets.budget import ClientDescription
from d2ft_fl.budgets.device_classes import BUILTIN, ByShare, named, read_devices
from d2ft_fl.budgets.sources import budget_source
from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import resolve_path
from d2ft_fl.errors import ConfigError

MINE = """
[mix]
phone = 3
laptop = 1

[classes.phone]
flops = "40 %"
speed = "10 GFLOP/s"
deadline = "2 min"
trace = [1, 0.5]

[classes.laptop]
memory = "1 GiB"
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "budgets.toml"
        path.write_text(text)
        return path

    return write


def who(client):
    return ClientDescription(client, 10, 10**6)


# -- shares


@given(
    st.lists(st.one_of(st.integers(1, 300), st.floats(0.01, 50)), min_size=1, max_size=12),
    st.integers(1, 600),
)
def test_the_first_clients_are_within_one_of_every_share(shares, clients):
    mix = ByShare.of({str(i): share for i, share in enumerate(shares)})
    given = dict.fromkeys(mix.names, 0)
    for client in range(clients):
        given[mix(client)] += 1
        for name, weight in zip(mix.names, mix.weights, strict=True):  # exact, in whole numbers
            apart = given[name] * sum(mix.weights) - weight * (client + 1)
            assert abs(apart) < sum(mix.weights)


def test_where_giving_to_the_most_owed_goes_wrong():
    """Nine rare classes wait while three frequent ones take turns: 1.44 behind, by that rule."""
    weights = [1, 100, 3, 1, 3, 100, 1, 3, 2, 100, 2, 1]
    mix = ByShare.of({str(i): w for i, w in enumerate(weights)})
    names = [mix(client) for client in range(sum(weights))]
    assert [names.count(name) for name in mix.names] == weights
    for count in range(1, len(names)):
        for name, weight in zip(mix.names, weights, strict=True):
            assert abs(names[:count].count(name) - weight * count / sum(weights)) < 1


def test_shares_by_hand():
    # The first may be either's; the phone's second is due at 2 / 0.6, the laptop's first at 2.5.
    mix = ByShare.of({"phone": 0.6, "laptop": 0.4})
    assert [mix(c)[0] for c in range(10)] == list("plppl" * 2)


def test_equal_shares_are_dealt_in_the_order_of_the_file():
    mix = ByShare.of({"a": 1, "b": 1, "c": 1})
    assert [mix(c) for c in range(6)] == list("abcabc")


def test_shares_are_ratios_of_the_decimals_as_written():
    assert ByShare.of({"a": 0.1, "b": 0.3}) == ByShare.of({"a": 10, "b": 30})
    assert ByShare.of({"a": 0.1, "b": 0.3}).weights == (1, 3)
    assert ByShare.of({"a": 0.1, "b": 0.3}).share("b") == 0.75


def test_ten_thousand_clients_are_dealt_in_no_time():
    mix = ByShare.of({str(i): 0.1234567 + i for i in range(8)})
    started = time.perf_counter()
    names = [mix(client) for client in range(10_000)]
    assert time.perf_counter() - started < 2  # 0.1 s on one core
    total = sum(mix.weights)
    for name, weight in zip(mix.names, mix.weights, strict=True):
        assert abs(names.count(name) - 10_000 * weight / total) < 1


# -- files


def test_a_file_of_shares_traces_and_deadlines(file):
    source = read_devices(file(MINE))
    assert [source(who(c), 1).device for c in range(4)].count("phone") == 3
    assert source.varies
    first, second, third = (source(who(0), round) for round in (1, 2, 3))
    assert first.deadline == 120
    assert (first.flops.value, second.flops.value, second.speed) == (0.4, 0.2, 5e9)
    assert third == first


def test_a_list_is_dealt_in_turn_and_no_mix_is_all_classes(file):
    classes = "[classes.a]\n[classes.b]\n"
    for mix, names in (('mix = ["b", "b", "a"]\n', "bbabba"), ("", "ababab")):
        source = read_devices(file(mix + classes))
        assert [source(who(c), 1).device for c in range(6)] == list(names)
        assert not source.varies


def test_a_class_without_a_share_gets_no_client(file):
    source = read_devices(file("[mix]\na = 1\n[classes.a]\n[classes.b]\n"))
    assert source.counts(5) == {"a": 5, "b": 0}


A = "[classes.a]\n"


@pytest.mark.parametrize(
    "text,line,message",
    [
        ("\n\n[devices.a]\nflops = '40 %'", 3, "unknown table 'devices'; allowed are classes, mix"),
        ("mix = ['a']", 1, r"no device class; write a table \[classes.NAME\]"),
        ("# none\n[classes]", 2, "no device class"),
        ("\n[classes]\na = 3", 3, r"classes.a is 3; write a table \[classes.a\]"),
        (
            A + "# two\nfops = 1",
            3,
            "classes.a: unknown entry 'fops'; allowed .*curve, trace",
        ),
        (A + "device = 'x'", 2, "unknown entry 'device'"),
        (A + "memory = '1 MiB'\nmemory-up = 1", 3, "unknown entry 'memory-up'"),
        (A + "\nmemory = '-1 MiB'", 3, "memory = '-1 MiB' is negative"),
        (A + f"memory = {10**400}", 2, "is negative or not finite"),
        (A + "speed = '5 %'", 2, "speed = '5 %' must be absolute and above 0"),
        (A + "flops = 1\nbytes-up = 1\nbytes_up = 2", 4, "bytes-up is given twice"),
        (A + "speed = 1\ndeadline = '0 s'", 3, "deadline = '0 s' must be absolute and above 0"),
        (A + "speed = 1\ndeadline = 'soon'", 3, 'cannot be read; write something like "30 s"'),
        (A + "speed = 1\ndeadline = inf", 3, "not finite"),
        (A + "deadline = '30 s'\nflops = 1", 2, "deadline has no effect without a speed or"),
        (
            A + "speed = 1\ntrace = 'solar'",
            3,
            "'solar' is unknown; use 'battery', 'load'",
        ),
        (A + "flops = 1\ntrace = [\n 1,\n 2,\n]", 3, r"trace = \[1, 2\] is unknown"),
        (A + "memory = 1\ntrace = 'battery'", 3, "trace has nothing to scale; write one of flops,"),
        ("mix = [\n 'b',\n]\n" + A, 1, r"mix = \['b'\] must list names among a"),
        ("\nmix = []\n" + A, 2, "must list names"),
        ("mix = [['a', 2]]\n" + A, 1, "must list names"),
        (A + "[mix]\na = 1\nb = 1", 4, "mix.b = 1 is of an unknown class; use names among a"),
        (A + "[mix]\n\na = 0", 4, "mix.a = 0 is no share; write a number above 0"),
        (A + "[mix]\na = -0.5", 3, "is no share"),
        (A + "[mix]\na = nan", 3, "is no share"),
        (A + "[mix]\na = inf", 3, "is no share"),
        (A + "[mix]\na = true", 3, "is no share"),
        (A + "[mix]\na = '60 %'", 3, "is no share"),
        (A + "[mix]", 2, "must list names"),
        (A + "flops = '40 %'\nflops = '50 %'", 3, ":3: not TOML: "),
        (A + "flops = '40 %'\nflops = '50 %'\n\nspeed = 1", 3, ":3: not TOML: "),
        (A + "flops = 40 %\n", 2, ":2: not TOML: "),
        ("mix = [\n 'a',\n", 2, ":2: not TOML: "),
    ],
)
def test_an_error_names_its_line(file, text, line, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_devices(file(text))
    assert str(error.value).startswith(f"budgets.toml:{line}: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml.*No such file"):
        read_devices(tmp_path / "nowhere.toml")


# -- built-in classes


def test_real_hardware_is_absolute_and_says_how_long_everything_takes():
    source = named("hardware")
    assert not source.varies
    assert set(source.mix.names) == set(source.classes)
    for device in source.classes.values():
        b = device.budget
        assert not b.memory.relative
        assert 2**30 <= b.memory.value <= 2**33
        assert 1e10 < b.speed < 1e12
        assert 1e6 < b.bandwidth_up < b.bandwidth_down < 1e8  # bytes/s
        assert b.flops is b.bytes_up is b.bytes_down is b.deadline is None


def test_the_pis_figures_as_published():
    budgets = {name: device.budget for name, device in named("hardware").classes.items()}
    assert budgets["pi-5"].speed / budgets["pi-4"].speed == pytest.approx(30.249 / 11.889, rel=0.01)


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_classes_are_budgets_of_a_run(name):
    assert budget_source(name, resolve_path) == named(name)


# -- d2ft budgets


def test_the_command_shows_what_a_file_means(file):
    result = CliRunner().invoke(app, ["budgets", str(file(MINE)), "--clients", "8"])
    assert result.exit_code == 0
    phone, laptop = (
        next(line for line in result.output.splitlines() if f" {name} " in line)
        for name in ("phone", "laptop")
    )
    for text in ("75.0%", " 6 ", "40 %", "10 GFLOP/s", "120 s", "[1, 0.5]"):
        assert text in phone
    for text in ("25.0%", " 2 ", "1.07 GB"):
        assert text in laptop


def test_the_command_prints_json(file):
    result = CliRunner().invoke(app, ["budgets", str(file(MINE)), "--json"])
    found = json.loads(result.output)
    assert found["varies"]
    assert [(row["class"], row["share"], row["clients"]) for row in found["classes"]] == [
        ("phone", 0.75, 8),  # 7.5 of 10, and the first in the file
        ("laptop", 0.25, 2),
    ]
    assert found["classes"][0]["trace"] == "[1, 0.5]"
    assert found["classes"][0]["budget"]["deadline"] == 120


@pytest.mark.parametrize("name", BUILTIN)
def test_the_command_knows_built_in_names(name):
    result = CliRunner().invoke(app, ["budgets", name])
    assert result.exit_code == 0
    assert "phone" in result.output


@pytest.mark.parametrize(
    "source,message",
    [
        ("rich", "use devices, hardware, or a path ending in .toml"),
        ("nowhere.toml", "No such file"),
        ("measured", "are not device classes"),
    ],
)
def test_the_command_refuses_in_one_line_with_exit_code_2(source, message):
    result = CliRunner().invoke(app, ["budgets", source])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_wrong_file_ends_the_command_with_its_line(file):
    result = CliRunner().invoke(app, ["budgets", str(file(A + "flops = 'many'"))])
    assert result.exit_code == 2
    assert result.output.startswith("d2ft: budgets.toml:2: classes.a: flops = 'many' cannot")
