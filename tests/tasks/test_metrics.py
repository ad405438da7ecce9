import json

import pytest

from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.metrics import MetricSpec
from tests.tasks.made_up import DISTANCE, Distance


@pytest.mark.parametrize("task", [ImageClassification(), Distance()])
def test_what_a_file_holds_reads_as_the_same_metrics(task):
    spec = MetricSpec.of(task)
    entries = json.loads(json.dumps(spec.entries(dict.fromkeys(spec.names, 0.5))))
    assert MetricSpec.from_entries(entries) == spec
    assert entries["metrics"] == dict.fromkeys(spec.names, 0.5)
    assert entries[spec.primary] == 0.5


def test_a_model_that_was_not_evaluated_has_metrics_without_values():
    assert DISTANCE.entries(None)["metrics"] == {"distance": None, "within": None}


def test_a_figure_that_a_task_forgets_is_an_error():
    with pytest.raises(KeyError, match="within"):
        DISTANCE.entries({"distance": 1.0})


def test_the_best_follows_the_direction():
    values = [None, 3.0, 1.0, 2.0]
    assert MetricSpec.of(ImageClassification()).best(values) == 3
    assert DISTANCE.best(values) == 1
    assert DISTANCE.best([None]) is None
    assert sorted([3.0, 1.0, 2.0], key=DISTANCE.order) == [1, 2, 3]
