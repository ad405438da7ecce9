"""Data sets, their held-out test split, and their partitions over clients.

Images are decoded and resized once per process, a client's at a time, and kept as uint8.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from d2ft_fl.config.choices import DIGITS, EMBEDDED_DATASETS, MADE_UP
from d2ft_fl.data.folders import Loaded, load
from d2ft_fl.data.images import BadImage, picture_of
from d2ft_fl.data.inspection import Inspected, inspect
from d2ft_fl.data.partition import partition_of
from d2ft_fl.data.sources import Split, choice_of, digits, made_up, read_splits
from d2ft_fl.data.spec import SPLIT_SEED, DataSpec
from d2ft_fl.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(eq=False)
class FederatedData:
    """A data set as the clients of a federation hold it. Use :func:`open_data` to get one.

    Attributes:
        spec: Which data, and how it is shared out.
        train: Examples that clients share; ``test`` those that are held out.
        partitions: int64 [examples] a client: which of ``train`` it has.
        inspected: What was found of both, of data sets that were looked at.
    """

    spec: DataSpec
    train: Split
    test: Split
    partitions: list[np.ndarray] = field(default_factory=list)
    inspected: tuple[Inspected, ...] = ()
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
            values = split.values(split.places(indices))
            return torch.stack([self._resize(picture_of(value)) for value in values])
        except (OSError, ValueError, TypeError, BadImage) as error:
            raise ConfigError(
                f"an image of dataset {self.spec.dataset!r} that was good before the run cannot be "
                f"decoded any more: {error}"
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
        everything = np.arange(len(self.test))
        return self._pixels(self.test, everything), torch.from_numpy(self.test.labels)

    @property
    def test_size(self) -> int:
        """How many held-out examples are used."""
        return len(self.test)

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Held-out examples ``start`` to ``stop``: float32 images, labels."""
        images, labels = self._test_pixels
        return self._normalize(images[start:stop]), labels[start:stop]

    @property
    def notes(self) -> list[str]:
        """What somebody who runs this may want to know, a line each."""
        if self.spec.dataset in EMBEDDED_DATASETS:
            return []
        notes = [*_loaded(self.spec).notes]
        for part in self.inspected:
            notes += part.notes
        flat = self.inspected[0].constant
        if blank := [c for c, part in enumerate(self.partitions) if flat[part].all()]:
            shown = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
            notes.append(
                f"all images of {len(blank)} of {len(self.partitions)} clients ({shown}) are of "
                "one colour each: there is nothing to learn from them"
            )
        return notes

    def describe(self, private: bool = False) -> dict[str, Any]:
        """Return what a run folder says of the data, as JSON.

        Args:
            private: Whether clients are promised differential privacy: then nothing is said of the
                examples that they train on.
        """
        loaded = None if self.spec.dataset in EMBEDDED_DATASETS else _loaded(self.spec)
        sides: dict[str, dict[str, Any]] = {}
        known = {"train": self.train, "test": self.test}
        if private:
            del known["train"]
        for side, split in known.items():
            counts = np.bincount(split.labels, minlength=self.classes)
            sides[side] = {
                "split": split.name,
                "examples": len(split),
                "examples_of_class": counts.tolist(),
                "unlabelled": loaded.unlabelled[side == "test"] if loaded else 0,
            }
        for side, part in zip(("train", "test"), self.inspected, strict=True):
            if side in sides:
                sides[side]["left_out"] = [vars(example) for example in part.bad]
        notes = {} if private else {"notes": self.notes}
        return {
            "dataset": self.spec.dataset, "classes": list(self.train.names), **sides, **notes
        }  # fmt: skip


def _loaded(spec: DataSpec) -> Loaded:
    return load(choice_of(spec))


@lru_cache(maxsize=2)
def open_data(spec: DataSpec) -> FederatedData:
    """Load and partition a data set, once a process; images that cannot be used are left out.

    Raises:
        ConfigError: When there is no such data, or it cannot be shared out as asked.
    """
    sources = {DIGITS: lambda spec: digits(), MADE_UP: made_up}
    train, test = sources.get(spec.dataset, read_splits)(spec)
    train = train.sample(spec.train_examples, spec.seed)
    test = test.sample(spec.test_examples, SPLIT_SEED)
    inspected = tuple(inspect(half, spec.dataset, spec.bad_examples) for half in (train, test))
    data = FederatedData(spec, inspected[0].split, inspected[1].split, inspected=inspected)
    data.partitions = partition_of(spec, data.train)
    return data
