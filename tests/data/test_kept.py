"""Arrays that are worked out once on a machine."""

from dataclasses import replace

import numpy as np
import pytest

from d2ft_fl.data import partition
from d2ft_fl.data.federated_data import open_data
from d2ft_fl.data.kept import kept
from d2ft_fl.errors import ConfigError
from tests.data.test_federated_data import SPEC


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "d2ft-fl" / "data"


def made(calls, value):
    def make():
        calls.append(value)
        return {"a": np.array([value, 2]), "b": np.arange(3, dtype=np.uint8)}

    return make


def test_they_are_worked_out_once_for_each_key(cache):
    calls = []
    first = kept(("one", 1), made(calls, 1))
    again = kept(("one", 1), made(calls, 7))
    assert again["a"].tolist() == first["a"].tolist() == [1, 2]
    assert again["b"].dtype == np.uint8
    assert kept(("one", 2), made(calls, 3))["a"].tolist() == [3, 2]
    assert calls == [1, 3]


def test_a_damaged_file_is_made_anew(cache):
    calls = []
    kept("one", made(calls, 1))
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert kept("one", made(calls, 5))["a"].tolist() == [5, 2]
    assert kept("one", made(calls, 6))["a"].tolist() == [5, 2]


def test_nothing_is_kept_of_what_fails(cache):
    def fail():
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        kept("one", fail)
    assert kept("one", made([], 1))["a"].tolist() == [1, 2]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept("one", made([], 1))["a"].tolist() == [1, 2]


@pytest.mark.parametrize("dataset", ["digits", "made-up"])
def test_partitions_from_the_cache_are_those_that_were_made(cache, monkeypatch, dataset):
    spec = replace(SPEC, dataset=dataset, seed=41)
    fresh = open_data.__wrapped__(spec).partitions
    with monkeypatch.context() as patch:
        patch.setattr(partition, "_divided", None)  # not called
        again = open_data.__wrapped__(spec).partitions
    assert [p.tolist() for p in again] == [p.tolist() for p in fresh]
    assert {p.dtype for p in again} == {np.dtype(np.int64)}
    other = open_data.__wrapped__(replace(spec, clients=9)).partitions
    assert len(other) == 9
    sample = open_data.__wrapped__(replace(spec, train_examples=200)).partitions
    assert sum(map(len, sample)) == 200
