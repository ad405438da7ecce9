"""What clients choose, step by step: shown less until exact costs fit, and then time is used."""

from types import SimpleNamespace

import numpy as np
import pytest

from d2ft_fl.planning.client_knapsacks import ClientKnapsacks, _gaps
from d2ft_fl.planning.problem import Solution, Structure

NONE = -np.inf


class Scripted(ClientKnapsacks):
    """Two subnets in one block and slot; a choice is its own operations, and ranks are 10 more.

    ``script`` has what a test is about.
    """

    @property
    def tables(self):
        return [], np.array([0, 1] * len(self.clients))[: len(self.clients)]

    @property
    def items(self):
        """Option k of subnet i of table t costs 100 (t + 1) + 10 k (i + 1) of every resource."""
        t, i, k, _ = np.indices((2, 2, 3, self.script.resources))
        return 100 * (t + 1) + 10 * k * (i + 1)

    @property
    def structure(self):
        return Structure.plain(2, 3, self.script.resources)

    def _materialise(self, choice):
        return choice.astype(np.int8).reshape(-1, 1, 1, 2), choice.reshape(-1, 1, 2) + 10


def scripted(kind, deadlines, coupling="none", method="joint", resources=5, **script):
    clients = [SimpleNamespace(budget=SimpleNamespace(deadline=d)) for d in deadlines]
    objective = SimpleNamespace(coupling=coupling, method=method)
    found = kind(objective, clients, 1, 0, np.zeros((1, 2)), np.zeros((1, 2)))
    object.__setattr__(found, "script", SimpleNamespace(resources=resources, **script))
    return found


# -- shown less until it fits ----------------------------------------------------------------

AT_MOST = np.array([[300, 310, 320, 330, 340], [900, 910, 250, 930, 940], [300] * 5, [300] * 5])
EXCESS = np.array([[9] * 5, [9, 9, 300, 9, 9], [9] * 5, [9] * 5])


class Shrinking(Scripted):
    """Client 0 fits at once, 1 never does, 2 does at the second try, 3 does nothing anyway."""

    def _capacities(self, capacity, deadlines):
        assert (capacity, deadlines) == ("capacity", "deadlines")
        return AT_MOST, EXCESS

    def _over(self, operations, ranks, who, capacity, deadlines):
        assert (capacity, deadlines) == ("capacity", "deadlines")
        assert ranks.reshape(operations.shape).tolist() == (operations + 10).tolist()
        self.script.asked.append(who.tolist())
        #         FLOPs, memory, up, down, later memory
        rows = {
            0: [0, -1, 0, -2, 0],
            1: [10, 7, 0, -3, 6],
            2: [0, 1, 0, 0, 0] if len(self.script.asked) == 1 else [0] * 5,
            3: [5] * 5,
        }
        return np.array([rows[client] for client in who.tolist()])

    def _choose(self, shown, who, coupled=None):
        self.script.shown.append((who.tolist(), shown.tolist(), coupled))
        choices = [[1, 1], [2, 1], [0, 2], [0, 0]] if coupled is None else [[], [1, 2], [2, 1]]
        value = np.array([4.0, 5.0, 6.0, 0.0] if coupled is None else [0.0, 3.0, 2.0])
        chosen = np.array([choices[client] for client in who])
        self.script.first = self.script.first or Solution(
            chosen, value[who], np.array([5.0, 10.0, 8.0, 0.0])
        )
        return Solution(chosen, value[who], None) if coupled else self.script.first


