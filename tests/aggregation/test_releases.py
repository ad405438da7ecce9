"""Releases: what was released twice counts twice, unless it is the same; none is forgotten."""

import dataclasses
import json
import math

import pytest
import torch

from d2ft_fl.aggregation import private_sums
from d2ft_fl.aggregation.privacy import Privacy, fits_sums
from d2ft_fl.aggregation.private_sums import PrivateRound, PrivateSums, Trainers
from d2ft_fl.aggregation.releases import FILE, Releases
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.records.run_folder import read_rows
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime import in_process
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.server import run
from tests.aggregation.test_privacy import KEY, PRIVATE
from tests.aggregation.test_robust import ARCH, WEIGHTS, update
from tests.conftest import all_of

OWN = Privacy(1.0, 2.0, 0.5, 1e-3)


def sums(releases, number=1, clients=2, clip=1.0):
    releases.privacy = dataclasses.replace(releases.privacy, clip=clip)
    trainers = Trainers.of([(all_of(ARCH), 4)] * clients, 1.0)
    return PrivateSums(ARCH, WEIGHTS, PrivateRound(releases, KEY, number, trainers))


def release(releases, shift, **options):
    own = sums(releases, **options)
    own.add(update(all_of(ARCH), shift))
    return own.apply(), own.figures["epsilon"]


def test_a_round_that_is_run_again_counts_again_unless_it_is_the_same(tmp_path):
    releases = Releases.of(OWN, tmp_path, 0)
    first, once = release(releases, 1e-3)
    assert once == OWN.epsilon([1])
    again = Releases.of(OWN, tmp_path, 0)  # another process goes on
    second, still = release(again, 1e-3)
    assert still == once
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, twice = release(again, 2e-3)
    assert twice == OWN.epsilon([2]) > once
    _, all_of_them = release(again, 1e-3, number=2)
    assert all_of_them == OWN.epsilon([2, 1])
    assert Releases.of(OWN, tmp_path, 0).epsilon == all_of_them


def test_other_counts_or_noise_are_another_release():
    """Else two releases would share noise, and their difference would tell what was added."""
    releases = Releases(OWN)
    release(releases, 1e-3)
    release(releases, 1e-3, clients=3)
    release(releases, 1e-3, clip=2.0)
    assert len(releases.names[1]) == 3


def test_a_release_is_on_the_disk_before_its_noise_is_drawn(tmp_path, monkeypatch):
    def seen(*_):
        assert (tmp_path / FILE).read_text().count("\n") == 1
        raise KeyboardInterrupt

    own = sums(Releases.of(OWN, tmp_path, 0))
    monkeypatch.setattr(private_sums, "Noise", seen)
    with pytest.raises(KeyboardInterrupt):
        own.apply()
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_rounds_finished_before_releases_were_written_down_count_once(tmp_path):
    assert Releases.of(OWN, tmp_path, 3).epsilon == OWN.epsilon([1, 1, 1])


