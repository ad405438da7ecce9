"""``d2ft report``."""

import json

import pytest
from typer.testing import CliRunner

from d2ft_fl.cli.main import app
from tests.report.made_up import simple_run, write_sweep


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_runs_page_lies_in_its_folder(tmp_path):
    done = report(simple_run(tmp_path))
    assert done.exit_code == 0, done.output
    assert done.output == f"report: {tmp_path / 'report.html'}\n"
    assert "<h1>d2ft: 2 clients" in (tmp_path / "report.html").read_text()


def test_a_sweeps_page_is_told_from_a_runs(tmp_path):
    output = tmp_path / "page.html"
    folder = write_sweep(tmp_path / "sweep", [({"lr": 0.1}, 0.5), ({"lr": 0.2}, 0.6)])
    done = report(folder, "--output", output, "--json")
    assert json.loads(done.output) == {"kind": "sweep", "report": str(output)}
    assert "<h1>Sweep of lr: 2 settings" in output.read_text()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["empty"], "'empty' is neither the folder of a run, which has rounds.jsonl, nor that of"),
        (["begun"], "has no finished round yet (running)"),
        (["damaged"], "is not JSON in line 1: the folder is damaged, or not written by d2ft"),
        (["run", "--output", "page.png"], "'page.png' must end in .html"),
        (["run", "--output", "no/page.html"], "there is no folder 'no'"),
        (["run", "--output", "taken.html"], "'taken.html' cannot be written: Is a directory"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "taken.html"):
        (tmp_path / name).mkdir()
    simple_run(tmp_path / "run")
    (simple_run(tmp_path / "damaged") / "rounds.jsonl").write_text("no\n")
    begun = simple_run(tmp_path / "begun", status="running")
    (begun / "rounds.jsonl").unlink()
    done = report(*arguments)
    assert done.exit_code == 2
    assert done.output.startswith("d2ft: ")
    assert message in done.output
    assert done.output.count("\n") == 1


def test_help_says_what_the_argument_is():
    """Some pairs of Typer and Click leave that out."""
    assert "The folder of a run, or of a sweep." in " ".join(report("--help").output.split())