def test_what_is_shown_shrinks_by_what_is_over_until_it_fits_or_tries_end():
    found = scripted(Shrinking, [None] * 4, asked=[], shown=[], first=None)
    operations, ranks, gaps = found.operations("capacity", "deadlines")
    who, shown, coupled = zip(*found.script.shown, strict=True)
    assert who == ([0, 1, 2, 3], [1, 2], *[[1]] * 23)
    assert found.script.asked == [[0, 1, 2, 3], [1, 2], *[[1]] * 22]
    assert coupled == (None, *[found.script.first] * 24)
    assert shown[0] == (AT_MOST + EXCESS).tolist()
    # Client 1 chose options 2 and 1 of table 1: 200 + 20 and 200 + 20, so 440 of everything.
    # FLOPs are 10 over; a third of what is over of memory is 2 and 2.
    assert shown[1][0] == [440 - 10, 440 - 2, 250 + 300, 930 + 9, 440 - 2]
    # Client 2 chose options 0 and 2 of table 0: 100 and 140, which is 240. A third of 1 is 1.
    assert shown[1][1] == [309, 240 - 1, 309, 309, 309]
    # Then client 1 chose 210 and 240, which is more than it was shown.
    assert shown[2][0] == [430 - 10, 438 - 2, 550, 939, 438 - 2]
    for tried in range(2, 24):
        less = [430 - 10 * tried, 438 - 2 * tried, 550, 939, 438 - 2 * tried]
        if tried >= 6:  # no more than there is
            less[2:4] = 250, 930
        assert shown[tried + 1][0] == less
    assert operations.reshape(4, 2).tolist() == [[1, 1], [0, 0], [2, 1], [0, 0]]
    assert ranks.reshape(4, 2)[[0, 2]].tolist() == [[11, 11], [12, 11]]
    assert gaps.tolist() == [1 - 4 / 5, 1.0, 1 - 2 / 8, 0.0]


class Fitting(Shrinking):
    """Everything fits."""

    def _over(self, operations, ranks, who, capacity, deadlines):
        return np.zeros((len(who), 5), dtype=np.int64)


def test_where_all_fit_nothing_is_chosen_again():
    found = scripted(Fitting, [None] * 4, asked=[], shown=[], first=None)
    operations, _, _ = found.operations("capacity", "deadlines")
    assert len(found.script.shown) == 1
    assert operations.reshape(4, 2).tolist() == [[1, 1], [2, 1], [0, 2], [0, 0]]


class Filling(Scripted):
    """Client 1 never fits; the others do, and use their time."""

    def _capacities(self, capacity, deadlines):
        return np.zeros((4, self.script.resources), int), np.ones((4, self.script.resources), int)

    def _over(self, operations, ranks, who, capacity, deadlines):
        return (who == 1)[:, None] * np.ones(self.script.resources, int)

    def _choose(self, shown, who, coupled=None):
        return Solution(np.ones((len(who), 2), int), np.full(len(who), 3.0), np.full(4, 4.0))

    def _use_time(self, client, choice, at_most, capacity, deadlines):
        assert at_most.shape == (4, self.script.resources)
        assert (capacity, deadlines) == ("capacity", "deadlines")
        choice[client] = 2, client
        return 0.5


@pytest.mark.parametrize(
    "options,used",
    [
        ({"resources": 6}, True),
        ({"resources": 5}, False),
        ({"resources": 6, "coupling": "spread"}, False),
        ({"resources": 6, "method": "two-stage"}, False),
    ],
)
def test_time_is_used_by_those_that_fit_and_have_a_deadline_and_plan_alone(options, used):
    found = scripted(Filling, [9.0, 9.0, None, 9.0], **options)
    operations, ranks, gaps = found.operations("capacity", "deadlines")
    chosen = [[2, 0], [0, 0], [1, 1], [2, 3]] if used else [[1, 1], [0, 0], [1, 1], [1, 1]]
    assert operations.reshape(4, 2).tolist() == chosen
    assert ranks.reshape(4, 2)[[0, 2, 3]].tolist() == [
        [k + 10 for k in chosen[i]] for i in (0, 2, 3)
    ]
    assert gaps.tolist() == ([0.125, 1, 0.25, 0.125] if used else [0.25, 1, 0.25, 0.25])


def test_gaps_are_shares_of_bounds_above_nothing():
    value = np.array([3.0, 0.25, 0.0, NONE, 4.5, -1.0, -0.25])
    bound = np.array([4.0, 0.5, 0.0, 3.0, 4.0, 0.0, -0.5])
    assert _gaps(value, bound).tolist() == [0.25, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0]


# -- time that is left -----------------------------------------------------------------------


