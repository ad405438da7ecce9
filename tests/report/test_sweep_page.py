"""Pages of sweeps: tables by hand, and what is said of trials that did not finish."""

import json
import re

import numpy as np
import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.report.charts import MOST_LINES
from d2ft_fl.report.curves import Curve, curves
from d2ft_fl.report.pages import sweep_page
from d2ft_fl.report.sweep import sweep_html
from d2ft_fl.report.sweep_folder import SweepFolder
from tests.report.made_up import distance_run, write_sweep

STRATEGIES = {"d2ft": 0.1, "random": 0.0, "fedavg": 0.2}


def grid():
    """3 strategies, 2 rates, 2 seeds."""
    trials = []
    for strategy, more in STRATEGIES.items():
        for lr in (0.1, 0.2):
            for seed in (0, 1):
                settings = {"strategy": strategy, "lr": lr, "seed": seed}
                trials.append((settings, 0.5 + more + lr + 0.02 * seed))
    return trials


def html(folder):
    text = "".join(sweep_html(SweepFolder.read(folder)))
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def spec(text, name):
    """What a chart of a page holds."""
    figure = text[text.index(f'id="{name}"') :]
    found = re.search(r'<script type="application/json">(.*?)</script>', figure, re.DOTALL)
    return json.loads(found[1])


def test_the_table_of_settings(tmp_path):
    """Best: fedavg at 0.2, seeds 0.90 and 0.92, mean 0.91, interval 12.7062 * 0.01 = 0.127."""
    text = html(write_sweep(tmp_path, grid()))
    first = text[text.index("<tbody>") :].split("\n")[1]
    assert first.startswith('<tr><td class="word">fedavg</td><td class="word">0.2</td>')
    assert '<td data-value="0.91">91.0% ± 12.7</td>' in first
    assert '<td data-value="0.3">30%</td>' in first  # FLOPs
    assert '<td data-value="160">160 B</td>' in first  # bytes up: two rounds of two clients
    assert '<td data-value="4">4 s</td>' in first
    assert first.endswith("<td>2</td></tr>")
    assert '<dt>trials</dt><dd>12</dd><dd class="note">12 finished</dd>' in text


def test_one_seed_has_no_interval(tmp_path):
    trials = [({"lr": 0.1, "seed": 0}, 0.5), ({"lr": 0.2, "seed": 0}, 0.6)]
    text = html(write_sweep(tmp_path, trials))
    assert '<td data-value="0.6">60.0%</td>' in text
    assert "<legend>bands</legend>" not in text


def test_strategies_are_compared_in_pairs(tmp_path):
    """random is 0.2 behind fedavg in each of four pairs, d2ft 0.1."""
    text = "".join(sweep_html(SweepFolder.read(write_sweep(tmp_path, grid()))))
    options = spec(text, "compared-strategy")["choices"][0]
    assert [option["label"] for option in options] == ["fedavg", "d2ft", "random"]
    assert options[0]["data"]["x"] == [[-10.0, -20.0]]
    assert options[0]["data"]["y"] == [["d2ft", "random"]]
    assert np.allclose(options[0]["data"]["error_x.array"], 0, atol=1e-9)
    assert options[2]["note"].startswith("fedavg +20.0 ± 0.0 over 2 seeds (4 pairs); d2ft +10.0")


def test_numbers_have_a_chart_over_them(tmp_path):
    text = "".join(sweep_html(SweepFolder.read(write_sweep(tmp_path, grid()))))
    lines = spec(text, "over-lr")["data"]
    assert len(lines) == 3
    assert lines[0]["y"] == [0.81, 0.91]
    assert lines[0]["x"] == pytest.approx([0.1, 0.2], abs=0.002)


def test_three_numbers_have_none(tmp_path):
    trials = [({"lr": x, "slots": y, "clients": z}, 0.5) for x, y, z in ((1, 1, 1), (2, 2, 2))]
    assert 'id="over-' not in html(write_sweep(tmp_path, trials))


def test_curves_are_means_over_seeds_at_equal_rounds(tmp_path):
    """A run is at half of its accuracy in its first round: (0.4 + 0.6) / 2 / 2."""
    trials = [({"lr": 0.1, "seed": 0}, 0.4), ({"lr": 0.1, "seed": 1}, 0.6)]
    (setting,) = SweepFolder.read(write_sweep(tmp_path, trials)).settings
    curve = Curve.of(setting)
    assert curve.y("accuracy").tolist() == pytest.approx([0.25, 0.5])
    assert curve.x["cum_flops"].tolist() == [600, 1200]
    assert curve.around_x("round").tolist() == [1, 2, 2, 1]
    half = 6.3531 * np.array([0.1, 0.2])
    expected = [0.25 - half[0], 0.5 - half[1], 0.5 + half[1], 0.25 + half[0]]
    assert curve.around_y("accuracy").tolist() == pytest.approx(expected, rel=1e-4)


