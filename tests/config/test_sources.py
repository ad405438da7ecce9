from pathlib import Path

import pytest

from d2ft_fl.config.sources import collect, parse_value
from d2ft_fl.errors import ConfigError


def test_later_files_and_pairs_win_and_paths_start_at_their_file(tmp_path):
    budgets = tmp_path / "sub" / "mine.toml"
    budgets.parent.mkdir()
    budgets.write_text("[classes.a]\nflops = '50 %'")
    first, second = tmp_path / "a.toml", tmp_path / "sub" / "b.toml"
    first.write_text("rounds = 3\nclients = 4")
    second.write_text("rounds = 5\nbudgets = 'mine.toml'")
    config = collect([first, second], ["clients=6", "strategy=random"])
    assert (config.rounds, config.clients, config.strategy) == (5, 6, "random")
    assert config.budgets == str(budgets)


@pytest.mark.parametrize(
    "text,value", [("3", 3), ("0.5", 0.5), ("true", True), ("d2ft", "d2ft"), ('"7"', "7")]
)
def test_values_are_spelled_as_in_toml_or_are_strings(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    "pair,field,value",
    [
        ("run-folder=2026-11-29", "run_folder", "2026-11-29"),
        ("run-folder='my runs'", "run_folder", "my runs"),
        ("label-column=1", "label_column", "1"),
        ("label-column=true", "label_column", "true"),
        ("lora-ranks=2, 4", "lora_ranks", "2, 4"),
        ('classes=["a", "b, c"]', "classes", '["a", "b, c"]'),
        ("partitioner-args=alpha = 0.5, seed = 1", "partitioner_args", "alpha = 0.5, seed = 1"),
        ('budgets="measured"', "budgets", "measured"),
        ("test-split='", "test_split", "'"),
    ],
)
def test_a_text_option_takes_the_text_as_it_is(pair, field, value):
    found = getattr(collect([], [pair]), field)
    assert (Path(found).name if field == "run_folder" else found) == value


@pytest.mark.parametrize("pair", ["rounds=2026-11-29", "rounds=[1]", "compensation=yes"])
def test_other_options_are_still_of_their_type(pair):
    with pytest.raises(ConfigError, match=pair.split("=")[0]):
        collect([], [pair])


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbfrounds = 3")
    assert collect([file], []).rounds == 3
    file.write_bytes("rounds = 3".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a.toml' is UTF-16; save it as UTF-8"):
        collect([file], [])
    file.write_bytes(b"model = 'caf\xe9'")
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 12\); save it as UTF-8"):
        collect([file], [])