def test_a_line_cut_short_was_no_release_and_a_damaged_one_is_refused(tmp_path):
    releases = Releases.of(OWN, tmp_path, 0)
    release(releases, 1e-3)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"round": 2, "rel')
    release(again := Releases.of(OWN, tmp_path, 0), 1e-3, number=2)
    found = Releases.of(OWN, tmp_path, 0)
    assert found.names == again.names
    assert found.epsilon == OWN.epsilon([1, 1])
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / FILE).write_text('{"round": 1}\n{"rou\n{"round": 2}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .* is damaged"):
        Releases.of(OWN, tmp_path, 0)


def test_no_release_costs_more_than_was_promised(tmp_path):
    promised = dataclasses.replace(OWN, most=OWN.epsilon([1, 1]))
    releases = Releases.of(promised, tmp_path, 0)
    release(releases, 1e-3)
    release(releases, 1e-3, number=2)
    with pytest.raises(RunError, match=r"round 1 is not released: .* above epsilon = "):
        release(releases, 2e-3)
    assert releases.epsilon == promised.most  # what was refused was not released
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


# -- noise within the integers of sums -----------------------------------------------------------


def test_noise_that_would_wrap_is_refused():
    """Sums have 62 bits of int64, noise as many; 36 of them are fractions; 8.6 deviations fit."""
    limit = 2.0**26 / 8.6  # 7.8 million
    assert fits_sums(limit * 0.999, 1.0, 36)
    assert not fits_sums(1.0, limit, 36)
    assert 2**62 + 2.0**62 * 0.999 < 2**63
    for options in (
        {"clip-norm": 1e7},
        {"clip-norm": 1e300},
        {"noise-multiplier": 1e4, "clip-norm": 1e3},
        {"noise-multiplier": 0.0, "epsilon": 1.0, "clip-norm": 5e6},
    ):
        with pytest.raises(ConfigError, match=r"clip-norm = .* below 7\.8e\+06: lower clip-norm"):
            checked_options(RunConfig.from_mapping({**PRIVATE, **options}))
    checked_options(RunConfig.from_mapping({**PRIVATE, "clip-norm": 7e6}))
    with pytest.raises(RunError, match="leaves the integers of sums with 36 bits"):
        sums(Releases(OWN), clip=limit).apply()


# -- runs ----------------------------------------------------------------------------------------


class Left(Exception):
    """A run is left in the middle of something."""


def rounds_left(tmp_path, monkeypatch, clients, again, **options):
    """Run 2 of 3 rounds with a checkpoint of none of them, then all: rows of before, and of then.

    Args:
        clients: How many clients answer before the run is left.
        again: How many answer then.
    """
    entries = {
        "rounds": 3, "clients": 4, "test-examples": 40, "train-examples": 80,
        "checkpoint-every": 3, "run-folder": str(tmp_path / "run"), **PRIVATE, **options,
    }  # fmt: skip
    answering, train = [clients], in_process.InProcessPool.train

    def some(self, work):
        for client, reply in train(self, work):
            if client < answering[0]:
                yield client, reply

    evaluations, evaluate = iter([run.evaluate] * 2), run.evaluate

    def evaluated(*arguments):
        if (call := next(evaluations, None)) is None:
            raise Left
        return call(*arguments)

    monkeypatch.setattr(in_process.InProcessPool, "train", some)
    monkeypatch.setattr(run, "evaluate", evaluated)
    with pytest.raises(Left):
        run_local(checked(RunConfig.from_mapping(entries)))
    before = read_rows(tmp_path / "run")
    monkeypatch.setattr(run, "evaluate", evaluate)
    answering[0] = again
    entries["resume"] = entries.pop("run-folder")
    run_local(checked(RunConfig.from_mapping(entries)))
    return before, read_rows(tmp_path / "run")


def test_a_killed_run_that_goes_on_alike_has_released_nothing_new(tmp_path, monkeypatch):
    before, rows = rounds_left(tmp_path, monkeypatch, 4, 4)
    assert [row["loss"] for row in before] == [row["loss"] for row in rows[:2]]
    own = Privacy(1.0, 1.0, 1.0, 1e-3)
    assert [row["epsilon"] for row in before] == [own.epsilon([1]), own.epsilon([1, 1])]
    # The third round was released, too, before the run was left.
    assert [row["epsilon"] for row in rows] == [own.epsilon([1, 1, 1])] * 3


def test_a_killed_run_that_goes_on_with_other_replies_counts_both(tmp_path, monkeypatch):
    before, rows = rounds_left(tmp_path, monkeypatch, 3, 4)
    assert before[0]["loss"] != rows[0]["loss"]
    own = Privacy(1.0, 1.0, 1.0, 1e-3)
    counts = ([2, 1, 1], [2, 2, 1], [2, 2, 2])
    assert [row["epsilon"] for row in rows] == [own.epsilon(c) for c in counts]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["privacy"]["epsilon"] == own.epsilon([2, 2, 2])
    assert math.isclose(own.epsilon([2, 2, 2]), Privacy(1, 0.5**0.5, 1, 1e-3).epsilon([1] * 3))


def test_a_promised_epsilon_is_not_exceeded_by_going_on(tmp_path, monkeypatch):
    options = {"noise-multiplier": 0.0, "epsilon": 5.0}
    with pytest.raises(RunError, match="above epsilon = 5; start another run"):
        rounds_left(tmp_path, monkeypatch, 3, 4, **options)
