import pytest

from d2ft_fl.config.sources import collect, parse_value


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
