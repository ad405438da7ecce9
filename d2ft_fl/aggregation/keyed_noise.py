"""Random numbers that nobody can predict without a key: noise for privacy, and draws of clients."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from d2ft_fl.errors import ConfigError

if TYPE_CHECKING:
    from d2ft_fl.config.run_config import RunConfig

KEY_FILE = "noise.key"
KEY_BYTES = 32
REACH = 8.6  # no normal number of Noise is further from 0: sqrt(-2 log 2^-53) = 8.57


class Noise:
    """Random numbers that nobody can predict without the key: AES-256 in counter mode.

    Args:
        key: :data:`KEY_BYTES` secret bytes.
        context: What the numbers are for; numbers of different contexts are independent.
    """

    def __init__(self, key: bytes, *context: object):
        stream_key = hashlib.blake2b(repr(context).encode(), key=key, digest_size=32).digest()
        self._stream = Cipher(algorithms.AES(stream_key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """Return uniform numbers above 0 and below 1: float64 [count]."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, count: int) -> np.ndarray:
        """Return normal numbers of mean 0 and variance 1: float64 [count].

        None is beyond :data:`REACH`. They are made by the method of Box and Muller.
        """
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def noise_key(config: "RunConfig", folder: Path) -> bytes:
    """Return the key of a run's noise: secret and in its folder, unless ``noise-seed`` gives it.

    Args:
        config: The options of the run.
        folder: The folder of the run, where a new key is written.

    Raises:
        ConfigError: When a run is resumed and its key is not there.
    """
    if config.noise_seed >= 0:
        return hashlib.blake2b(str(config.noise_seed).encode(), digest_size=KEY_BYTES).digest()
    path = folder / KEY_FILE
    if path.exists():
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise ConfigError(f"{str(path)!r} is no key: it has {len(key)} bytes, not {KEY_BYTES}")
        return key
    if folder.joinpath("rounds.jsonl").exists() and config.resume:
        raise ConfigError(f"resume: {str(path)!r}, the key of the run's noise, is not there")
    key = os.urandom(KEY_BYTES)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key
