"""The planner's benchmark: its contract, and that what it says holds."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from d2ft_fl.bench.optimum import optimum
from d2ft_fl.bench.planner import gap_to
from d2ft_fl.bench.planner_clients import make_clients
from d2ft_fl.cli.main import app
from d2ft_fl.errors import RunError
from d2ft_fl.planning.knapsack import solve
from d2ft_fl.planning.problem import used

KEYS = {
    "clients", "subnets", "coupling", "seconds", "gap_mean", "gap_worst", "violations",
    "short_subnets", "peak_mb",
}  # fmt: skip


def test_rows_are_a_contract():
    asked = ["bench", "planner", "--clients", "12", "--subnets", "24", "--sample", "6", "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert [(r["coupling"], r["operations"]) for r in rows] == [("none", 3), ("spread", 3), ("none", 4)]  # fmt: skip # noqa: E501
    for row in rows:
        assert row.keys() >= KEYS
        assert row["clients"] == 12
        assert row["violations"] == 0
        assert 0 <= row["gap_mean"] <= row["gap_worst"] < 0.2
        assert row["seconds"] > 0


@pytest.mark.parametrize("operations", [3, 4])
def test_clients_are_the_same_however_many_there_are(operations):
    few, many = make_clients(5, 24, operations), make_clients(9, 24, operations)
    assert np.array_equal(few.capacities, many.capacities[:5])
    assert np.array_equal(few.costs[few.tables], many.costs[many.tables[:5]])


def test_the_oracle_is_no_less_than_the_solver_and_no_more_than_its_bound():
    for operations in (3, 4):
        c = make_clients(6, 24, operations)
        found = solve(c.values, c.costs, c.capacities, c.structure, c.tables, effort=1)
        assert (used(found.choice, c.costs, c.structure, c.tables) <= c.capacities).all()
        for client in range(6):
            best = optimum(c, client)
            assert found.value[client] <= best * (1 + 1e-4)
            assert best <= found.bound[client] * (1 + 1e-4)


def test_a_value_above_the_proven_optimum_is_an_error():
    assert gap_to(10.0, 9.0) == pytest.approx(0.1)
    assert gap_to(10.0, 10.0005) == 0
    with pytest.raises(RunError, match="above the proven optimum"):
        gap_to(10.0, 10.01)


@pytest.mark.parametrize("option", ["--clients=0", "--subnets=0", "--sample=-1"])
def test_wrong_numbers_are_named(option):
    result = CliRunner().invoke(app, ["bench", "planner", option])
    assert result.exit_code == 2
    assert option.split("=")[0] in result.output
