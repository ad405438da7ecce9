"""Numbers of a key by hand, and where a run's key comes from."""

import hashlib
import os

import numpy as np
import pytest

from d2ft_fl.aggregation.keyed_noise import KEY_FILE, REACH, Noise, noise_key
from d2ft_fl.aggregation.privacy import Privacy, drawn
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError

KEY = bytes(range(32))


class Stream:
    """Gives the same byte again and again."""

    def __init__(self, byte):
        self.byte = byte

    def update(self, content):
        assert not any(content)
        return self.byte * len(content)


def constant(byte):
    noise = Noise(KEY, "noise")
    noise._stream = Stream(byte)
    return noise


def test_uniform_numbers_are_the_middles_of_two_to_the_52_parts():
    assert constant(b"\x00").uniform(3).tolist() == [2.0**-53] * 3
    assert constant(b"\xff").uniform(2).tolist() == [1 - 2.0**-53] * 2
    # The first 52 bits of 0x0101010101010101 are 0x0101010101010.
    assert constant(b"\x01").uniform(1).tolist() == [(0x0101010101010 + 0.5) / 2**52]
    assert len(Noise(KEY, "noise").uniform(0)) == 0


@pytest.mark.parametrize("count", [1, 4, 7])
def test_normal_numbers_are_those_of_box_and_muller(count):
    half = (count + 1) // 2
    numbers = Noise(KEY, "noise", 3).uniform(2 * half)
    whole = np.sqrt(-2 * np.log(numbers[:half])) * np.exp(2j * np.pi * numbers[half:])
    found = Noise(KEY, "noise", 3).normal(count)
    assert found.shape == (count,)
    assert np.allclose(found, [*whole.real, *whole.imag][:count], rtol=1e-12)


def test_none_is_beyond_its_reach():
    """The least uniform number is 2^-53, and the angle then 0."""
    largest = constant(b"\x00").normal(1)[0]
    assert largest == pytest.approx((106 * np.log(2)) ** 0.5)
    assert largest < REACH < 1.01 * largest


# -- who is drawn --------------------------------------------------------------------------------


def test_a_clients_own_number_decides():
    own = Privacy(1.0, 1.0, 0.4, 1e-5)
    numbers = Noise(KEY, "draw", 6).uniform(31)
    wanted = [client for client in (2, 3, 5, 8, 13, 21, 30) if numbers[client] < 0.4]
    assert 0 < len(wanted) < 7
    assert drawn(own, KEY, 6, [30, 5, 2, 3, 21, 8, 13]) == wanted


def test_a_number_as_large_as_the_chance_is_not_drawn():
    number = float(Noise(KEY, "draw", 6).uniform(1)[0])
    for rate, found in ((number, []), (np.nextafter(number, 1), [0]), (1.0, [0])):
        assert drawn(Privacy(1.0, 1.0, rate, 1e-5), KEY, 6, [0]) == found


# -- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_key_and_nothing_is_written(tmp_path, seed):
    config = RunConfig(noise_seed=seed)
    assert noise_key(config, tmp_path) == hashlib.blake2b(b"%d" % seed, digest_size=32).digest()
    assert list(tmp_path.iterdir()) == []


def test_a_secret_key_is_on_the_disk_before_it_is_used(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / KEY_FILE).read_bytes()))
    config = RunConfig(noise_seed=-1)
    key = noise_key(config, tmp_path)
    assert synced == [key]
    assert len(key) == 32
    assert (tmp_path / KEY_FILE).read_bytes() == key
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert noise_key(config, tmp_path) == key  # and the next time it is read
    assert len(synced) == 1


@pytest.mark.parametrize("length", [31, 33])
def test_a_key_of_another_length_is_none(tmp_path, length):
    (tmp_path / KEY_FILE).write_bytes(bytes(length))
    with pytest.raises(ConfigError, match=f"is no key: it has {length} bytes, not 32"):
        noise_key(RunConfig(noise_seed=-1), tmp_path)


def test_only_a_run_that_goes_on_must_have_its_key(tmp_path):
    fresh, resumed = RunConfig(noise_seed=-1), RunConfig(noise_seed=-1, resume=str(tmp_path))
    for name, config in (("no rounds yet", resumed), ("of another run", fresh)):
        folder = tmp_path / name
        folder.mkdir()
        if config is fresh:
            (folder / "rounds.jsonl").touch()
        assert len(noise_key(config, folder)) == 32
    (tmp_path / "rounds.jsonl").touch()
    with pytest.raises(ConfigError, match=r"noise\.key', the key of the run's noise, is not there"):
        noise_key(resumed, tmp_path)
