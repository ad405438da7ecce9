"""Many clients: each gets its own knapsack; coupled ones respond to all others."""

import numpy as np
import pytest

from tests.planning.solver import tiny
from tests.planning.solver.interpreted import instance, many
from tests.planning.solver.tiny import NOTHING, drawn, for_seeds

CLIENTS, ITEMS, OPTIONS, RESOURCES = 3, 2, 4, 5


def batch(seed=0, values=CLIENTS):
    """Three clients of two tables; the first option of all items costs nothing."""
    draw = np.random.default_rng(seed)
    p = drawn(seed, ITEMS, OPTIONS, RESOURCES)
    cost = draw.integers(0, 6, (2, ITEMS, OPTIONS, RESOURCES))
    cost[:, :, 0] = 0
    return instance.Batch(
        value=draw.integers(0, 9, (values, ITEMS, OPTIONS)) / 8,
        cost=cost,
        ladder=np.stack([p.ladder, p.ladder + (p.ladder > 0)]),
        table=np.array([1, 0, 1]),
        capacity=2 ** draw.integers(2, 6, (CLIENTS, RESOURCES)),
        **{name: getattr(p, name) for name in ("first", "group", "level", "mode", "allowed")},
    )


def client(b, c, value=None):
    """The knapsack of a client."""
    value = b.value[c if len(b.value) > 1 else 0] if value is None else value
    parts = {name: getattr(b, name) for name in ("first", "group", "level", "mode", "allowed")}
    return instance.Instance(
        value=value, cost=b.cost[b.table[c]], ladder=b.ladder[b.table[c]],
        capacity=b.capacity[c], **parts,
    )  # fmt: skip


# -- each by itself --------------------------------------------------------------------------


def test_every_client_is_solved_from_its_own_start(monkeypatch):
    asked, answers = [], iter([([1, 2], 7.0, 9.0), ([3, 0], NOTHING, 8.0), ([2, 1], 5.0, 6.0)])

    def solve_one(p, x, prices, fresh, effort):
        asked.append((p, x.choice.tolist(), prices.shape, fresh, effort))
        x.choice[...], value, bound = next(answers)
        x.used[...] = 99
        return value, bound

    monkeypatch.setattr(many, "solve_one", solve_one)
    b = batch()._replace(capacity=np.full((3, RESOURCES), 64))
    b.capacity[2, 4] = 0  # which is over then
    b.cost[1, 0, 2, 4] = 1
    choice, values, bounds = np.array([[0, 1], [2, 3], [3, 3]]), np.zeros(3), np.zeros(3)
    many.solve_all(b, choice, values, bounds, 4)
    assert [call[1:] for call in asked] == [
        (start, (RESOURCES,), True, 4) for start in ([0, 1], [2, 3], [3, 3])
    ]
    for c, (p, *_) in enumerate(asked):
        assert all(np.array_equal(a, o) for a, o in zip(p, client(b, c), strict=True))
    assert choice.tolist() == [[1, 2], [3, 0], [2, 1]]
    assert values.tolist() == [b.value[0, 0, 1] + b.value[0, 1, 2], NOTHING, NOTHING]
    assert bounds.tolist() == [9, 8, 6]


@for_seeds(5)
def test_a_choice_is_worth_no_more_than_the_best_there_is(seed):
    b = batch(seed, values=1)
    choice = np.zeros((CLIENTS, ITEMS), dtype=np.int64)
    values, bounds = np.zeros(CLIENTS), np.zeros(CLIENTS)
    many.solve_all(b, choice, values, bounds, 2)
    for c in range(CLIENTS):
        p = client(b, c)
        assert values[c] == max(tiny.optimum(p, case) for case in range(3)) <= bounds[c] + 1e-12
        assert tiny.fits(p, choice[c])


# -- coupled ---------------------------------------------------------------------------------


def test_returns_diminish_from_one_a_client():
    """At as many clients as the reference, one more returns half."""
    assert many.returns(0.0, 4.0) == 0
    assert many.returns(4.0, 4.0) == pytest.approx(4 * np.log(2), rel=1e-15)
    slope = (many.returns(4 + 1e-6, 4.0) - many.returns(4 - 1e-6, 4.0)) / 2e-6
    assert slope == pytest.approx(0.5)


SHARE = np.array([0, 0, 0.5, 1.0])
TRAIN, WEIGHT, REFERENCE = np.array([3.0, 2.0]), np.array([1.0, 2.0, 0.5]), 3.0


class Responses:
    """Stands in for the solver: responses by script, and what was asked."""

    def __init__(self, monkeypatch, script):
        self.script, self.asked, self.lowered = iter(script), [], []
        monkeypatch.setattr(many, "solve_one", self.solve_one)
        monkeypatch.setattr(many, "lower_prices", self.lower_prices)

    def solve_one(self, p, x, prices, fresh, effort):
        self.asked.append((p, p.value.copy(), x.choice.tolist(), prices.tolist(), fresh, effort))
        x.choice[...] = next(self.script)
        x.used[...] = 0
        prices += 1 + np.arange(RESOURCES) / 4 + len(self.asked)
        return 99.0, 99.0

    def lower_prices(self, p, q, x, case, steps, length, bound, best):
        assert q.prices.tolist() == best.tolist()
        assert q.v.shape == (OPTIONS, ITEMS)
        self.lowered.append((p, p.value.copy(), case, steps, length, bound, best.tolist()))
        return 70.0 + len(self.lowered)


