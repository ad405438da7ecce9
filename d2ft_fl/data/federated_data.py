"""Data sets, their held-out test split, and their partitions over clients.

Images are decoded and resized once per process, a client's at a time, and kept as uint8.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from d2ft_fl.config.choices import DIGITS, EMBEDDED_DATASETS, MADE_UP
from d2ft_fl.data.partition import partition_of
from d2ft_fl.data.sources import (
    SPLIT_SEED,
    Split,
    digits,
    first_line,
    folder_splits,
    hub_or_folder,
    made_up,
)
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(eq=False)
class FederatedData:
    """A data set as the clients of a federation hold it. Use :func:`open_data` to get one."""

    spec: DataSpec
    train: Split
    test: Split
    partitions: list[np.ndarray] = field(default_factory=list)  # indices into train
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by partition

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.train.names)

    @cached_property
    def _resize(self) -> v2.Compose:
        side = self.spec.image_size
        gray = v2.Grayscale(num_output_channels=1) if self.spec.channels == 1 else v2.RGB()
        return v2.Compose([v2.ToImage(), gray, v2.Resize((side, side), antialias=True)])

    @cached_property
    def _normalize(self) -> v2.Compose:
        return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])

    def _pixels(self, split: Split, indices: np.ndarray) -> Tensor:
        """Return decoded, resized images: uint8 [examples, channels, side, side]."""
        try:
            return torch.stack([self._resize(image) for image in split.decode(indices)])
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"dataset {self.spec.dataset!r} holds an image that cannot be decoded: "
                f"{first_line(error)}"
            ) from None

    def _decoded(self, client: int) -> tuple[Tensor, Tensor]:
        indices = self.partitions[client]
        key = id(indices)  # clients that have the same share it
        if key not in self._kept:  # not functools.cache, which would never let this object go
            labels = torch.from_numpy(self.train.labels[indices])
            self._kept[key] = self._pixels(self.train, indices), labels
        return self._kept[key]

    @lru_cache(maxsize=1)  # noqa: B019 - keeps one object at most
    def _client(self, client: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the examples of a client, resident on a device."""
        images, labels = self._decoded(client)
        return images.to(device), labels.to(device)

    def client_batch(
        self, client: int, positions: np.ndarray, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor]:
        """Examples of one client: float32 images [n, channels, side, side], labels [n]."""
        images, labels = self._client(client, device)
        index = torch.from_numpy(positions).to(device, non_blocking=True)
        return self._normalize(images[index]), labels[index]

    @cached_property
    def _test_pixels(self) -> tuple[Tensor, Tensor]:
        indices = self.test.subset(self.spec.test_examples, SPLIT_SEED)
        return self._pixels(self.test, indices), torch.from_numpy(self.test.labels[indices])

    @property
    def test_size(self) -> int:
        """How many held-out examples are used."""
        return len(self._test_pixels[1])

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Held-out examples ``start`` to ``stop``: float32 images, labels."""
        images, labels = self._test_pixels
        return self._normalize(images[start:stop]), labels[start:stop]


@lru_cache(maxsize=2)
def open_data(spec: DataSpec) -> FederatedData:
    """Load and partition a data set, once a process.

    Raises:
        ConfigError: When there is no such data, or it cannot be shared out as asked.
    """
    sources = {DIGITS: lambda spec: digits(), MADE_UP: made_up}
    train, test = sources.get(spec.dataset, folder_splits)(spec)
    data = FederatedData(spec, train, test)
    data.partitions = partition_of(spec, train)
    return data


def class_count(dataset: str, label_column: str) -> int:
    """How many classes a data set has, without sharing it out."""
    if dataset in EMBEDDED_DATASETS:
        return 10
    return len(hub_or_folder(dataset, label_column)[0].features[label_column].names)