class Timed(Scripted):
    """Client 1 of two: option 1 is FULL, which takes time, option 2 is half of that, and none."""

    @property
    def items(self):
        """Bytes, where a subnet is FULL; nothing else has a price."""
        costs = np.zeros((2, len(self.script.takes), 3, 6), dtype=np.int64)
        costs[1, :, 1, 2], costs[1, :, 1, 3] = self.script.up, self.script.down
        return costs

    @property
    def structure(self):
        return Structure.plain(len(self.script.takes), 3, 6)

    @property
    def share(self):
        return np.array([0.0, 1.0, 0.5])

    @property
    def utilities(self):
        """Of training, each client's own; of the rest everybody's, and nothing."""
        train = np.zeros((2, len(self.script.takes), 3))
        train[1, :, 1], train[1, :, 2] = self.script.gains, 1.0
        return train, np.full((1, len(self.script.takes), 3), 0.25)

    def _materialise(self, choice):
        return choice, choice

    def _over(self, operations, ranks, who, capacity, deadlines):
        assert who.tolist() == [1] * len(operations)
        full = (operations == 1).sum(axis=1)
        if len(operations) == 1:
            self.script.allowed = full[0] + self.script.together
        over = np.zeros((len(operations), 6), dtype=np.int64)
        over[:, 1] = np.maximum(0, full - self.script.allowed)  # memory
        over[:, 5] = ((operations == 1) * self.script.takes).sum(axis=1) - deadlines[1]
        return over


def filled(takes, gains, deadline=100, up=(), down=(), together=99, start=None):
    """The subnets that are FULL in the end, and what that is said to be worth."""
    script = {"takes": np.array(takes), "gains": np.array(gains), "up": up or 0, "down": down or 0}
    found = scripted(Timed, [9.0, 9.0], resources=6, together=together, **script)
    choice = np.zeros((2, len(takes)), dtype=np.int64)
    choice[1] = 0 if start is None else start
    at_most = np.array([[-1] * 6, [99, 99, 10, 20, 99, 99]])
    worth = found._use_time(1, choice, at_most, "capacity", np.array([7, deadline]))
    assert not choice[0].any()
    return np.flatnonzero(choice[1] == 1).tolist(), worth


def test_those_first_that_are_worth_most_for_their_time():
    """0.2, 0.12, 0.1: together exactly the deadline."""
    assert filled([30, 20, 25, 40, 50], [3.0, 4.0, 1.0, 2.0, 6.0]) == ([0, 1, 4], 13.0)


def test_of_equals_the_first_and_more_in_what_is_left():
    """Of 100 ticks 20, 20 and 30 leave 30: 40 are too many, 25 are not."""
    takes, gains = [40, 20, 20, 30, 25], [2.0, 4.0, 4.0, 5.0, 1.0]
    assert filled(takes, gains) == ([1, 2, 3, 4], 14.0)
    assert filled([60, 60], [2.0, 2.0]) == ([0], 2.0)


def test_what_is_no_better_than_it_is_stays():
    """Options are worth 1 where they are half: more than 0.5, as much as 1, less than 3."""
    found = filled([20, 20, 20, 20], [0.5, 1.0, 3.0, 4.0], start=[2, 2, 2, 1])
    assert found == ([2, 3], 2.0)
    assert filled([20, 20], [0.0, -1.0]) == ([], 0.0)


@pytest.mark.parametrize("takes,full", [(90, [0]), (89, [0, 1])])
def test_a_tenth_of_the_time_may_be_left(takes, full):
    """Of 100, of which one subnet takes most already."""
    assert filled([takes, 5], [1.0, 1.0], start=[1, 0])[0] == full


def test_what_takes_no_time_counts_as_one_tick():
    assert filled([7, 1, 0, 1], [9.0, 3.0, 2.0, 1.0], 10, start=[1, 0, 0, 0]) == ([0, 1, 2, 3], 6.0)
    # 3 ticks are left, which 2 and 1 take.
    assert filled([7, 1, 0, 2], [9.0, 3.0, 2.0, 9.0], 10, start=[1, 0, 0, 0])[0] == [0, 1, 3]


@pytest.mark.parametrize("traffic", [{"up": [4, 11, 6]}, {"down": [4, 21, 16]}])
def test_bytes_are_those_of_prices_and_may_be_all_there_is(traffic):
    """10 up and 20 down: what would take more alone is left out."""
    assert filled([20, 20, 20], [1.0, 9.0, 1.0], **traffic) == ([0, 2], 2.0)


def test_where_not_all_fit_together_the_first_does_and_there_are_four_steps():
    gains = [1.0, 5.0, 4.0, 2.0, 3.0, 6.0]
    assert filled([1] * 6, gains, together=1) == ([1, 2, 4, 5], 18.0)
    assert filled([1] * 6, gains, together=0) == ([], 0.0)
