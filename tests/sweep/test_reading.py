from pathlib import Path

import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.sweep.draws import Choice, Span
from d2ft_fl.sweep.reading import read_sweep
from d2ft_fl.sweep.spec import Asha, Group, RunOptions
from d2ft_fl.sweep.trials import expand
from d2ft_fl.sweep.written import toml_sweep

EXAMPLE = Path(__file__).parent.parent.parent / "experiments" / "sweep_example.toml"
WHOLE = """
name = "mine"
config = "common.toml"
seeds = 2

[base]
rounds = 3

[grid]
strategy = ["d2ft", "random", "d2ft"]

[search]
samples = 4
lr = { min = 1e-4, max = 1e-2, log = true }
batch-size = { choice = [8, 16] }

[[group]]
seeds = [5]
base.strategy = "fedavg"

[[group]]
grid = { lora-rank = [2, 4] }
base = { tuning = "lora", budgets = "mine.toml" }
search = { samples = 1, draw-seed = 3, epochs = { min = 1, max = 4 } }

[run]
at-once = 3
asha = { reduction-factor = 2 }
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="s.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_file_says_all_there_is_to_say(write, tmp_path):
    write("clients = 4\nrounds = 9\nbudgets = 'other.toml'", "common.toml")
    sweep = read_sweep(write(WHOLE), ["clients=6"])
    first, second, third = sweep.groups
    assert sweep.name == "mine"
    assert dict(sweep.base) == {
        "clients": 6, "rounds": 3, "budgets": str(tmp_path / "other.toml")
    }  # fmt: skip
    assert first.seeds == (0, 1)
    assert dict(first.grid) == {"strategy": ("d2ft", "random")}
    assert dict(first.search) == {
        "lr": Span(1e-4, 1e-2, log=True), "batch-size": Choice((8, 16))
    }  # fmt: skip
    assert first.samples == 4
    assert second == Group(("group", "0"), base={"strategy": "fedavg"}, seeds=(5,))
    assert third.seeds == (0, 1)
    assert third.draw_seed == 3
    assert dict(third.base) == {"tuning": "lora", "budgets": str(tmp_path / "mine.toml")}
    assert third.search["epochs"] == Span(1, 4)
    assert sweep.run == RunOptions(3, "", Asha(2, 2.0), False)


def test_the_name_is_the_files_and_an_empty_file_is_one_trial(write):
    sweep = read_sweep(write("", "alone.toml"))
    assert sweep.name == "alone"
    assert [trial.settings for trial in expand(sweep)] == [{}]


def test_a_file_of_groups_has_no_trials_beside_them(write):
    sweep = read_sweep(write("seeds = 2\n[[group]]\n[[group]]\nbase.strategy = 'random'"))
    assert [group.place for group in sweep.groups] == [("group", "0"), ("group", "1")]
    assert len(expand(sweep)) == 4


def test_a_sweep_written_out_is_the_same_sweep_elsewhere(write, tmp_path):
    write("clients = 4", "common.toml")
    tmp_path.joinpath("mine.toml").write_text("[classes.a]\nflops = '50 %'")
    sweep = read_sweep(write(WHOLE))
    there = tmp_path / "other" / "folder.toml"
    there.parent.mkdir()
    there.write_text(toml_sweep(sweep))
    again = read_sweep(there)
    assert again == sweep
    assert expand(again) == expand(sweep)


def test_the_example_reads_and_comes_to_what_it_says():
    trials = expand(read_sweep(EXAMPLE))
    assert f"{len(trials)} trials" in EXAMPLE.read_text()
    assert not any(trial.refused for trial in trials)


@pytest.mark.parametrize(
    "text,message",
    [
        ("a = ", "s.toml:1: not TOML"),
        ("\nnam = 'x'", "s.toml:2: nam: unknown key; did you mean 'name'?"),
        ("name = 'a/b'", "s.toml:1: name: 'a/b' is no name of a folder"),
        ("config = 3", "config: \\[?3\\]? is no file"),
        ("config = 'gone.toml'", "gone.toml': No such file"),
        ("[base]\n\nlearning-rat = 1", "s.toml:3: base.learning-rat: unknown option"),
        ("[base]\nround = 1", "did you mean 'rounds'?"),
        ("[base]\nrounds = 'a'", "s.toml:2: base.rounds: rounds = 'a' is a str"),
        ("[base]\nrun-folder = 'x'", "run-folder is each trial's own"),
        ("base = 3", "s.toml:1: base: 3 is no table"),
        ("seeds = 0", "s.toml:1: seeds: 0 must be a whole number, 1 or more"),
        ("seeds = []", "s.toml:1: seeds: no seeds"),
        ("seeds = ['a']", "s.toml:1: seeds: seed = 'a' is a str"),
        ("seeds = true", "seeds: True must be a whole number"),
        ("[grid]", "s.toml:1: grid: the grid is empty"),
        ("[grid]\nlr = []", "s.toml:2: grid.lr: no values"),
        ("[grid]\nlr = 3", r"s.toml:2: grid.lr: 3 is no list; write \[3\]"),
        ("[grid]\nstrategy = 'd2ft'", r'write \["d2ft"\], or put it in \[base\]'),
        ("[grid]\nlr = [1, 'a']", "s.toml:2: grid.lr: lr = 'a' is a str"),
        ("[grid]\nlrr = [1]", "unknown option 'lrr'; did you mean 'lr'?"),
        ("seeds = 2\n[grid]\nseed = [1]", "s.toml:1: seeds: the option seed varies too"),
        ("[search]\nlr = {min = 1, max = 2}", "s.toml:1: search: say how many draws"),
        ("[search]\nsamples = 3", "s.toml:1: search: no option to draw"),
        ("[search]\nsamples = 0\nlr = {min = 1, max = 2}", "s.toml:2: search.samples: 0 must be"),
        ("[search]\nsamples = 2\nlr = [1, 2]", "s.toml:3: search.lr: .* is no distribution"),
        ("[search]\nsamples = 2\nlr = {min = 1}", "s.toml:3: search.lr: .* is no distribution"),
        ("[search]\nsamples = 2\nlr = {min = 2, max = 1}", "min = 2.0 must be below max = 1.0"),
        ("[search]\nsamples = 2\nlr = {min = nan, max = 1}", "min = nan must be below"),
        ("[search]\nsamples = 2\nlr = {min = 0, max = 1, log = true}", "must be above 0 with log"),
        ("[search]\nsamples = 2\nlr = {min = 0, max = 1, log = 1}", "1 must be true or false"),
        ("[search]\nsamples = 2\nlr = {min = 0, max = 1, step = 1}", "search.lr.step: unknown key"),
        ("[search]\nsamples = 2\nlr = {choice = []}", "search.lr: no values"),
        ("[search]\nsamples = 2\nplanner = {min = 'a', max = 'b'}", "planner is no number"),
        ("[search]\nsamples = 2\nslots = {min = 1.5, max = 2}", "slots = 1.5 is a float"),
        (
            "[search]\nsamples = 2\nlr = {min = 1, max = 2}\n[grid]\nlr = [1]",
            r"s.toml:3: search.lr: is in \[grid\] too",
        ),
        ("group = 3", "s.toml:1: group: no table; begin each group with"),
        ("[[group]]\n[[group]]\nruns = 3", "s.toml:3: group.runs: unknown key; known are seeds"),
        (
            "[[group]]\n[group.grid]\nlr = [1]\n[[group]]\n[group.grid]\nlr = ['a']",
            "s.toml:6: group.grid.lr: lr = 'a' is a str",
        ),
        ("[run]\nat_once = 3", "s.toml:2: run.at_once: unknown key; did you mean 'at-once'?"),
        ("[run]\nat-once = 0.5", "s.toml:2: run.at-once: 0.5 must be a whole number"),
        ("[run]\naddress = 3", "s.toml:2: run.address: 3 is no string"),
        ("[run]\nkeep-models = 'yes'", "'yes' must be true or false"),
        ("[run]\nasha = 3", "s.toml:2: run.asha: 3 must be true, false or a table"),
        ("[run]\nasha = { grace = 3 }", "run.asha.grace: unknown key"),
        ("[run]\nasha = { grace-rounds = 0 }", "run.asha: 0 must be a whole number, 1 or more"),
        ("[run]\nasha = { reduction-factor = 1 }", "reduction-factor = 1 must be a number above 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_names_its_own(text, message, write):
    with pytest.raises(ConfigError, match=message) as error:
        read_sweep(write(text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text_is_said(tmp_path, write):
    with pytest.raises(ConfigError, match="No such file"):
        read_sweep(tmp_path / "gone.toml")
    path = write("")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is UTF-16; save it as UTF-8"):
        read_sweep(path)


@pytest.mark.parametrize(
    "pair,message",
    [
        ("lr=1", "--set lr: s.toml varies it"),
        ("strategy=d2ft", "--set strategy: s.toml varies it"),
        ("seed=1", "--set seed: s.toml varies it"),
        ("rounds=x", "--set: rounds = 'x' is a str"),
        ("rounds", "is not key=value"),
        ("run-folder=x", "--set: run-folder is each trial's own"),
    ],
)
def test_the_command_line_changes_what_trials_have_in_common(pair, message, write):
    text = "seeds = 2\n[grid]\nlr = [1]\n[[group]]\nbase.strategy = 'random'"
    with pytest.raises(ConfigError, match=message):
        read_sweep(write(text), [pair])


def test_old_names_of_options_are_read_everywhere_in_a_file(write):
    """In base, grid and search, in files, and by ``--set``; both names at once are refused."""
    write("accumulate = 2\n", "common.toml")
    assert read_sweep(write('config = "common.toml"')).base["micro-batches"] == 2
    assert read_sweep(write("[base]\naccumulate = 3\n")).base == {"micro-batches": 3}
    assert read_sweep(write(""), ["accumulate=4"]).base == {"micro-batches": 4}
    (group,) = read_sweep(write("[grid]\naccumulate = [1, 2]\n")).groups
    assert group.grid == {"micro-batches": (1, 2)}
    draws = "[search]\nsamples = 1\naccumulate = { choice = [1, 2] }\n"
    assert read_sweep(write(draws)).groups[0].search == {"micro-batches": Choice((1, 2))}
    with pytest.raises(ConfigError, match=r"s.toml:1: base: accumulate is the old name"):
        read_sweep(write("[base]\naccumulate = 3\nmicro-batches = 3\n"))
    with pytest.raises(ConfigError, match=r"s.toml:3: grid.micro-batches: "):
        read_sweep(write("[grid]\nlr = [1e-4]\naccumulate = ['many']\n"))
