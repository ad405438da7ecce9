import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2ft_fl.cli import options, options_page
from d2ft_fl.cli.main import app
from d2ft_fl.config.run_config import OPTIONS, RunConfig
from d2ft_fl.config.sources import collect
from d2ft_fl.util import terminal

ROOT = Path(__file__).parents[2]
STALE = "an option has changed: run `make options`"


def call(*arguments):
    return CliRunner().invoke(app, ["options", *arguments])


def test_pyproject_has_the_options_as_their_fields_do():
    text = (ROOT / "pyproject.toml").read_text()
    assert options_page.with_section(text) == text, STALE


def test_the_page_of_options_is_as_their_fields_are():
    assert (ROOT / "docs" / "options.md").read_text() == call("--markdown").stdout, STALE


def test_the_printed_file_is_the_default_configuration(tmp_path):
    file = tmp_path / "all.toml"
    file.write_text(call("--toml").stdout)
    assert collect([file], []) == RunConfig()
    assert max(map(len, file.read_text().splitlines())) <= 100


@pytest.mark.parametrize(
    "value,text", [(5e-4, "5e-4"), (1e-5, "1e-5"), (0.01, "0.01"), (-10.0, "-10.0"), (0.0, "0.0"),
                   (1.5e-3, "1.5e-3"), (True, "true"), (3, "3"), ("a, b", '"a, b"')]
)  # fmt: skip
def test_values_are_spelled_as_toml_has_them(value, text):
    assert options_page.toml_value(value) == text


@pytest.mark.parametrize("width", [80, 120])
def test_all_options_fit_a_terminal_in_full(monkeypatch, width):
    console = type(terminal.console)(highlight=False, soft_wrap=True, width=width, record=True)
    monkeypatch.setattr(options, "console", console)
    assert call().exit_code == 0
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    words = "".join("".join(line.split("│")[3:4]).strip() + " " for line in lines).split()
    for one in OPTIONS.values():
        assert any(line.split("│")[1].strip() == one.key for line in lines if "│" in line), one.key
        assert one.text.split()[0] in words


def test_an_option_in_full_says_all_of_it():
    said = call("lora-aggregation")
    assert said.exit_code == 0
    assert said.stdout.startswith('lora-aggregation = "factors"\n')
    assert OPTIONS["lora-aggregation"].text.split()[-1] in said.stdout
    assert "factors, freeze-a, alternate, freeze-common, product, stack" in said.stdout
    assert "Tuning and LoRA" in said.stdout


def test_a_program_can_read_them():
    entries = {e["name"]: e for e in json.loads(call("--json").stdout)}
    assert list(entries) == list(OPTIONS)
    assert {name: e["default"] for name, e in entries.items()} == RunConfig().to_mapping()
    assert entries["trim-share"]["range"] == {"low": 0, "below": 0.5}
    assert entries["round-timeout"]["unit"] == "seconds"


def test_a_mistyped_name_gets_the_nearest_one_in_one_line():
    said = call("bach-size")
    assert said.exit_code == 2
    assert said.stderr == "d2ft: unknown option 'bach-size'; did you mean 'batch-size'?\n"


def test_an_old_name_says_the_new_one_beside_the_output():
    said = call("accumulate", "--json")
    assert said.stderr == "d2ft: option accumulate is called micro-batches now\n"
    assert [e["name"] for e in json.loads(said.stdout)] == ["micro-batches"]
