"""The task by hand arithmetic on four examples of three classes."""

import math

import numpy as np
import pytest
import torch

from d2ft_fl.tasks.image_classification import ImageClassification
from d2ft_fl.tasks.task import BaseTask, Batch, Outputs, add_sums

CPU = torch.device("cpu")
LOG2, LOG4 = math.log(2), math.log(4)
# softmax of a row: (1/4, 1/4, 1/2) and (2/4, 1/4, 1/4)
LOGITS = torch.tensor([[0.0, 0.0, LOG2], [LOG2, 0.0, 0.0]], dtype=torch.float64)


def batch(*labels):
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels))


def test_the_loss_is_the_summed_cross_entropy():
    """-log 1/2 of label 2 in the first row, -log 1/4 of label 1 in the second."""
    loss = ImageClassification().loss(Outputs(LOGITS.clone()), batch(2, 1))
    assert float(loss) == pytest.approx(LOG2 + LOG4)


def test_a_client_that_has_a_label_often_gets_a_larger_logit_for_it():
    """Counts 1, 0, 3 plus one each of 7: at tau = 2 the prior is 2 log(2/7, 1/7, 4/7).

    The first row is then proportional to (1 * 4, 1 * 1, 2 * 16) / 49: label 2 has 32/37.
    """
    task = ImageClassification(2.0).for_client(np.array([0, 2, 2, 2]), 3, CPU)
    expected = 2 * np.log(np.array([2, 1, 4]) / 7)
    assert task.prior.numpy() == pytest.approx(expected, rel=1e-6)
    loss = task.loss(Outputs(LOGITS[:1].clone()), batch(2))
    assert float(loss) == pytest.approx(-math.log(32 / 37), rel=1e-6)


def test_without_adjustment_every_client_learns_the_same_task():
    task = ImageClassification()
    assert task.for_client(np.array([0, 0]), 3, CPU) is task


def test_figures_are_shares_and_means_over_all_batches():
    """Rows 0 and 1 are right for labels 2 and 0; batches of two and one count by examples."""
    task = ImageClassification(1.0).for_client(np.array([1]), 3, CPU)  # the prior is no figure's
    totals = add_sums({}, task.sums(Outputs(LOGITS), batch(2, 1)))
    totals = add_sums(totals, task.sums(Outputs(LOGITS[1:]), batch(0)))
    assert task.figures(totals) == {
        "accuracy": 2 / 3,
        "loss": pytest.approx((LOG2 + LOG4 + LOG2) / 3),
    }
    assert set(task.metrics) == set(task.figures(totals))


def test_sums_of_many_batches_are_not_rounded_to_float32():
    """2^24 + 1 is no float32."""
    totals = add_sums({"loss": torch.tensor(2.0**24).double()}, {"loss": torch.tensor(1.0)})
    assert float(totals["loss"]) == 2**24 + 1


def test_a_batch_counts_its_examples_and_gives_some_of_them():
    task = ImageClassification()
    whole = task.collate((torch.arange(6.0).reshape(3, 2), torch.tensor([5, 6, 7])))
    part = whole.rows(1, 3)
    assert (task.weight(whole), task.weight(part)) == (3, 2)
    assert part.inputs.tolist() == [[2, 3], [4, 5]]
    assert part.targets.tolist() == [6, 7]
    moved = whole.to(torch.device("meta"))
    assert (moved.inputs.shape, moved.targets.shape) == ((3, 2), (3,))
    assert moved.inputs.is_meta
    assert moved.targets.is_meta


def test_more_of_the_primary_figure_is_better_unless_a_task_says_otherwise():
    assert BaseTask.maximise
    assert ImageClassification().primary == "accuracy"
    assert ImageClassification().maximise
