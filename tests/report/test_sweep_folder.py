import math

import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.report.sweep import sweep_html
from d2ft_fl.report.sweep_folder import SweepFolder
from tests.report.made_up import simple_run, write_sweep


def settings(strategy, lr, seed):
    return {"strategy": strategy, "lr": lr, "seed": seed}


@pytest.fixture
def sweep(tmp_path):
    """Two strategies, two rates, two seeds; random lost a seed, and a third rate was refused."""
    trials = [
        (settings("d2ft", 0.1, 0), 0.80),
        (settings("d2ft", 0.1, 1), 0.90),
        (settings("d2ft", 0.2, 0), 0.70),
        (settings("d2ft", 0.2, 1), 0.72),
        (settings("random", 0.1, 0), 0.75),
        (settings("random", 0.1, 1), 0.60, {"status": "failed", "reason": "no memory"}),
        (settings("random", 0.2, 0), 0.71),
        (settings("random", 0.2, 1), 0.70),
        (settings("random", 0.3, 0), None, {"status": "refused", "reason": "cannot"}),
    ]
    return SweepFolder.read(write_sweep(tmp_path, trials))


def test_seeds_repeat_a_setting(sweep):
    assert [s.label for s in sweep.settings] == [
        "d2ft, lr 0.1", "d2ft, lr 0.2", "random, lr 0.1", "random, lr 0.2", "random, lr 0.3",
    ]  # fmt: skip
    first, third = sweep.settings[0], sweep.settings[2]
    assert first.figure("accuracy").mean == pytest.approx(0.85)
    assert first.figure("accuracy").half == pytest.approx(6.3531 * 0.1, rel=1e-4)
    assert first.figure("resources", "flops", "share").mean == pytest.approx(0.3)
    assert (third.count("finished"), third.count("failed")) == (1, 1)
    assert third.figure("accuracy").mean == 0.75
    assert third.figure("accuracy").half is None
    assert math.isnan(sweep.settings[4].figure("accuracy").mean)


def test_the_best_comes_first_and_what_never_began_is_left_out(sweep):
    assert [s.label for s in sweep.ranked()] == [
        "d2ft, lr 0.1", "random, lr 0.1", "d2ft, lr 0.2", "random, lr 0.2",
    ]  # fmt: skip


def test_pairs_differ_in_one_key_alone(sweep):
    """Finished pairs of random and d2ft, less each other: two means, both -0.02.

    Of seed 0 0.75 - 0.80 and 0.71 - 0.70, of seed 1 0.70 - 0.72.
    """
    found = sweep.paired("strategy", "d2ft")
    assert list(found) == ["random"]
    random = found["random"].difference
    assert (random.count, found["random"].pairs) == (2, 3)
    assert (random.mean, random.half) == pytest.approx((-0.02, 0))
    back = sweep.paired("strategy", "random")["d2ft"].difference
    assert (back.mean, back.half) == pytest.approx((0.02, 0))
    assert sweep.paired("lr", 0.1)[0.3].pairs == 0
    assert sweep.best_first("strategy") == ["d2ft", "random"]


def test_pairs_of_a_seed_are_one_observation(tmp_path):
    """Ten rates, two seeds with differences of 0.10 and 0.02: their mean to 12.7 * 0.04."""
    trials = [
        (settings(strategy, lr / 10, seed), 0.5 + (strategy == "b") * (0.10, 0.02)[seed])
        for strategy in "ab"
        for lr in range(1, 11)
        for seed in (0, 1)
    ]
    found = SweepFolder.read(write_sweep(tmp_path, trials)).paired("strategy", "a")["b"]
    assert (found.difference.count, found.pairs) == (2, 20)
    assert found.difference.mean == pytest.approx(0.06)
    assert found.difference.half == pytest.approx(12.7062 * 0.04, rel=1e-4)


def test_what_stopping_early_has_left_is_not_compared(tmp_path):
    stopped = {"status": "stopped", "reason": "behind"}
    trials = [
        (settings("lucky", 0.1, 0), 0.9), (settings("lucky", 0.1, 1), 0.4, stopped),
        (settings("whole", 0.1, 0), 0.7), (settings("whole", 0.1, 1), 0.7),
        (settings("other", 0.1, 0), 0.6), (settings("other", 0.1, 1), 0.6),
    ]  # fmt: skip
    sweep = SweepFolder.read(write_sweep(tmp_path, trials))
    assert [s.values["strategy"] for s in sweep.ranked()] == ["whole", "other", "lucky"]
    found = sweep.paired("strategy", "whole")
    assert (found["lucky"].pairs, found["other"].pairs) == (0, 2)
    html = "".join(sweep_html(sweep))
    assert "stopped early come after the others" in html


