import json
import tomllib

import pytest
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from d2ft_fl.errors import ConfigError
from d2ft_fl.sweep.command import sweep
from d2ft_fl.sweep.remote import Outcome
from tests.sweep.fake_trials import FakeEngine

TEXT = """
seeds = 2
[base]
rounds = 3
[grid]
lr = [1e-3, 2e-3]
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    return path


def test_the_same_command_goes_on_where_it_was_stopped(file, tmp_path, capsys):
    first, second, third = FakeEngine(interrupt=2), FakeEngine(), FakeEngine()
    with pytest.raises(KeyboardInterrupt):
        sweep(file, engine=first)
    assert "2 of 4 trials done; the same command goes on" in capsys.readouterr().out
    assert sweep(file, engine=second) == 0
    said = capsys.readouterr().out
    assert sweep(file, engine=third) == 0
    assert (len(first.ran), len(second.ran), third.ran) == (2, 2, [])
    assert len({*first.ran, *second.ran}) == 4
    assert "4 trials, 2 to run" in said
    assert "20.0 ± 0.0" in said
    (folder,) = (tmp_path / "data" / "d2ft-fl" / "sweeps").iterdir()
    assert folder.name.startswith("mine-")
    assert {p.name for p in folder.iterdir()} == {
        "sweep.toml", "trials.json", "trials", "results.parquet", "results.csv", "starts.log",
        "sweep.lock",
    }  # fmt: skip
    listed = json.loads(folder.joinpath("trials.json").read_text())
    assert [(t["status"], t["settings"]["seed"]) for t in listed] == [
        ("finished", 0), ("finished", 0), ("finished", 1), ("finished", 1)
    ]  # fmt: skip


def test_another_sweep_has_another_folder_unless_one_is_named(file, tmp_path):
    engines = [FakeEngine() for _ in range(4)]
    sweep(file, engine=engines[0])
    sweep(file, ["rounds=4"], engine=engines[1])
    sweep(file, output=tmp_path / "own", engine=engines[2])
    file.write_text(TEXT.replace("2e-3", "2e-3, 3e-3"))
    sweep(file, output=tmp_path / "own", engine=engines[3])
    assert [len(engine.ran) for engine in engines] == [4, 4, 4, 2]
    assert len(list((tmp_path / "data" / "d2ft-fl" / "sweeps").iterdir())) == 2


def test_the_folder_holds_the_sweep_as_it_was_asked_for(file, tmp_path):
    sweep(file, ["clients=4"], output=tmp_path / "own", engine=FakeEngine())
    written = tomllib.loads((tmp_path / "own" / "sweep.toml").read_text())
    assert written["base"] == {"rounds": 3, "clients": 4}
    assert written["seeds"] == [0, 1]
    engine = FakeEngine()
    sweep(tmp_path / "own" / "sweep.toml", output=tmp_path / "own", engine=engine)
    assert engine.ran == []


def test_failures_are_listed_and_run_again_when_asked(file, capsys):
    bad = {2e-3: Outcome("failed", "OSError: no disk")}
    assert sweep(file, engine=FakeEngine(bad)) == 1
    said = capsys.readouterr().out
    assert "4 trials: 2 finished, 2 failed" in said
    assert said.count(" lr=0.002 seed=0: OSError: no disk") == 1
    again, asked = FakeEngine(), FakeEngine()
    assert sweep(file, engine=again) == 1
    assert sweep(file, engine=asked, retry_failed=True) == 0
    assert (len(again.ran), len(asked.ran)) == (0, 2)


def test_a_sweep_in_which_nothing_can_run_says_so_by_its_exit_code(file, capsys):
    bad = dict.fromkeys((1e-3, 2e-3), Outcome("refused", "clients = 500 is more"))
    assert sweep(file, engine=FakeEngine(bad)) == 2
    assert "4 trials: 4 refused" in capsys.readouterr().out


def test_a_refused_trial_alone_is_no_failure(file):
    assert sweep(file, engine=FakeEngine({1e-3: Outcome("refused", "no")})) == 0


def test_json_is_all_that_is_printed(file, capsys):
    engine = FakeEngine({2e-3: Outcome("stopped", "after round 2 of 3, behind the others")})
    assert sweep(file, engine=engine, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in found["trials"]] == ["finished", "stopped"] * 2
    assert found["settings"][0]["settings"] == {"lr": 1e-3}
    assert found["settings"][0]["accuracy"] == pytest.approx(0.1)
    assert found["settings"][1]["accuracy"] is None


def test_a_dry_run_lists_trials_and_touches_nothing(file, tmp_path, capsys):
    sweep(file, dry_run=True)
    said = capsys.readouterr().out
    assert "4 trials" in said
    assert said.count("waiting") == 4
    assert not (tmp_path / "data").exists()
    sweep(file, dry_run=True, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert [t["settings"]["lr"] for t in listed["trials"]] == [1e-3, 2e-3] * 2


def test_a_plain_log_has_a_line_for_every_trial(file, capsys):
    sweep(file, engine=FakeEngine())
    lines = [line for line in capsys.readouterr().out.splitlines() if ": accuracy" in line]
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert lines[0].split()[2:] == ["lr=0.001", "seed=0:", "accuracy", "10.0%,", "2", "s"]


def test_every_compiled_solver_is_there_before_trials_ask_for_it(file):
    file.write_text(TEXT + "coupling = ['none', 'spread', 'agenda']")
    asked = []
    sweep(file, engine=FakeEngine(), prepare=lambda config, quiet: asked.append(config.coupling))
    assert sorted(asked) == ["agenda", "none", "spread"]


def test_a_second_sweep_in_the_same_folder_is_refused(file, tmp_path):
    class Nosy(FakeEngine):
        def __call__(self, todo, ledger, scratch):
            with pytest.raises(ConfigError, match="another d2ft sweep is at work"):
                sweep(file, engine=FakeEngine())
            super().__call__(todo, ledger, scratch)

    assert sweep(file, engine=Nosy()) == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["gone.toml"], "sweep 'gone.toml': No such file"),
        (["mine.toml", "--set", "lr=1"], "--set lr: mine.toml varies it"),
        (["mine.toml", "--set", "clients=0"], "--set: clients = 0 must be 1 or more"),
        (["mine.toml", "--address", "ray://10.0.0.1:10001"], "name its head like 10.0.0.1:6379"),
        (["mine.toml", "--address", "local"], "address = 'local' is none"),
    ],
)
def test_the_command_refuses_in_one_line_with_exit_code_2(arguments, message, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    result = CliRunner().invoke(app, ["sweep", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_sweep_for_a_gpu_can_be_looked_at_without_one(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sweep(file, ["device=cuda"], dry_run=True) == 0
    assert "4 trials" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="device = 'cuda': torch finds no usable GPU here"):
        sweep(file, ["device=cuda"], output=tmp_path / "own", engine=FakeEngine())
    assert not (tmp_path / "own").exists()
    engine = FakeEngine()
    assert sweep(file, ["device=cuda"], address="10.0.0.1:6379", engine=engine) == 0
    assert len(engine.ran) == 4


def test_the_file_of_a_sweep_is_not_written_over(file, tmp_path):
    own = file.rename(tmp_path / "sweep.toml")
    assert sweep(own, output=tmp_path, engine=FakeEngine()) == 0
    assert own.read_text() == TEXT


def test_a_page_that_cannot_be_made_costs_no_result(file, monkeypatch, capsys):
    def broken(folder):
        raise KeyError("plan_seconds")

    monkeypatch.setattr("d2ft_fl.report.pages.sweep_page", broken)
    assert sweep(file, engine=FakeEngine()) == 0
    assert "no report: KeyError: 'plan_seconds'" in capsys.readouterr().out
    assert sweep(file, as_json=True, engine=FakeEngine()) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 4
