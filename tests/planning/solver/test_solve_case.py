"""One case: which sets of open groups are tried, how far, and when search follows."""

import numpy as np
import pytest

from tests.planning.solver.interpreted import search
from tests.planning.solver.tiny import NOTHING, drawn, taken

BASE = [2, 0]  # levels of the two groups that are best at the prices, in case 1
# What opening one group to another level loses there:
LOSSES = {(0, 0): 4.0, (0, 1): 1.0, (1, 1): 2.0, (1, 2): 3.0}


class Steps:
    """Stands in for what ``solve_case`` calls: values by pattern; notes what is asked.

    Attributes:
        settled: (group, level) that differs from BASE, or None -> the value that is settled on.
        gained: What ``fill`` and ``improve`` win then: by pattern, (0, 0) by default.
        found: By pattern, what search finds: (value or None, nodes left).
        by: Multiplies LOSSES.
    """

    def __init__(self, monkeypatch, settled=None, gained=None, found=None, obeyed=True, by=1.0):
        self.settled, self.gained, self.found = settled or {}, gained or {}, found or {}
        self.asked, self.p, self.obeyed = [], drawn(0, items=4, options=3), obeyed
        self.p = self.p._replace(mode=np.array([[1, 1], [0, 1], [1, 0]]))
        self.q = search.priced(self.p)
        for array in (self.q.opened, self.q.net, self.q.nets):
            array[...] = 99
        self.q.opened[0, 0], self.q.opened[1, 1] = BASE
        self.q.net[0, 0], self.q.net[1, 1] = 10, 20
        self.q.nets[0, :, 0] = 10 - 4 * by, 10 - by, 10
        self.q.nets[1, :, 1] = 20, 20 - 2 * by, 20 - 3 * by
        for name in ("settle", "fill", "improve", "search", "obeys"):
            monkeypatch.setattr(search, name, getattr(self, name))

    def pattern(self, opened):
        other = [(g, int(m)) for g, m in enumerate(opened) if m != BASE[g]]
        assert len(other) < 2
        return other[0] if other else None

    def settle(self, p, q, y, case, opened):
        assert (p, q, case) == (self.p, self.q, 1)
        self.now = self.pattern(opened)
        self.asked.append(("settle", self.now))
        y.choice[...] = 50 + len(self.asked)
        return self.settled.get(self.now, NOTHING)

    def fill(self, p, q, y, case):
        assert (p, q, case) == (self.p, self.q, 1)
        self.asked.append(("fill",))
        return self.gained.get(self.now, (0, 0))[0]

    def improve(self, p, q, y, case, value, bound, effort):
        assert (p, q, case) == (self.p, self.q, 1)
        self.asked.append(("improve", value, bound, effort))
        self.improved = y.choice.tolist()
        return value + self.gained.get(self.now, (0, 0))[1]

    def search(self, p, q, x, case, opened, bound, utility, nodes):
        assert (p, q, case, x) == (self.p, self.q, 1, self.x)
        pattern = self.pattern(opened)
        self.asked.append(("search", pattern, bound, utility, nodes))
        value, rest = self.found.get(pattern, (None, nodes - 1))
        return utility if value is None else value, rest

    def obeys(self, p, choice, case):
        assert (p, choice.tolist(), case) == (self.p, [0, 1, 2, 0], 1)
        return self.obeyed

    def run(self, bound, utility, effort):
        """Run it; return its result, and the choice then."""
        self.x = taken(self.p, [0, 1, 2, 0])
        result = search.solve_case(self.p, self.q, self.x, 1, bound, utility, effort)
        return result, self.x.choice.tolist()


@pytest.fixture
def steps(monkeypatch):
    return lambda **answers: Steps(monkeypatch, **answers)


START = [0, 1, 2, 0]


def test_without_effort_the_best_choice_at_the_prices_is_improved(steps):
    s = steps(settled={None: 5.0}, gained={None: (9, 2.0)})
    assert s.run(100.0, 3.0, 0) == ((7.0, 100.0), [51] * 4)
    assert s.asked == [("settle", None), ("improve", 5.0, 100.0, 0)]


@pytest.mark.parametrize("utility", [7.0, 8.0, 7.0 - 1e-13])
def test_what_is_no_better_is_not_kept(steps, utility):
    s = steps(settled={None: 5.0}, gained={None: (0, 2.0)})
    assert s.run(100.0, utility, 0) == ((utility, 100.0), START)


def test_where_it_cannot_be_repaired_what_is_known_is_improved(steps):
    s = steps(gained={None: (0, 2.0)})
    assert s.run(100.0, 3.0, 0) == ((5.0, 100.0), START)
    assert s.asked == [("settle", None), ("improve", 3.0, 100.0, 0)]
    assert s.improved == START


