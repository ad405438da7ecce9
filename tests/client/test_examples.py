"""Which examples a client trains on, and in which order."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2ft_fl.client.examples import LocalExamples
from d2ft_fl.tasks.image_classification import ImageClassification
from tests.conftest import CLASSIFY


def local_examples(count: int, seed: int = 3, epochs: int = 1) -> LocalExamples:
    """Return the examples of clients 0 and 1, of which client 1 has a number."""
    data = SimpleNamespace(
        partitions={0: np.arange(5), 1: np.arange(count)},
        client_batch=lambda client, positions, device: (torch.from_numpy(positions), client),
    )
    return LocalExamples(data, CLASSIFY, seed, epochs, torch.device("cpu"))


def a_task(count: int, round_number: int = 1, in_turn: bool = False, client: int = 1):
    policy = SimpleNamespace(in_turn=in_turn)
    return SimpleNamespace(client=client, round=round_number, examples=count, policy=policy)


@pytest.mark.parametrize("local,each", [(10, 3), (7, 7), (12, 4)])
def test_in_turn_all_are_seen_as_often(local, each):
    examples = local_examples(local)
    rounds = 2 * local
    seen = Counter()
    for round_number in range(1, rounds + 1):
        chosen = examples.choose(a_task(each, round_number, in_turn=True)).tolist()
        assert len(set(chosen)) == each
        seen.update(chosen)
    assert set(seen.values()) == {rounds * each // local}


def test_drawn_examples_depend_on_seed_round_and_client():
    chosen = {
        (seed, round_number, client): tuple(
            local_examples(5, seed).choose(a_task(4, round_number, client=client)).tolist()
        )
        for seed, round_number, client in [(3, 1, 1), (4, 1, 1), (3, 2, 1), (3, 1, 0)]
    }
    assert len(set(chosen.values())) == 4
    assert tuple(local_examples(5).choose(a_task(4)).tolist()) == chosen[3, 1, 1]


def test_draws_are_those_of_streams_of_their_own():
    """In turn, run, client and 3 seed the order; else run, round, client and 1 that of epochs."""
    examples = local_examples(10, seed=7, epochs=2)
    turn = np.random.default_rng([7, 1, 3]).permutation(10).tolist()
    for number, places in ((1, [0, 1, 2, 3]), (2, [4, 5, 6, 7]), (3, [8, 9, 0, 1])):
        chosen = examples.choose(a_task(4, number, in_turn=True))
        assert chosen.tolist() == [turn[place] for place in places]
    draw = np.random.default_rng([7, 4, 1, 1])
    orders = [draw.permutation(10).tolist() for _ in range(2)]
    assert examples.choose(a_task(4, 4)).tolist() == orders[0][:4]
    found = examples.epochs(1, 4, np.array([2, 3, 5]))
    assert [epoch.tolist() for epoch in found] == [
        [number for number in order if number in (2, 3, 5)] for order in orders
    ]
    assert examples.seed_of(1, 4) == (7, 4, 1)


def test_epochs_order_the_chosen_examples_each_anew():
    examples = local_examples(30, epochs=2)
    chosen = examples.choose(a_task(20))
    first, second = examples.epochs(1, 1, chosen)
    assert first.tolist() == chosen.tolist()  # drawn from the order of the first epoch
    assert sorted(second) == sorted(chosen)
    assert second.tolist() != first.tolist()


def test_batches_are_cut_in_order_and_the_last_is_what_is_left():
    batches = list(local_examples(10).batches(1, np.array([4, 2, 9, 0, 7]), 2))
    assert [batch.inputs.tolist() for batch in batches] == [[4, 2], [9, 0], [7]]
    assert {batch.targets for batch in batches} == {1}


def test_what_a_client_learns_depends_on_its_own_labels():
    """Client 0 has labels 0 and 1 of 3, once each: with one more of each, 2/5, 2/5 and 1/5."""
    data = SimpleNamespace(
        partitions=[np.array([1, 3]), np.array([0, 2])],
        train=SimpleNamespace(labels=np.array([2, 0, 2, 1])),
        classes=3,
    )
    examples = LocalExamples(data, ImageClassification(1.0), 3, 1, torch.device("cpu"))
    shares = examples.task_of(0).prior.exp().tolist()
    assert shares == pytest.approx([0.4, 0.4, 0.2])


def test_a_client_that_flips_labels_trains_on_the_last_for_the_first():
    data = SimpleNamespace(
        partitions={0: np.arange(3), 1: np.arange(3)}, classes=10,
        train=SimpleNamespace(labels=np.array([0, 4, 9])),
        client_batch=lambda client, positions, device: (
            torch.zeros(len(positions)), torch.tensor([0, 4, 9])[positions]
        ),
    )  # fmt: skip
    examples = LocalExamples(data, CLASSIFY, 0, 1, torch.device("cpu"), lambda client: client == 1)
    assert examples.batch(0, np.arange(3)).targets.tolist() == [0, 4, 9]
    assert examples.batch(1, np.arange(3)).targets.tolist() == [9, 5, 0]
    plain, flipped = (
        replace(examples, task=ImageClassification(1.0)).task_of(client).prior.exp()
        for client in (0, 1)
    )
    twice, once = 2 / 13, 1 / 13  # three labels, and one more of each
    assert plain.tolist() == pytest.approx([twice if y in (0, 4, 9) else once for y in range(10)])
    assert flipped.tolist() == pytest.approx([twice if y in (9, 5, 0) else once for y in range(10)])
