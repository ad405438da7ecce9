"""Data sets, their held-out test split, and their partitions over clients.

Images are decoded and resized once per process, a client's at a time, and kept as uint8.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import datasets
import flwr_datasets.partitioner as partitioners
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import v2

from d2ft_fl.errors import ConfigError
from d2ft_fl.specs import DIGITS, EMBEDDED, HUB, MADE_UP, DataSpec

ALL = "all"  # in place of a partitioner: every client has everything, as where data are its own
INDEX = "d2ft-index"  # the column that follows an example through partitioning
CPU = torch.device("cpu")
SPLIT_SEED = 2504  # one test split for all seeds of a comparison


@dataclass
class Split:
    """One split: labels and other columns at once, images decoded on demand.

    Attributes:
        columns: Everything but the image, label included, as a light data set.
        labels: int64 [examples].
        decode: Indices to raw images (PIL or arrays).
        names: Class names.
    """

    columns: datasets.Dataset
    labels: np.ndarray
    decode: Callable[[np.ndarray], list[Any]]
    names: list[str]

    def subset(self, count: int, seed: int) -> np.ndarray:
        """Indices of ``count`` seeded random examples (0: all), ascending."""
        if count == 0 or count >= len(self.labels):
            return np.arange(len(self.labels))
        order = np.random.default_rng(seed).permutation(len(self.labels))
        return np.sort(order[:count])


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
        """Decoded, resized images: uint8 [examples, channels, side, side]."""
        try:
            return torch.stack([self._resize(image) for image in split.decode(indices)])
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"dataset {self.spec.dataset!r} holds an image that cannot be decoded: "
                f"{_reason(error)}"
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
        """The examples of the client at hand, resident on a device."""
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
    sources = {DIGITS: lambda spec: _digits(), MADE_UP: _made_up}
    train, test = sources.get(spec.dataset, _folder)(spec)
    data = FederatedData(spec, train, test)
    data.partitions = _partition(spec, train)
    return data


def class_count(dataset: str, label_column: str) -> int:
    """How many classes a data set has, without sharing it out."""
    if dataset in EMBEDDED:
        return 10
    return len(_load_splits(dataset, label_column)[0].features[label_column].names)


# -- sources -------------------------------------------------------------------------------------


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits (UCI), 8 x 8 pixels; two fifths are held out."""
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # [n, 8, 8, 1]
    labels = bunch.target.astype(np.int64)
    parts = train_test_split(
        np.arange(len(labels)), test_size=0.4, random_state=SPLIT_SEED, stratify=labels
    )
    names = [str(digit) for digit in range(10)]

    def split(rows: np.ndarray) -> Split:
        columns = datasets.Dataset.from_dict({"label": labels[rows]})
        return Split(columns, labels[rows], lambda index: list(pixels[rows[index]]), names)

    return split(np.sort(parts[0])), split(np.sort(parts[1]))


def _made_up(spec: DataSpec) -> tuple[Split, Split]:
    """Noise of the model's size, ten classes: to measure speed with any number of examples.

    As many as are asked for; else 32 for each client, and 256 to test on.
    """

    def split(number: int, count: int) -> Split:
        labels = np.random.default_rng([spec.seed, number]).integers(0, 10, count)

        def decode(indices: np.ndarray) -> list[np.ndarray]:
            shape = spec.image_size, spec.image_size, spec.channels
            draws = (np.random.default_rng([spec.seed, number, 1, int(i)]) for i in indices)
            return [draw.integers(0, 256, shape, dtype=np.uint8) for draw in draws]

        columns = datasets.Dataset.from_dict({"label": labels})
        return Split(columns, labels, decode, [str(label) for label in range(10)])

    return split(0, spec.train_examples or 32 * spec.clients), split(1, spec.test_examples or 256)


def _folder(spec: DataSpec) -> tuple[Split, Split]:
    train, test = _load_splits(spec.dataset, spec.label_column)
    return _split(train, spec.label_column), _split(test, spec.label_column)


def _split(data: datasets.Dataset, label: str) -> Split:
    image = _image_column(data)
    columns = data.remove_columns([image])
    labels = np.asarray(data.with_format("numpy")[label][:], dtype=np.int64)
    names = list(data.features[label].names)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ConfigError(
            f"column {label!r} holds no labels, or some outside its {len(names)} classes"
        )
    return Split(columns, labels, lambda index: data[index.tolist()][image], names)


def _image_column(data: datasets.Dataset) -> str | None:
    return next((n for n, f in data.features.items() if isinstance(f, datasets.Image)), None)


