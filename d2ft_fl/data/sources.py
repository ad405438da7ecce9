"""Where examples come from: embedded, made up, a folder or the Hugging Face hub.

scikit-learn and ``datasets`` are imported by what needs them: a worker process with embedded data
does without.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_fl.config.choices import DIGITS, EMBEDDED_DATASETS
from d2ft_fl.data import tables
from d2ft_fl.data.folders import Choice, Loaded, load, whole_numbers
from d2ft_fl.data.kept import kept
from d2ft_fl.data.spec import SPLIT_SEED, DataSpec

if TYPE_CHECKING:
    import datasets


TEN = tuple(str(number) for number in range(10))  # classes of embedded data
CHUNK = 1000  # rows that are read at once


@dataclass(frozen=True)
class Split:
    """One split: labels at once, images and other columns on demand.

    Attributes:
        table: Rows, int64 [n] -> a light data set of everything but the image, label included.
        labels: int64 [examples].
        values: Rows, int64 [n] -> images as they lie: arrays, or undecoded files.
        names: Class names.
        name: Of the split, as messages call it.
        identity: Rows -> a digest of their images as they lie; None where all are known to be good.
        numbers: int64: the row of each example in its data set, for messages; None: as here.
        rows: int64 [examples]: where in all of the above the examples are; None: all, in order.
    """

    table: Callable[[np.ndarray], "datasets.Dataset"]
    labels: np.ndarray
    values: Callable[[np.ndarray], list[Any]]
    names: tuple[str, ...]
    name: str = "train"
    identity: Callable[[np.ndarray], str] | None = None
    numbers: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows of some examples in the data set: int64 [n]."""
        return indices if self.rows is None else self.rows[indices]

    def row_of(self, index: int) -> int:
        """Return the row of an example in the data set as it lies on disk."""
        row = int(self.places(np.array([index]))[0])
        return row if self.numbers is None else int(self.numbers[row])

    def take(self, indices: np.ndarray) -> "Split":
        """Return a split of some of the examples, in their order."""
        return replace(self, labels=self.labels[indices], rows=self.places(indices))

    def sample(self, count: int, seed: int) -> "Split":
        """Return a split of ``count`` seeded random examples (0: all), in their order."""
        if count == 0 or count >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[:count]))


def digits() -> tuple[Split, Split]:
    """Return scikit-learn's 1,797 digits (UCI), 8 x 8 pixels; two fifths are held out."""
    arrays = kept((DIGITS, SPLIT_SEED, version("scikit-learn")), _read_digits)
    pixels, labels = arrays["pixels"], arrays["labels"]

    def split(rows: np.ndarray) -> Split:
        mine = labels[rows]
        return Split(
            lambda index: _labels_alone(mine[index]),
            mine,
            lambda index: list(pixels[rows[index]]),
            TEN,
        )

    return split(arrays["train"]), split(arrays["test"])


def _read_digits() -> dict[str, np.ndarray]:
    """Return pixels, uint8 [n, 8, 8, 1], labels, and the rows of both splits, ascending."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.4, random_state=SPLIT_SEED, stratify=labels
    )
    return {"pixels": pixels, "labels": labels, "train": np.sort(train), "test": np.sort(test)}


def _labels_alone(labels: np.ndarray) -> "datasets.Dataset":
    """Return a data set of one column."""
    import datasets

    return datasets.Dataset.from_dict({"label": labels})


def made_up(spec: DataSpec) -> tuple[Split, Split]:
    """Return noise of the model's size, ten classes: to measure speed with any number of examples.

    As many as are asked for; else 32 for each client, and 256 to test on.
    """

    def split(number: int, count: int) -> Split:
        labels = np.random.default_rng([spec.seed, number]).integers(0, 10, count)

        def values(indices: np.ndarray) -> list[np.ndarray]:
            shape = spec.image_size, spec.image_size, spec.channels
            draws = (np.random.default_rng([spec.seed, number, 1, int(i)]) for i in indices)
            return [draw.integers(0, 256, shape, dtype=np.uint8) for draw in draws]

        return Split(lambda rows: _labels_alone(labels[rows]), labels, values, TEN)

    return split(0, spec.train_examples or 32 * spec.clients), split(1, spec.test_examples or 256)


def read_splits(spec: DataSpec) -> tuple[Split, Split]:
    """Return the training and the held-out split of a folder, or of a data set of the hub."""
    loaded = load(choice_of(spec))
    halves, names = (loaded.train, loaded.test), loaded.splits
    train, test = (
        _split(data, loaded, spec.label_column, name)
        for data, name in zip(halves, names, strict=True)
    )
    return train, test


def class_names(spec: DataSpec) -> tuple[str, ...]:
    """Return the names of the classes of a data set, without sharing it out."""
    return TEN if spec.dataset in EMBEDDED_DATASETS else tuple(load(choice_of(spec)).names)


def choice_of(spec: DataSpec) -> Choice:
    """Return what of a data set is used, without what it is used for."""
    return Choice(spec.dataset, spec.label_column, spec.image_column, spec.test_split, spec.classes)


def _split(data: "datasets.Dataset", loaded: Loaded, label: str, name: str) -> Split:
    image, numbers = loaded.image, whole_numbers(data, loaded.row)
    return Split(
        lambda rows: data.remove_columns([image, loaded.row]).select(rows),
        whole_numbers(data, label),
        lambda rows: data[rows][image],
        tuple(loaded.names),
        name=name,
        identity=lambda rows: _identity(data, image, numbers, rows),
        numbers=numbers,
    )


def _identity(data: "datasets.Dataset", image: str, numbers: np.ndarray, rows: np.ndarray) -> str:
    """Return a digest that is another one when an image of some rows may be another.

    Args:
        data: A split.
        image: The column of images.
        numbers: int64 [examples of the split]: each example's row in its files.
        rows: int64 [examples].
    """
    digest = hashlib.sha256()
    files = [Path(file["filename"]) for file in data.cache_files]
    if files and tables.are_embedded(data, image):  # then these files say which images they are
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        digest.update(repr((stats, data.split)).encode() + numbers[rows].tobytes())
        return digest.hexdigest()
    for start in range(0, len(rows), CHUNK):
        for value in data[rows[start : start + CHUNK]][image]:
            digest.update(_mark(value))
    return digest.hexdigest()


def _mark(value: dict[str, Any] | None) -> bytes:
    """Return the bytes of an image, or name, size and time of its file."""
    if value is None or value["bytes"] is not None:
        return b"none" if value is None else len(value["bytes"]).to_bytes(8) + value["bytes"]
    try:
        stat = os.stat(value["path"] or "")
        return f"{value['path']} {stat.st_size} {stat.st_mtime_ns} ".encode()
    except OSError:
        return f"{value['path']} is missing ".encode()
