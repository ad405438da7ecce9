import numpy as np
from matplotlib.image import imread

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.resources import RESOURCES, Cost
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.records.metrics import with_metrics
from d2ft_fl.report.format import quantity
from d2ft_fl.report.plan_figure import draw_plan
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import Participant
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.server.console import columns, format_round, title
from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.tasks.made_up import DISTANCE, Distance


def test_quantities_carry_a_prefix():
    assert quantity(0, "B") == "0 B"
    assert quantity(999, "B") == "999 B"
    assert quantity(1234567, "FLOP") == "1.23 MFLOP"


def test_a_rounds_line_says_used_allowed_and_worst():
    part = {"used_mean": 50.0, "full_mean": 100.0, "allowed_share": 0.6, "worst": 0.98}
    free = {"used_mean": 70.0, "full_mean": 100.0, "allowed_share": None, "worst": None}
    row = {
        "round": 3, "accuracy": 0.875, "loss": 0.5, "coverage": 0.9, "round_seconds": 1.25,
        "flops": part, "memory": part, "bytes_up": part, "bytes_down": free,
    }  # fmt: skip
    line = format_round(with_metrics(row))
    assert "87.5%" in line
    assert "50% /  60% ( 98%)" in line
    assert "70% /  any" in line


def test_a_rounds_line_has_the_metrics_of_its_task_below_their_names(capsys, monkeypatch):
    monkeypatch.setattr(Components, "task", Distance())
    title(RunConfig())
    columns(RunConfig())
    heads = capsys.readouterr().out.splitlines()[-1]
    part = {"used_mean": 50.0, "full_mean": 100.0, "allowed_share": 0.6, "worst": 0.98}
    row = {
        "round": 3, **DISTANCE.entries({"distance": 12.3456, "within": 0.5}), "coverage": 0.9,
        "round_seconds": 1.25, **dict.fromkeys(RESOURCES, part),
    }  # fmt: skip
    line = format_round(row)
    for head, text in (("round", "3"), ("distance", "12.346"), ("within", "50.0%")):
        end = heads.index(head) + len(head)
        assert line[:end].split()[-1] == text
    line = format_round(row | DISTANCE.entries(None))
    assert line.split()[:3] == ["3", "-", "-"]


def test_a_picture_shows_each_operation_in_its_colour(tmp_path):
    operations = np.zeros((1, 2, 3), dtype=np.int8)
    operations[0, 0] = Operation.FULL
    operations[0, 1, 0] = Operation.FORWARD_ONLY
    client = Participant(0, 10, Budget(device="phone"), np.zeros(4, dtype=np.int64))
    plan = Plan(1, [client], [Assignment(0, Schedule(operations), Cost())])
    draw_plan(plan, tmp_path / "plan.png")
    pixels = (imread(tmp_path / "plan.png")[..., :3] * 255).round().astype(int)
    counts = {}
    for name, colour in (("full", (0, 115, 178)), ("forward", (230, 158, 0)), ("skip", (237,) * 3)):
        counts[name] = int((np.abs(pixels - colour).max(axis=2) <= 2).sum())
    assert counts["full"] > 2 * counts["forward"] > 0
    assert counts["skip"] > 1.5 * counts["forward"]