def _load(dataset: str) -> datasets.DatasetDict:
    """All splits of a data set of the hub, or of a local folder."""
    datasets.disable_progress_bars()
    if dataset.startswith(HUB):
        name, _, configuration = dataset.removeprefix(HUB).partition(":")
        try:
            return datasets.load_dataset(name, configuration or None)
        except Exception as error:  # whatever a hub that does not answer brings about
            raise ConfigError(
                f"dataset = {dataset!r} cannot be had from the hub: {_reason(error)}; check the "
                f"name ('{HUB}OWNER/NAME' or '{HUB}OWNER/NAME:CONFIGURATION') and the network, or "
                "use a folder"
            ) from None
    if not Path(dataset).is_dir():
        raise ConfigError(
            f"dataset = {dataset!r} is not a folder; use {DIGITS!r}, {MADE_UP!r}, "
            f"'{HUB}OWNER/NAME', or a folder of parquet files or of images in one folder a class"
        )
    try:
        return datasets.load_dataset(dataset)
    except Exception as error:  # datasets raises many kinds for a folder it cannot use
        raise ConfigError(
            f"dataset {dataset!r} holds no images that can be read: {_reason(error)}"
        ) from None


@lru_cache(maxsize=2)
def _load_splits(path: str, label: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and test of a data set with images."""
    loaded = _load(path)
    name = "train" if "train" in loaded else next(iter(loaded))
    train = loaded[name]
    image = _image_column(train)
    if image is None:
        raise ConfigError(
            f"dataset {path!r} holds no images: its columns are {', '.join(train.column_names)}"
        )
    if label not in train.column_names:
        raise ConfigError(
            f"label-column = {label!r} is not in dataset {path!r}; its columns are "
            f"{', '.join(train.column_names)}"
        )
    held_out = next((loaded[n] for n in ("test", "validation") if n in loaded and n != name), None)
    try:
        if not isinstance(train.features[label], datasets.ClassLabel):
            train = train.class_encode_column(label)
        if held_out is None:
            parts = train.train_test_split(test_size=0.2, seed=SPLIT_SEED, stratify_by_column=label)
            train, held_out = parts["train"], parts["test"]
        else:  # the same numbers for the same names
            held_out = held_out.cast_column(label, train.features[label])
        rgb = datasets.Image(mode="RGB")
        return train.cast_column(image, rgb), held_out.cast_column(image, rgb)
    except Exception as error:  # as above
        raise ConfigError(
            f"labels {label!r} of dataset {path!r} cannot be used: {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- partitions ----------------------------------------------------------------------------------


def partitioner_class(name: str) -> type:
    """A partitioner of flwr-datasets by its name, with or without the ending, in any case.

    Raises:
        ConfigError: When there is none.
    """
    known = {n.removesuffix("Partitioner").lower(): n for n in partitioners.__all__}
    known.pop("", None)
    key = name.removesuffix("Partitioner").replace("-", "").replace("_", "").lower()
    if key not in known:
        names = ", ".join([ALL, *sorted(n.removesuffix("Partitioner") for n in known.values())])
        raise ConfigError(f"partitioner = {name!r} is unknown; use one of {names}")
    return getattr(partitioners, known[key])


def _partition(spec: DataSpec, train: Split) -> list[np.ndarray]:
    """Share the training examples out: per client, indices into ``train``, seeded."""
    datasets.disable_progress_bars()
    # In random order: some partitioners cut the data as it lies, and folders lie by class.
    chosen = np.random.default_rng([spec.seed, 2]).permutation(
        train.subset(spec.train_examples, spec.seed)
    )
    if spec.clients > len(chosen) and spec.partitioner.lower() != ALL:
        raise ConfigError(
            f"clients = {spec.clients} is more than the {len(chosen)} training examples; "
            f"ask for at most {len(chosen)}"
        )
    if spec.partitioner.lower() == ALL:
        return [np.sort(chosen)] * spec.clients
    kind = partitioner_class(spec.partitioner)
    accepted = inspect.signature(kind).parameters
    arguments = dict(spec.partitioner_arguments)
    for key, value in (
        ("num_partitions", spec.clients),
        ("partition_by", spec.label_column if spec.dataset not in EMBEDDED else "label"),
        ("seed", spec.seed),
    ):
        if key in accepted:
            arguments.setdefault(key, value)
    if unknown := sorted(arguments.keys() - accepted.keys()):
        raise ConfigError(
            f"partitioner-args: {unknown[0]!r} is not a parameter of {kind.__name__}; it takes "
            f"{', '.join(accepted)}"
        )
    columns = train.columns.select(chosen)
    columns = columns.add_column(INDEX, chosen.tolist())
    try:
        partitioner = kind(**arguments)
        partitioner.dataset = columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # retries; what matters raises
            made = partitioner.num_partitions
            if made != spec.clients:
                raise ConfigError(
                    f"partitioner {kind.__name__} makes {made} parts, not one for each of "
                    f"clients = {spec.clients}"
                )
            parts = [_indices(partitioner, client) for client in range(spec.clients)]
    except ConfigError:
        raise
    except Exception as error:  # partitioners validate their own arguments in many ways
        raise ConfigError(
            f"partitioner {kind.__name__} cannot share {len(chosen)} examples over "
            f"{spec.clients} clients: {_reason(error)}"
        ) from None
    for client, part in enumerate(parts):
        if len(part) == 0:
            raise ConfigError(
                f"client {client} is left with no examples; use fewer clients than {spec.clients}, "
                "more train-examples, or another partitioner"
            )
    return parts


def _indices(partitioner: Any, client: int) -> np.ndarray:
    return np.sort(np.asarray(partitioner.load_partition(client)[INDEX], dtype=np.int64))
