import logging

import pytest

from d2ft_fl.config import renamed as module
from d2ft_fl.config.renamed import RENAMED, first_names, policy_entries, renamed
from d2ft_fl.config.run_config import OPTIONS, RunConfig
from d2ft_fl.config.sources import collect
from d2ft_fl.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(module, "_told", set())


def test_old_names_are_none_of_todays_and_stand_for_some():
    assert not RENAMED.keys() & OPTIONS.keys()
    assert set(RENAMED.values()) <= OPTIONS.keys()


def test_an_old_name_is_accepted_and_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        for count in (2, 3):
            config = RunConfig.from_mapping({"rounds": 4, "accumulate": count})
            assert (config.rounds, config.micro_batches) == (4, count)
    assert caplog.messages == ["d2ft: option accumulate is called micro-batches now"]


def test_what_nobody_can_change_is_read_without_a_word(caplog):
    assert renamed({"accumulate": 2}, quietly=True) == {"micro-batches": 2}
    assert not caplog.messages


@pytest.mark.parametrize("order", [1, -1])
def test_an_option_under_both_names_is_refused(order):
    entries = dict([("accumulate", 2), ("micro-batches", 2)][::order])
    with pytest.raises(ConfigError, match="accumulate is the old name of micro-batches, which is"):
        RunConfig.from_mapping(entries)


def test_files_pairs_and_resumed_runs_go_on_with_old_names(tmp_path):
    """A later source wins under whichever name it says so."""
    run = tmp_path / "run"
    run.mkdir()
    run.joinpath("config.toml").write_text("accumulate = 2\nrounds = 7\n")
    file = tmp_path / "a.toml"
    file.write_text("micro-batches = 3\n")
    assert collect([], [], run).micro_batches == 2
    assert collect([file], [], run).micro_batches == 3
    assert collect([file], ["accumulate=4"], run).micro_batches == 4
    assert collect([file], [], run).rounds == 7


def test_identities_go_by_the_first_names():
    assert first_names({"micro-batches": 2, "rounds": 1}) == {"accumulate": 2, "rounds": 1}


def test_policies_on_record_are_read_under_old_and_new_names():
    assert policy_entries({"accumulate": 4, "batch": 2}) == {"micro_batches": 4, "batch": 2}
    assert policy_entries({"micro_batches": 4}) == {"micro_batches": 4}
