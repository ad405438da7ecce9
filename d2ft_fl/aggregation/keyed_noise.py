"""Randomness that nobody can tell without a key: of noise that hides something, and of draws."""

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


class Noise:
    """Random numbers that nobody can tell without the key: AES-256 in counter mode.

    Args:
        key: Secret, :data:`KEY_BYTES` of them.
        context: What they are for; others are independent.
    """

    def __init__(self, key: bytes, *context: object):
        own = hashlib.blake2b(repr(context).encode(), key=key, digest_size=32).digest()
        self._stream = Cipher(algorithms.AES(own), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """Float64, above 0 and below 1."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, count: int) -> np.ndarray:
        """Float64 of mean 0 and variance 1, by Box and Muller; none is beyond 8.6."""
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def noise_key(config: "RunConfig", folder: Path) -> bytes:
    """Return the key of a run's noise: secret and in its folder, unless ``noise-seed`` gives it.

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