def test_the_least_of_a_metric_that_is_minimised_is_the_best(tmp_path):
    """Distances 3 and 4, 1 and 1, 2 and 3, each halved in the first of two rounds."""
    trials = [
        ({"strategy": strategy, "seed": seed}, distance)
        for strategy, distances in (("a", (3.0, 4.0)), ("b", (1.0, 1.0)), ("c", (2.0, 3.0)))
        for seed, distance in enumerate(distances)
    ]
    sweep = SweepFolder.read(write_sweep(tmp_path, trials, distance_run))
    assert [setting.values["strategy"] for setting in sweep.ranked()] == ["b", "c", "a"]
    assert sweep.best_first("strategy") == ["b", "c", "a"]
    text = html(tmp_path)
    assert re.search(r"<dt>best final distance</dt><dd>(.*?)</dd>", text)[1] == "1 ± 0"
    assert "3.5 ± 6.4</td>" in text  # 12.7062 * 0.7071 / sqrt 2
    assert "1.75 ± 3.2</td>" in text  # the best of each run is its first round
    assert "+2.5 ± 6.4</td>" in text
    assert "points" not in text
    assert "<h2>Final distance</h2>" in text
    assert spec("".join(sweep_html(sweep)), "dots")["layout"]["xaxis"]["range"][1] > 9


def test_many_settings_show_the_best(tmp_path):
    trials = [({"lr": n / 100, "seed": 0}, 0.5 + n / 200) for n in range(40)]
    sweep = SweepFolder.read(write_sweep(tmp_path, trials))
    chart = curves(sweep.ranked(), sweep.spec)
    assert len(chart.legend) == MOST_LINES
    assert chart.legend[0].name == "lr 0.39"
    assert sum(entry.shown for entry in chart.legend) == 8
    assert chart.text.endswith(
        "Of 40 settings, the 30 with the best final accuracy. The best 8 are switched on."
    )
    assert sweep_page(tmp_path).stat().st_size < 8_000_000


def test_trials_that_did_not_finish_are_listed_with_reasons(tmp_path):
    trials = [
        ({"lr": 0.1, "seed": 0}, 0.5),
        ({"lr": 0.2, "seed": 0}, 0.3, {"status": "stopped", "reason": "behind after round 2"}),
        ({"lr": 0.3, "seed": 0}, None, {"status": "refused", "reason": "<cannot> keep"}),
        ({"lr": 0.4, "seed": 0}, None, {"status": "failed", "reason": "no client answered"}),
        ({"lr": 0.5, "seed": 0}, None, {"status": "waiting"}),
    ]
    text = html(write_sweep(tmp_path, trials))
    assert "This sweep is not finished: 1 of 5 trials are left." in text
    for words in (
        ("trial-1", "lr 0.2", "0", "stopped", "2", "behind after round 2"),
        ("trial-2", "lr 0.3", "0", "refused", "0", "&lt;cannot&gt; keep"),
        ("trial-3", "lr 0.4", "0", "failed", "0", "no client answered"),
        ("trial-4", "lr 0.5", "0", "waiting", "0", "-"),
    ):
        assert "".join(f'<td class="word">{word}</td>' for word in words) in text
    assert "lr 0.2 (not finished)" in text
    assert "<dd>50.0%</dd>" in text


def test_what_all_trials_have_in_common(tmp_path):
    folder = write_sweep(tmp_path, grid())
    (folder / "sweep.toml").write_text('[vary]\nlr = [0.1, 0.2]  # "<rates>"\n')
    text = html(folder)
    assert "Other than the defaults: rounds = 2, clients = 2." in text
    assert "lr = 0.1" not in text
    assert "# &quot;&lt;rates&gt;&quot;" in text


def test_versions_that_differ_are_side_by_side(tmp_path):
    folder = write_sweep(tmp_path, [({"seed": n}, 0.5) for n in range(3)])
    for number, python in enumerate(("3.11.1", "3.12.2", "3.11.1")):
        path = folder / "trials" / f"trial-{number}" / "versions.json"
        path.write_text(json.dumps({"python": python, "packages": {"torch": "2.9"}}))
    text = html(folder)
    assert '<td class="word">3.11.1</td><td class="word">3.12.2</td></tr>' in text


def test_without_a_round_there_is_no_page(tmp_path):
    write_sweep(tmp_path, [({"lr": 0.1}, None, {"status": "failed", "reason": "no data"})])
    with pytest.raises(ConfigError, match=r"no trial of the sweep .* has a finished round yet"):
        sweep_page(tmp_path)
