"""``d2ft report --markdown``."""

import pytest

from tests.report.made_up import distance_run, simple_run, write_sweep
from tests.report.test_report_command import report


@pytest.fixture
def folder(tmp_path):
    trials = [
        ({"strategy": "d2ft", "share": 0.6, "seed": 0}, 0.80),
        ({"strategy": "d2ft", "share": 0.6, "seed": 1}, 0.90),
        ({"strategy": "d2ft", "share": 0.4, "seed": 0}, 0.70),
        ({"strategy": "a|b", "share": 0.6, "seed": 0}, 0.75),
        ({"strategy": "a|b", "share": 0.4, "seed": 0}, None, {"status": "failed", "reason": "no"}),
    ]
    return write_sweep(tmp_path / "sweep", trials)


def test_a_row_a_setting_the_best_first(folder):
    """The interval of 80 and 90 is 12.7062 * 7.0711 / sqrt 2; shares are those of ``made_up``."""
    done = report(folder, "--markdown")
    assert done.exit_code == 0, done.output
    assert done.output == (
        "| setting | accuracy | FLOPs | memory | bytes up | bytes down | sat out | seeds |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| d2ft, share 0.6 | 85.0 ± 63.5 | 30% | 40% | 40% | 75% | 0% | 2 |\n"
        "| a\\|b, share 0.6 | 75.0 | 30% | 40% | 40% | 75% | 0% | 1 |\n"
        "| d2ft, share 0.4 | 70.0 | 30% | 40% | 40% | 75% | 0% | 1 |\n"
    )


def test_a_metric_that_is_minimised_is_a_number_and_the_least_comes_first(tmp_path):
    trials = [({"lr": lr, "seed": 0}, distance) for lr, distance in ((0.1, 12.5), (0.2, 1.25))]
    folder = write_sweep(tmp_path / "sweep", trials, distance_run)
    heads, _, first, second = report(folder, "--markdown").output.splitlines()
    assert heads.startswith("| setting | distance | FLOPs |")
    assert first.startswith("| lr 0.2 | 1.25 |")
    assert second.startswith("| lr 0.1 | 12.5 |")


def test_a_column_for_each_value_of_a_key(folder):
    assert report(folder, "--markdown", "--across", "share").output == (
        "| setting | share 0.6 | share 0.4 |\n"
        "| --- | ---: | ---: |\n"
        "| d2ft | 85.0 ± 63.5 | 70.0 |\n"
        "| a\\|b | 75.0 |  |\n"
    )


def test_what_has_no_table_is_one_line(folder, tmp_path):
    unbegun = write_sweep(tmp_path / "unbegun", [({"lr": 0.1}, None, {"status": "waiting"})])
    for arguments, message in (
        ((folder, "--across", "lr"), "'lr' does not vary in this sweep; strategy, share does"),
        ((simple_run(tmp_path / "run"),), "is the folder of a run; only sweeps have a table"),
        ((unbegun,), "has finished yet"),
        ((tmp_path / "no",), "there is no folder"),
        ((folder, "--json"), "prints a table alone"),
        ((folder, "--output", tmp_path / "a.html"), "prints a table alone"),
    ):
        done = report(*arguments, "--markdown")
        assert done.exit_code == 2
        assert message in done.output
        assert done.output.startswith("d2ft: ")
        assert done.output.count("\n") == 1


def test_a_column_needs_a_table(folder):
    done = report(folder, "--across", "share")
    assert done.exit_code == 2
    assert "--across is a column of --markdown" in done.output


def test_what_early_stopping_has_left_says_so(tmp_path):
    stopped = {"status": "stopped", "reason": "behind"}
    trials = [
        ({"lr": 0.1, "seed": 0}, 0.9), ({"lr": 0.1, "seed": 1}, 0.4, stopped),
        ({"lr": 0.2, "seed": 0}, 0.7), ({"lr": 0.2, "seed": 1}, 0.8),
    ]  # fmt: skip
    folder = write_sweep(tmp_path / "sweep", trials)
    *_, whole, lucky = report(folder, "--markdown").output.splitlines()
    assert whole.startswith("| lr 0.2 | 75.0 ± 63.5 |")
    assert lucky.endswith("| 1, 1 stopped |")
    (row,) = report(folder, "--markdown", "--across", "lr").output.splitlines()[2:]
    assert row == "| all trials | 75.0 ± 63.5 |"