def test_keys_are_numbers_or_words(tmp_path):
    trials = [
        ({"clients": 4, "coupling": "none", "compensation": True, "slots": 1, "seed": 0}, 0.5),
        ({"clients": 8, "coupling": "spread", "compensation": False, "slots": 1, "seed": 0}, 0.5),
    ]
    sweep = SweepFolder.read(write_sweep(tmp_path, trials))
    assert sweep.keys == ["clients", "coupling", "compensation", "slots"]
    assert sweep.numeric_keys == ["clients"]
    assert sweep.word_keys == ["coupling", "compensation"]
    assert sweep.settings[0].label == "clients 4, none, compensation true"


def test_labels_say_what_is_not_clear_by_itself(tmp_path):
    """The same word under two keys carries its key; of a path the name says enough."""
    trials = [
        ({"backward-score": "fisher", "forward-score": "uniform", "budgets": "/a/low.toml"}, 0.5),
        ({"backward-score": "fisher", "forward-score": "fisher", "budgets": "/a/high.toml"}, 0.5),
    ]
    sweep = SweepFolder.read(write_sweep(tmp_path, trials))
    assert [s.label for s in sweep.settings] == [
        "uniform, low.toml",
        "forward-score fisher, high.toml",
    ]


def test_what_most_settings_have_goes_without_saying(tmp_path):
    keys = ("strategy", "match", "match-share", "tuning")
    rows = [
        ("fedavg", "", 0.0, "full"), ("d2ft", "flops", 0.6, "full"), ("d2ft", "flops", 0.4, "full"),
        ("caff", "flops", 0.6, "full"), ("d2ft", "flops", 0.6, "lora"),
    ]  # fmt: skip
    trials = [(dict(zip(keys, row, strict=True)) | {"seed": 0}, 0.5) for row in rows]
    sweep = SweepFolder.read(write_sweep(tmp_path, trials))
    assert [s.label for s in sweep.settings] == [
        "fedavg, no match, match-share 0.0", "d2ft", "d2ft, match-share 0.4", "caff", "d2ft, lora",
    ]  # fmt: skip


def test_one_change_at_a_time_is_beside_what_most_have(tmp_path):
    trials = [({"lr": lr, "slots": n}, 0.5) for lr, n in ((0.1, 1), (0.2, 1), (0.1, 5))]
    sweep = SweepFolder.read(write_sweep(tmp_path, trials))
    assert [s.label for s in sweep.settings] == ["as most", "lr 0.2", "slots 5"]


def test_where_seeds_alone_vary_there_is_one_setting(tmp_path):
    sweep = SweepFolder.read(write_sweep(tmp_path, [({"seed": n}, 0.5) for n in range(3)]))
    assert [(s.label, len(s.trials)) for s in sweep.settings] == [("all trials", 3)]


def test_without_finished_runs_a_setting_shows_the_others(tmp_path):
    trials = [
        ({"lr": 0.1, "seed": 0}, 0.5, {"status": "stopped", "reason": "behind"}),
        ({"lr": 0.1, "seed": 1}, None, {"status": "waiting"}),
    ]
    (setting,) = SweepFolder.read(write_sweep(tmp_path, trials)).settings
    assert (len(setting.shown), len(setting.finished)) == (1, 0)


def test_a_damaged_trial_costs_no_other(tmp_path):
    write_sweep(tmp_path, [({"lr": 0.1}, 0.5), ({"lr": 0.2}, 0.6)])
    (tmp_path / "trials" / "trial-1" / "rounds.jsonl").write_text("no\n")
    first, second = SweepFolder.read(tmp_path).trials
    assert first.finished
    assert (second.status, second.run) == ("damaged", None)
    assert "is not JSON in line 1" in second.reason


@pytest.mark.parametrize(
    "text,message",
    [("{}", "holds no list"), ("[{}]", "lacks something a trial has"), ("[", "is not JSON")],
)
def test_damage_is_named_in_one_line(tmp_path, text, message):
    simple_run(tmp_path / "trials" / "trial-0")
    (tmp_path / "trials.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        SweepFolder.read(tmp_path)


def test_settings_of_an_older_sweep_go_by_their_present_names(tmp_path):
    """`accumulate` was the name of `micro-batches`; lines of its runs have that name as well."""
    folder = write_sweep(tmp_path, [({"accumulate": n}, n / 10) for n in (1, 2)])
    assert [trial.settings for trial in SweepFolder.read(folder).trials] == [
        {"micro-batches": 1}, {"micro-batches": 2},
    ]  # fmt: skip
