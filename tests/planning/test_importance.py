import numpy as np
import pytest
import torch

from d2ft_fl.planning.importance import MEASURED, ScoreBook, magnitude, normalised, subnet_scores
from d2ft_fl.subnets.architecture import Kind
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


def test_what_nobody_knows_of_stays_unknown_when_normalised():
    np.testing.assert_array_equal(normalised(np.array([[2.0, np.nan]])), [[1, np.nan]])
    np.testing.assert_array_equal(normalised(np.array([[0.0, np.nan]])), [[1, np.nan]])


def test_before_anyone_scored_low_blocks_come_first():
    """1.5 in the lowest of two blocks, 0.5 in the other, whatever is done to measurements."""
    for kind in MEASURED:
        found = subnet_scores(kind, ARCH, {}, ScoreBook())
        assert found == pytest.approx(np.repeat([[1.5], [0.5]], ARCH.heads, axis=1))
    assert (subnet_scores("uniform", ARCH, {}, ScoreBook()) == 1).all()
    assert ScoreBook().updated({}, 0.5) == ScoreBook()


def test_clients_count_by_examples_and_rounds_by_a_running_mean():
    one, two = np.array([[2.0, 0.0]]), np.array([[0.0, 4.0]])
    book = ScoreBook().updated({5: ({"fisher": two}, 1), 3: ({"fisher": one}, 3)}, 0.75)
    np.testing.assert_allclose(book.means["fisher"], [[1.5, 0.5]])  # each normalised, 3 to 1
    again = book.updated({0: ({"fisher": two}, 7)}, 0.75)
    np.testing.assert_allclose(again.means["fisher"], [[0.75 * 1.5, 0.75 * 0.5 + 0.25 * 2]])
    forgot = book.updated({0: ({"fisher": two}, 7)}, 0.0)
    np.testing.assert_allclose(forgot.means["fisher"], [[0, 2]])
    assert book.updated({}, 0.75).means == book.means


def test_kinds_have_means_of_their_own():
    first = {"fisher": np.array([[1.0, 3.0]]), "taylor": np.array([[3.0, 1.0]])}
    book = ScoreBook().updated({0: (first, 2)}, 0.5)
    book = book.updated({0: ({"taylor": np.array([[1.0, 1.0]])}, 2)}, 0.5)
    np.testing.assert_allclose(book.means["fisher"], [[0.5, 1.5]])
    np.testing.assert_allclose(book.means["taylor"], [[1.25, 0.75]])


def test_a_subnet_never_seen_keeps_the_mean_of_those_seen():
    nan = np.nan
    seen = np.array([[3.0, 1.0, nan, nan]])
    book = ScoreBook().updated({0: ({"gradient": seen}, 2)}, 0.5)
    np.testing.assert_allclose(book.scores("gradient"), [[1.5, 0.5, 1, 1]])
    later = np.array([[nan, 1.0, 3.0, nan]])
    book = book.updated({0: ({"gradient": later}, 2)}, 0.5)
    np.testing.assert_allclose(book.means["gradient"], [[1.5, 0.5, 1.5, nan]])
    np.testing.assert_allclose(book.scores("gradient")[0, 3], 3.5 / 3)


def test_only_fisher_is_rooted():
    values = np.array([[1.0, 4.0, 9.0, 0.0]] * 2)
    book = ScoreBook(dict.fromkeys(MEASURED, values))
    for kind in MEASURED:
        sizes = np.sqrt(values) if kind == "fisher" else values
        found = subnet_scores(kind, ARCH, {}, book)
        np.testing.assert_allclose(found, sizes / sizes.mean())
    found = subnet_scores("magnitude", ARCH, weights_of(MODEL), book)
    np.testing.assert_allclose(found, normalised(magnitude(ARCH, weights_of(MODEL))))
