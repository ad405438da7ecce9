import numpy as np
import pytest
import torch

from d2ft_fl.scores import FisherBook, magnitude, normalised
from d2ft_fl.subnets import Kind
from tests.conftest import build, weights_of

MODEL, ARCH = build(depth=2)


def test_magnitude_is_the_mean_absolute_weight_of_a_subnets_slices():
    weights = weights_of(MODEL)
    ours = magnitude(ARCH, weights)
    for block in range(2):
        for head in range(4):
            own = [p.pack(weights[p.name], [head]) for p in ARCH.of_kind(Kind.SLICED, block)]
            values = torch.cat([t.flatten() for t in own]).abs()
            assert ours[block, head] == pytest.approx(float(values.double().mean()), rel=1e-6)


def test_normalised_scores_have_mean_one():
    assert normalised(np.array([[1.0, 3.0]])).tolist() == [[0.5, 1.5]]
    assert normalised(np.zeros((2, 2))).tolist() == [[1, 1], [1, 1]]


def test_before_anyone_scored_all_subnets_are_alike():
    assert (FisherBook().scores(ARCH) == 1).all()
    assert FisherBook().updated({}) == FisherBook()


def test_clients_count_by_examples_and_rounds_by_a_running_mean():
    one, two = np.array([[2.0, 0.0]]), np.array([[0.0, 4.0]])
    book = FisherBook().updated({5: (two, 1), 3: (one, 3)})
    np.testing.assert_allclose(book.mean, [[1.5, 0.5]])  # each normalised, 3 to 1
    again = book.updated({0: (two, 7)})
    np.testing.assert_allclose(again.mean, [[0.75, 1.25]])
