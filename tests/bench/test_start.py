"""What start-up figures are made of; nothing is timed here."""

import ast
import os
import sys
import tomllib

import pytest

from d2ft_fl.bench import start
from d2ft_fl.cli import bench_tables
from d2ft_fl.errors import ConfigError, RunError

PRINTS = "print('d2ft: 10 clients'); print('  round accuracy'); print('      1    81.8%'); {}"


def run(code):
    return start.first_round([sys.executable, "-c", code], dict(os.environ))


def test_the_first_line_and_the_first_rounds_are_found():
    found = run(PRINTS.format("print('     10    90%')"))
    assert found.keys() == {"first_line", "first_round"}
    assert 0 < found["first_line"] <= found["first_round"]


@pytest.mark.parametrize(
    "code", [PRINTS.format("raise SystemExit('no budget')"), "print('     11    81.8%')"]
)
def test_a_run_that_fails_or_shows_no_round_is_an_error(code):
    with pytest.raises(RunError, match="failed: no"):
        run(code)


def test_what_follows_from_medians():
    found = start.summary(
        {
            "imports": 5.0,
            "local_begins": 6.5,
            "local_first_round": 8.0,
            "local_cold_first_round": 17.0,
            "flower_minimal": 10.0,
            "flower_first_round": 12.5,
            "flower_cold_first_round": 30.0,
        }
    )
    assert found["local_begins_after_imports"] == 1.5
    assert found["local_compiling"] == 9.0
    assert found["flower_ratio"] == 1.25
    assert found["flower_compiling"] == 17.5
    assert found["flower_cold_after_minimal"] == 20.0
    assert start.summary({"help": 0.3}) == {"help": 0.3}


def test_parts_and_repeats_are_checked():
    with pytest.raises(ConfigError, match="--part 'all' is unknown; use one of lists"):
        start.bench_start(("all",), 1)
    with pytest.raises(ConfigError, match="--repeats = 0"):
        start.bench_start(("lists",), 0)


def test_figures_are_medians_of_turns(monkeypatch, capsys):
    times = iter([1.0, 10.0, 3.0, 30.0, 2.0, 50.0])
    monkeypatch.setattr(start, "seconds_of", lambda command, environment: next(times))
    found = start.bench_start(("lists",), 3)
    assert found == {"help": 2.0, "strategies": 30.0}
    bench_tables.start_table(found)
    assert "2.00" in capsys.readouterr().out


def test_private_memory_is_read():
    kept = bytearray(os.urandom(1)) * 50_000_000
    assert start.private_dirty(os.getpid()) > len(kept)


def test_the_smallest_app_is_whole():
    project = tomllib.loads(start.MINIMAL_PROJECT)
    tree = ast.parse(start.MINIMAL_APP.format(done="/a"))
    names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    apps = project["tool"]["flwr"]["app"]["components"].values()
    assert {app.split(":")[1] for app in apps} <= names