@pytest.mark.parametrize("obeyed, utility", [(False, 3.0), (True, NOTHING)])
def test_unless_nothing_is_known_in_the_case(steps, obeyed, utility):
    s = steps(obeyed=obeyed)
    assert s.run(100.0, utility, 0) == ((utility, 100.0), START)
    assert s.asked == [("settle", None)]


@pytest.mark.parametrize("bound", [1024.0, -1024.0])
@pytest.mark.parametrize("effort", [1, 3])
def test_gaps_of_some_thousandths_are_left_alone(steps, bound, effort):
    easy = 0.004 / effort**2 * 1024
    for gap, more in ((easy - 1e-9, False), (easy + 1e-9, True)):
        s = steps(by=easy / 8)
        s.run(bound, bound - gap, effort)
        assert (len([1 for call in s.asked if call[0] == "settle"]) > 1) == more
    s = steps(settled={None: 0.0})  # what is left of the gap, after the first choice was improved
    s.gained[None] = 0, bound - easy / 2
    assert s.run(bound, bound - 9 * easy, effort)[0][0] == bound - easy / 2
    assert len(s.asked) == 2
    assert steps().run(0.0, 0.0, effort) == ((0.0, 0.0), START)


@pytest.mark.parametrize("effort, tried", [(1, 1), (2, 2), (3, 3), (4, 4), (7, 4)])
def test_other_patterns_are_tried_by_what_they_lose(steps, effort, tried):
    """They are listed in the order of groups and levels, and tried in that of losses."""
    gap = 0.07 / effort**2 * 1024
    s = steps(by=gap / 8)
    assert s.run(1024.0, 1024.0 - gap, effort) == ((1024.0 - gap, 1024.0), START)
    patterns = [call[1] for call in s.asked if call[0] == "settle"][1:]
    assert patterns == [(0, 1), (1, 1), (1, 2), (0, 0)][:tried]


def test_a_pattern_is_filled_and_improved_up_to_its_own_bound(steps):
    s = steps(settled={(0, 1): 990.0}, gained={(0, 1): (4.0, 3.0)})
    assert s.run(1024.0, 994.0, 1) == ((997.0, 1024.0), [53] * 4)
    assert s.asked[2:] == [("settle", (0, 1)), ("fill",), ("improve", 994.0, 1023.0, 1)]
    s = steps(settled={(0, 1): 990.0}, gained={(0, 1): (4.0, 0.0)})
    assert s.run(1024.0, 994.0, 1) == ((994.0, 1024.0), START)


def test_what_one_pattern_gains_counts_for_the_next(steps):
    s = steps(settled={(0, 1): 1000.0, (1, 1): 999.0}, gained={(0, 1): (0, 4.0), (1, 1): (1, 3)})
    assert s.run(1024.0, 1006.0, 2)[0] == (1006.0, 1024.0)
    s = steps(settled={(0, 1): 1006.0, (1, 1): 1000.0}, gained={(0, 1): (1.0, 1.0)})
    assert s.run(1024.0, 1005.0, 2) == ((1008.0, 1024.0), [53] * 4)
    assert s.asked[5:] == [("settle", (1, 1)), ("fill",), ("improve", 1000.0, 1022.0, 2)]


@pytest.mark.parametrize("utility", [1000.0, -1000.0])
@pytest.mark.parametrize("away, improved", [(10 + 1e-6, False), (10, True), (10 - 1e-6, True)])
def test_patterns_within_a_hundredth_are_improved(steps, utility, away, improved):
    s = steps(settled={(0, 1): utility - away, (1, 1): utility - away})
    s.run(utility + 16.0, utility, 2)
    names = [call[0] for call in s.asked][2:]
    assert names == ["settle", "fill", *["improve"] * improved] * 2


@pytest.mark.parametrize("gap, tried", [(4.5, [(0, 1), (1, 1), (1, 2), (0, 0)]),
                                        (4.0, [(0, 1), (1, 1), (1, 2)]), (2.0, [(0, 1)]),
                                        (2.0 + 1e-13, [(0, 1)]), (1.0, [])])  # fmt: skip
def test_patterns_that_lose_the_whole_gap_are_not_tried(steps, monkeypatch, gap, tried):
    listed, insert = [], search.insert
    monkeypatch.setattr(search, "insert", lambda *a: (listed.append(a[:3]), insert(*a))[1])
    s = steps()
    s.run(16.0, 16.0 - gap, 5)
    assert [call[1] for call in s.asked if call[0] == "settle"][1:] == tried
    assert listed == [(*where, loss) for where, loss in LOSSES.items() if loss < gap]


def test_what_a_pattern_gains_may_end_the_others(steps):
    s = steps(settled={(0, 1): 1000.0}, gained={(0, 1): (0.0, 22.0)})
    assert s.run(1024.0, 1000.0, 4)[0] == (1022.0, 1024.0)
    assert [call[1] for call in s.asked if call[0] == "settle"] == [None, (0, 1)]


