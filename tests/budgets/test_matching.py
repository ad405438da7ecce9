"""The same mean budget for every strategy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.budgets.budget import Amount, Budget
from d2ft_fl.budgets.matching import matched
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ConfigError
from d2ft_fl.rounds.checks import checked, checked_options
from d2ft_fl.runtime.in_process import run_local
from d2ft_fl.server import console as run_console
from tests.runtime.test_in_process import rows

FULL = Cost(1000, 2000, 300, 400, work=1000)


def flops_of(budgets):
    return [b.flops.value for b in budgets]


def relative(*shares):
    return [Budget(flops=Amount(s, relative=True), memory=Amount(5.0)) for s in shares]


def test_shares_are_scaled_to_their_mean_and_nothing_else_is_limited():
    found = matched("flops", 0.4, relative(0.2, 0.4, 0.6), [FULL] * 3)
    assert flops_of(found) == pytest.approx([0.2, 0.4, 0.6])
    assert found[0].memory is None
    found = matched("flops", 0.2, relative(0.2, 0.4, 0.6), [FULL] * 3)
    assert flops_of(found) == pytest.approx([0.1, 0.2, 0.3])


def test_who_reaches_everything_leaves_the_rest_to_the_others():
    # k = 2.5: 1, 1 (of 1.5 and 1.0), 0.4 more for the last: 2.4 / 3 = 0.8.
    found = matched("flops", 0.8, relative(0.6, 0.4, 0.16), [FULL] * 3)
    assert flops_of(found) == pytest.approx([1.0, 1.0, 0.4])
    assert flops_of(matched("flops", 1.0, relative(0.6, 0.4, 0.16), [FULL] * 3)) == [1.0] * 3


def test_absolute_and_missing_budgets_are_shares_of_everything():
    budgets = [Budget(flops=Amount(500.0)), Budget(), Budget(flops=Amount(9e9))]
    found = matched("flops", 0.5, budgets, [FULL] * 3)
    assert flops_of(found) == pytest.approx([0.3, 0.6, 0.6])  # of 0.5, 1, 1
    assert flops_of(matched("flops", 0, budgets, [FULL] * 3)) == pytest.approx([0.5, 1.0, 1.0])


def test_bytes_are_matched_in_both_directions():
    budgets = [Budget(bytes_up=Amount(0.2, True)), Budget(bytes_up=Amount(0.6, True))]
    one, other = matched("bytes", 0.2, budgets, [FULL] * 2)
    assert [one.bytes_up.value, other.bytes_up.value] == pytest.approx([0.1, 0.3])
    assert [one.bytes_down.value, other.bytes_down.value] == pytest.approx([0.2, 0.2])
    assert one.flops is None


def test_seconds_are_one_deadline_for_all():
    budgets = [Budget(speed=100.0), Budget(speed=1000.0, bandwidth_up=100.0)]
    found = matched("seconds", 0.5, budgets, [FULL] * 2)  # 10 s, and 1 + 3 s
    assert [b.deadline for b in found] == [3.5, 3.5]
    assert found[1].speed == 1000.0
    own = [Budget(deadline=2.0), Budget(deadline=4.0)]
    assert matched("seconds", 0, own, [FULL] * 2)[0].deadline == 3.0


@pytest.mark.parametrize(
    "kind,share,budgets,reason",
    [
        ("flops", 0.6, relative(0, 1), "match-share = 0.6 cannot be reached: 1 of 2 clients"),
        ("seconds", 0.5, relative(1, 1), "needs clients that take"),
        ("seconds", 0.0, [Budget(deadline=2.0), Budget()], "needs a deadline of every client"),
    ],
)
def test_a_mean_that_there_is_not_is_said(kind, share, budgets, reason):
    with pytest.raises(ConfigError, match=reason):
        matched(kind, share, budgets, [FULL] * 2)


@given(
    st.lists(st.floats(0.01, 3), min_size=1, max_size=20),
    st.floats(0.01, 1),
    st.sampled_from(["flops", "memory"]),
)
@settings(deadline=None)
def test_the_mean_is_the_share_and_who_has_more_keeps_more(shares, share, kind):
    budgets = [Budget(**{kind: Amount(s, relative=True)}) for s in shares]
    found = np.array(
        [getattr(b, kind).value for b in matched(kind, share, budgets, [FULL] * len(shares))]
    )
    assert found.mean() == pytest.approx(share)
    assert (found <= 1).all()
    order = np.argsort(shares)
    assert (np.diff(found[order]) >= -1e-12).all()


def test_a_run_is_held_to_the_matched_budget(quick):
    config = checked(quick(match="flops", match_share=0.5, strategy="heterofl"))
    summary = run_local(config)
    assert summary["violations"] == summary["faults"] == 0
    first = rows(config.run_folder)[0]
    assert first["flops"]["allowed_share"] == pytest.approx(0.5, abs=1e-6)
    assert first["flops"]["used_mean"] <= 0.5 * first["flops"]["full_mean"]
    assert first["memory"]["allowed_mean"] is None


def test_a_client_holds_the_plan_against_the_matched_budget(quick):
    """Not against its own, which allows less here."""
    budgets = quick().run_folder + ".toml"
    with open(budgets, "w") as file:
        file.write('mix = ["small"]\n[classes.small]\nflops = "10 %"\nmemory = "5 %"\n')
    config = quick(match="flops", match_share=0.5, budgets=budgets, strategy="random")
    summary = run_local(checked(config))
    assert summary["faults"] == summary["sat_out"] == 0
    assert summary["resources"]["flops"]["share"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"match": "watts"}, "use one of flops, bytes, memory, seconds"),
        ({"match": "flops", "match_share": 1.5}, "between 0 and 1"),
        ({"match_share": 0.5}, "belongs to match"),
        ({"match": "flops", "strategy": "fedavg"}, "'fedavg' cannot keep a budget of flops"),
        ({"match": "memory", "strategy": "fewer-examples"}, "cannot keep a budget of memory"),
        ({"match": "bytes", "strategy": "accumulate"}, "bytes_up and bytes_down"),
    ],
)
def test_what_cannot_be_matched_is_refused(quick, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        checked_options(quick(**changes))


@pytest.mark.parametrize(
    "budget,changes,reason",
    [
        ('flops = "60 %"', {"match": "seconds"}, "needs a deadline of every client"),
        (
            'flops = "60 %"',
            {"match": "seconds", "match_share": 0.5},
            "needs clients that take time",
        ),
        ("flops = 0", {"match": "flops", "match_share": 0.5}, "cannot be reached"),
    ],
)
def test_what_budgets_leave_no_match_for_is_found_before_anything_starts(
    quick, tmp_path, budget, changes, reason
):
    path = tmp_path / "budgets.toml"
    path.write_text(f'mix = ["one"]\n[classes.one]\n{budget}\n')
    with pytest.raises(ConfigError, match=reason):
        checked(quick(budgets=str(path), **changes))


def test_a_mean_that_is_out_of_reach_later_becomes_the_highest_there_is():
    """Two of four clients are busy: half is all there is."""
    busy = [Budget(flops=Amount(s, relative=True)) for s in (0.0, 0.0, 0.2, 0.4)]
    found = matched("flops", 0.6, busy, [FULL] * 4, within_reach=True)
    assert [b.flops.value for b in found] == [0, 0, 1, 1]
    nobody = matched("flops", 0.6, busy[:2], [FULL] * 2, within_reach=True)
    assert [b.flops.value for b in nobody] == [0, 0]


def test_a_run_says_that_nobody_could_measure_scores(quick, capsys):
    """The whole model comes down for that, of which a budget of bytes leaves half."""
    config = quick(match="bytes", match_share=0.5, strategy="pruning-gradient")
    summary = run_local(checked(config))
    assert (summary["scores"], summary["scored"]) == (["gradient"], 0)
    run_console.summary(summary)
    said = " ".join(capsys.readouterr().out.split())
    assert "nobody could afford a scoring pass" in said
    able = replace(config, match="flops", run_folder=config.run_folder + "-able")
    assert run_local(checked(able))["scored"] > 0
