"""Lines of rounds of today's runs and of older ones."""

from d2ft_fl.records.metrics import metric_totals, primary_of, with_metrics
from tests.tasks.made_up import DISTANCE


def test_a_line_of_an_old_run_is_one_of_image_classification():
    line = with_metrics({"round": 1, "accuracy": 0.5, "loss": 1.25})
    assert line["metrics"] == {"accuracy": 0.5, "loss": 1.25}
    assert line["task"]["primary"] == "accuracy"
    assert line["task"]["maximise"] is True
    assert primary_of(line) == 0.5


def test_an_old_line_that_was_not_evaluated_has_no_values():
    line = with_metrics({"round": 1, "accuracy": None, "loss": None})
    assert line["metrics"] == {"accuracy": None, "loss": None}
    assert primary_of(line) is None


def test_a_line_of_another_task_stays_as_it_is():
    line = {"round": 1, **DISTANCE.entries({"distance": 2.0, "within": 0.5})}
    assert with_metrics(line) == line
    assert primary_of(line) == 2.0


def test_totals_have_the_last_values_and_the_best():
    """The last round was not evaluated, and the least distance was in the first."""
    rows = [
        DISTANCE.entries({"distance": 1.0, "within": 0.25}),
        DISTANCE.entries({"distance": 3.0, "within": 0.75}),
        DISTANCE.entries(None),
    ]
    found = metric_totals(rows)
    assert found["metrics"] == {"distance": 3.0, "within": 0.75}
    assert (found["best"], found["best_distance"], found["distance"]) == (1, 1, 3)
    assert metric_totals(rows[2:])["best"] is None