@pytest.mark.parametrize("bound", [1024.0, -1024.0])
@pytest.mark.parametrize("effort", [1, 3])
def test_search_follows_where_the_gap_stays_wide(steps, bound, effort):
    wide = 0.08 / effort**2 * 1024
    for gap, hard in ((wide - 1e-9, False), (wide + 1e-9, True)):
        s = steps()
        s.run(bound, bound - gap, effort)
        searches = [call for call in s.asked if call[0] == "search"]
        first = ("search", None, bound, bound - gap, 4000 * effort)
        assert searches[:1] == [first] * hard


def test_search_goes_through_all_patterns_while_nodes_last(steps):
    s = steps(settled={(0, 0): 10.0}, found={(1, 1): (95.0, 9)})
    assert s.run(100.0, 50.0, 1) == ((95.0, 100.0), START)
    assert s.asked == [
        ("settle", None), ("improve", 50.0, 100.0, 1),
        ("settle", (0, 1)), ("settle", (1, 1)), ("settle", (1, 2)),
        ("settle", (0, 0)), ("fill",), ("improve", 10.0, 96.0, 1),
        ("search", None, 100.0, 50.0, 4000), ("search", (0, 1), 99.0, 50.0, 3999),
        ("search", (1, 1), 98.0, 50.0, 3998), ("search", (1, 2), 97.0, 95.0, 9),
        ("search", (0, 0), 96.0, 95.0, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("found, patterns", [
    ({None: (None, 0)}, [None]),
    ({(0, 1): (None, 0)}, [None, (0, 1)]),
    ({None: (98.0, 5)}, [None, (0, 1)]),
    ({None: (98.0 - 1e-13, 5)}, [None, (0, 1)]),
    ({None: (99.0, 5)}, [None]),
    ({(0, 1): (97.5, 1)}, [None, (0, 1), (1, 1)]),
])  # fmt: skip
def test_search_ends_where_nodes_or_the_gap_do(steps, found, patterns):
    s = steps(found=found)
    value = max(v or 50.0 for v, _ in found.values())
    assert s.run(100.0, 50.0, 1)[0] == (value, 100.0)
    assert [call[1] for call in s.asked if call[0] == "search"] == patterns


@pytest.mark.parametrize("effort", [1, 2])
def test_as_many_patterns_are_tried_where_the_gap_is_wide(steps, monkeypatch, effort):
    kept = []
    monkeypatch.setattr(search, "insert", lambda *a: (kept.append(len(a[3])), 0)[1])
    steps().run(100.0, 50.0, effort)
    assert set(kept) == {24 * effort}
    kept.clear()
    steps().run(1024.0, 1024.0 - 0.07 / effort**2 * 1024, effort)
    assert set(kept) == {effort}


def test_of_patterns_that_lose_as_much_the_first_is_tried(steps):
    s = steps()
    s.q.nets[1, 1, 1] = 20 - 1
    s.run(1024.0, 1000.0, 1)
    assert [call[1] for call in s.asked if call[0] == "settle"] == [None, (0, 1)]


@pytest.mark.parametrize("gap, names", [
    (4.0, []), (80.0, ["settle"]), (80.5, ["settle"] * 4 + ["search"] * 5),
])  # fmt: skip
def test_gaps_of_just_the_limits_are_still_below(steps, gap, names):
    s = steps()
    s.run(1000.0, 1000.0 - gap, 1)
    assert [call[0] for call in s.asked[2:]] == names


@pytest.mark.parametrize("value, kept", [(3.25, False), (3.0, False), (3.5, True)])
def test_a_choice_has_to_gain_more_than_rounding(steps, monkeypatch, value, kept):
    monkeypatch.setattr(search, "EPSILON", 0.25)
    s = steps(settled={None: value})
    wanted = ((value, 100.0), [51] * 4) if kept else ((3.0, 100.0), START)
    assert s.run(100.0, 3.0, 0) == wanted
    s = steps(settled={(0, 1): 997.0 + value})
    value, choice = s.run(1024.0, 1000.0, 1)[0][0], s.x.choice.tolist()
    assert (value, choice) == ((s.settled[0, 1], [53] * 4) if kept else (1000.0, START))


@pytest.mark.parametrize("gap, tried", [(1.25, False), (1.5, True)])
def test_what_a_pattern_can_gain_has_to_be_more_than_rounding(steps, monkeypatch, gap, tried):
    monkeypatch.setattr(search, "EPSILON", 0.25)
    s = steps()
    s.run(10.0, 10.0 - gap, 1)
    patterns = [call[1] for call in s.asked if call[0] in ("settle", "search")]
    assert patterns == ([None, (0, 1), None, (0, 1)] if tried else [None, None])