def h(amount):
    return REFERENCE * np.log(1 + amount / REFERENCE)


def spread(b, responses, least, sweeps=3, effort=5):
    """Run it: choices, values, bounds, slopes."""
    choice = np.zeros((CLIENTS, ITEMS), dtype=np.int64)
    values, bounds, marginal = (np.full(n, 77.0) for n in (CLIENTS, CLIENTS, ITEMS))
    many.spread_all(
        b, TRAIN, SHARE, WEIGHT, REFERENCE, least, sweeps, choice, values, bounds, marginal, effort
    )
    return choice, values, bounds, marginal


@pytest.mark.parametrize("least", [0, 1, 2, 3])
@pytest.mark.parametrize("values", [1, CLIENTS])
@for_seeds(4)
def test_each_client_responds_to_what_all_others_train(seed, values, least, monkeypatch):
    script = np.random.default_rng(seed + 50).integers(0, OPTIONS, (3 * CLIENTS, ITEMS))
    b = batch(seed, values)
    b.value[0, 1, 1] = NOTHING
    r = Responses(monkeypatch, script.tolist())
    choice, value, bounds, marginal = spread(b, r, least)
    now, extra, prices = np.zeros((CLIENTS, ITEMS), dtype=int), np.zeros(ITEMS), {}
    for step, (p, v, start, at, fresh, effort) in enumerate(r.asked):
        c, own = step % CLIENTS, client(b, step % CLIENTS)
        others = np.arange(CLIENTS) != c
        amount = WEIGHT[others] @ SHARE[now[others]]
        people = (SHARE[now[others]] > 0).sum(axis=0)
        wanted = own.value.copy()
        for i in range(ITEMS):
            more = TRAIN[i] * (h(amount[i] + SHARE * WEIGHT[c]) - h(amount[i]))
            wanted[i] += more + extra[i] * (people[i] < least) * (SHARE > 0)
        assert v == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        assert np.array_equal(p.capacity, own.capacity)
        assert np.array_equal(p.cost, own.cost)
        assert start == now[c].tolist()
        assert at == prices.get(c, [0.0] * RESOURCES)
        assert (fresh, effort) == (step < CLIENTS, 5 if step >= 2 * CLIENTS else 0)
        prices[c] = [a + 1 + r / 4 + step + 1 for r, a in enumerate(at)]
        if tiny.fits(own, script[step]):
            now[c] = script[step]
        if c == CLIENTS - 1:
            trained = (SHARE[now] > 0).sum(axis=0)
            extra = np.where(trained < least, 1.5 * extra + 3.0, extra)
    assert len(r.asked) == 3 * CLIENTS
    assert np.array_equal(choice, now)
    assert marginal == pytest.approx(1 / (1 + WEIGHT @ SHARE[now] / REFERENCE), rel=1e-14)
    assert value.tolist() == [tiny.worth(client(b, c), now[c]) for c in range(CLIENTS)]
    assert bounds.tolist() == [71, 72, 73]
    for c, (p, v, case, steps, length, bound, at) in enumerate(r.lowered):
        own = client(b, c)
        slope = (TRAIN * marginal)[:, None] * SHARE * WEIGHT[c]
        assert v == pytest.approx(own.value + slope, rel=1e-14)
        assert np.array_equal(p.capacity, own.capacity)
        assert (case, steps, at) == (-1, 6, prices[c])
        assert bound == pytest.approx(tiny.dual(own._replace(value=v), at)[1].max())
        assert length == 0.02 * bound


def test_a_client_that_cannot_do_anything_has_no_value(monkeypatch):
    b = batch()
    b.capacity[1] = -1
    r = Responses(monkeypatch, [[3, 3]] * 9)
    choice, values, _, marginal = spread(b, r, 1)
    assert choice[1].tolist() == [0, 0]
    assert values[1] == NOTHING
    assert (values[[0, 2]] > NOTHING).all()
    assert (marginal <= 1).all()


def test_with_no_sweep_nobody_trains(monkeypatch):
    r = Responses(monkeypatch, [])
    choice, values, _, marginal = spread(batch(), r, 1, sweeps=0)
    assert not choice.any()
    assert marginal.tolist() == [1, 1]
    assert values.tolist() == batch().value[:, :, 0].sum(axis=1).tolist()


def test_items_that_too_few_train_are_worth_more_from_sweep_to_sweep(monkeypatch):
    """By the most that training any item is worth: 3, then 1.5 * 3 + 3; none does."""
    r = Responses(monkeypatch, [[0, 0]] * 9)
    b = batch()
    spread(b, r, 1)
    extra = [v[1, 3] - b.value[0, 1, 3] for p, v, *_ in r.asked[::3]]
    alone = 2 * h(1.0)
    assert extra == pytest.approx([alone, alone + 3, alone + 7.5])
